"""Which learning rates an arm's search tries, and which of them it takes.

It starts with a grid. While the best rate stands at an edge of what was tried, the rate half or twice as high beyond
that edge is tried as well, two of them at most; a best rate that is still at the edge then is marked in the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FURTHER = 2  # rates beyond the grid that a search may try


@dataclass(frozen=True)
class Search:
    """How far a search has come. `best` is the best rate that has a loss, `missing` what is to be tried next; without
    any the search is over. `at_edge`: no worse rate was tried below or above the best."""

    best: float | None
    missing: Sequence[float]
    at_edge: bool


def search_of(losses: Mapping[float, float | None], grid: Sequence[float]) -> Search:
    """`losses` has the loss of every rate tried so far; None or NaN where training broke off, which counts as the
    worst. Rates beyond the grid that some earlier search tried count too. Raises ValueError for an empty grid."""
    if not grid:
        raise ValueError("a search without a rate")
    known = {rate: _comparable(loss) for rate, loss in losses.items()}
    tried = sorted(known)
    best = min(tried, key=lambda rate: known[rate], default=None)
    missing = [rate for rate in grid if rate not in known]
    at_edge = best is not None and best in (tried[0], tried[-1])
    if best is None or missing or not at_edge:
        return Search(best, missing, at_edge)
    room = FURTHER - sum(rate not in grid for rate in tried)
    beyond = [2 * best] if best == tried[-1] else []
    beyond += [best / 2] if best == tried[0] else []
    return Search(best, beyond[: max(0, room)], at_edge)


def _comparable(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss
