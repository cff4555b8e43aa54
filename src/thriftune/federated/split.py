"""How one data set is shared out among simulated sites.

even                    rows drawn at random, as many for each site
dirichlet:0.3           each label's rows in shares drawn from a Dirichlet distribution with this concentration (Hsu
                        et al. 2019, arXiv:1909.06335): the smaller it is, the less alike the sites
dirichlet:0.3:rating    the same by another column
by:rating               rows in the order of a column, cut into equal parts: sites see different values
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thriftune.errors import InputError

ALLOWED = "even, dirichlet:CONCENTRATION, dirichlet:CONCENTRATION:COLUMN, or by:COLUMN"
LEAST_ROWS = 8  # a site with fewer would train on the same few rows over and over
TRIES = 1000
LABEL = "label"


@dataclass(frozen=True)
class Split:
    """`concentration` is None for equal parts; `column` is None for parts drawn at random."""

    concentration: float | None
    column: str | None


def read_split(text: str) -> Split:
    """Raises InputError for words that are no split."""
    words = text.split(":")
    if words == ["even"]:
        return Split(None, None)
    if words[0] == "by" and len(words) == 2 and words[1]:
        return Split(None, words[1])
    if words[0] == "dirichlet" and len(words) in (2, 3):
        try:
            concentration = float(words[1])
        except ValueError:
            concentration = 0.0
        if 0.0 < concentration < float("inf"):
            return Split(concentration, words[2] if len(words) == 3 else LABEL)
    raise InputError(given=f"--split {text}", allowed=ALLOWED, do="for example --split dirichlet:0.3")


def share_out(split: Split, rows: Sequence[dict[str, Any]], sites: int, seed: int) -> list[list[int]]:
    """The numbers of each site's rows, rising: disjoint, together all. The same seed gives the same shares.

    Raises InputError when there are too few rows, or rows lack the column.
    """
    if len(rows) < sites * LEAST_ROWS:
        raise InputError(
            given=f"{len(rows):,} rows for {sites} sites",
            allowed=f"{LEAST_ROWS} rows or more for each site",
            do="take fewer --clients or more rows",
        )
    draw = np.random.default_rng([seed, 2])
    order = draw.permutation(len(rows))
    if split.concentration is not None:
        shares = _by_dirichlet(split.concentration, order, _values(rows, split.column or LABEL), sites, draw)
    elif split.column is None:
        shares = np.array_split(order, sites)
    else:
        values = _values(rows, split.column)
        shares = np.array_split(sorted(order.tolist(), key=lambda row: values[row]), sites)
    return [sorted(int(row) for row in share) for share in shares]


def _by_dirichlet(
    concentration: float, order: npt.NDArray[np.int64], values: list[Any], sites: int, draw: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """Drawn again until every site has LEAST_ROWS."""
    kinds = sorted(set(values))
    rows_of = [np.array([row for row in order if values[row] == kind]) for kind in kinds]
    for _ in range(TRIES):
        parts: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(sites)]
        for rows in rows_of:
            ends = np.round(np.cumsum(draw.dirichlet([concentration] * sites)) * len(rows)).astype(int)[:-1]
            for part, share in zip(parts, np.split(rows, ends), strict=True):
                part.append(share)
        shares = [np.concatenate(part) for part in parts]
        if min(len(share) for share in shares) >= LEAST_ROWS:
            return shares
    raise InputError(
        given=f"concentration {concentration:g} over {sites} sites: {TRIES} draws left one with under {LEAST_ROWS} "
        "rows",
        allowed="shares of which each site has some",
        do="raise the concentration, take fewer --clients, or split by:COLUMN",
    )


def _values(rows: Sequence[dict[str, Any]], column: str) -> list[Any]:
    """The column's value in every row: numbers, or texts."""
    for number, row in enumerate(rows):
        if not isinstance(row.get(column), (int, float, str)):
            raise InputError(
                given=f"row {number + 1} has no number or text in the column {column!r}; it has {', '.join(row)}",
                allowed="a column that every row has",
                do=f"name one: dirichlet:0.3:COLUMN or by:COLUMN; or --split even (allowed are {ALLOWED})",
            )
    found = [row[column] for row in rows]
    return [str(value) for value in found] if any(isinstance(value, str) for value in found) else found
