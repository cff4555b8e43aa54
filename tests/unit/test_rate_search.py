"""How the searches of benchmarks go on beyond the edge of their grid."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from rates import Search, search_of

GRID = (5e-4, 1e-3, 2e-3, 4e-3)


def searched(loss: Callable[[float], float | None], grid: tuple[float, ...] = GRID) -> tuple[list[float], Search]:
    """(the rates in the order they were tried, the search when nothing is missing)."""
    losses: dict[float, float | None] = {}
    while (found := search_of(losses, grid)).missing:
        rate = found.missing[0]
        assert rate not in losses
        losses[rate] = loss(rate)
    return list(losses), found


def valley(at: float) -> Callable[[float], float]:
    return lambda rate: abs(math.log(rate / at))


@pytest.mark.parametrize(
    ("at", "further", "at_edge"),
    [
        (1e-3, [], False),
        (4e-3, [8e-3], False),
        (8e-3, [8e-3, 1.6e-2], False),
        (1.6e-2, [8e-3, 1.6e-2], True),
        (1.0, [8e-3, 1.6e-2], True),
        (5e-4, [2.5e-4], False),
        (1e-9, [2.5e-4, 1.25e-4], True),
    ],
)
def test_a_search_goes_on_until_its_best_rate_is_no_edge(at: float, further: list[float], at_edge: bool) -> None:
    tried, found = searched(valley(at))
    assert tried == [*GRID, *further]
    assert found.at_edge == at_edge
    assert found.best == min(tried, key=valley(at))


def test_a_rate_at_which_training_breaks_off_is_the_worst() -> None:
    for broken in (None, math.nan):
        tried, found = searched(lambda rate, broken=broken: broken if rate > 4e-3 else -rate)
        assert tried == [*GRID, 8e-3] and found == Search(4e-3, [], False)


def test_nothing_is_chosen_before_the_whole_grid_was_tried() -> None:
    found = search_of({5e-4: 1.0, 4e-3: 0.5}, GRID)
    assert found.missing == [1e-3, 2e-3]
    assert search_of({}, GRID) == Search(None, list(GRID), False)


def test_a_grid_of_one_goes_both_ways() -> None:
    tried, found = searched(valley(1e-3), (1e-3,))
    assert tried == [1e-3, 2e-3, 5e-4] and not found.at_edge
