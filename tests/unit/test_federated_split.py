"""Rows shared out among simulated sites."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thriftune.errors import InputError
from thriftune.federated.split import LEAST_ROWS, Split, read_split, share_out

ROWS: list[dict[str, Any]] = [{"text": str(row), "label": row % 2, "rating": (row * 7) % 10} for row in range(600)]


@pytest.mark.parametrize("text", ["even", "dirichlet:0.5", "dirichlet:0.5:rating", "by:rating"])
@given(sites=st.integers(1, 9), seed=st.integers(0, 50))
def test_shares_are_disjoint_whole_and_repeatable(text: str, sites: int, seed: int) -> None:
    shares = share_out(read_split(text), ROWS, sites, seed)
    assert len(shares) == sites
    assert sorted(row for share in shares for row in share) == list(range(len(ROWS)))
    assert all(len(share) >= LEAST_ROWS and share == sorted(share) for share in shares)
    assert shares == share_out(read_split(text), ROWS, sites, seed)


def test_another_seed_draws_other_shares() -> None:
    assert share_out(Split(None, None), ROWS, 3, 1) != share_out(Split(None, None), ROWS, 3, 2)


def test_a_small_concentration_makes_sites_unlike_and_a_large_one_alike() -> None:
    def share_of_ones(concentration: float) -> list[float]:
        shares = share_out(Split(concentration, "label"), ROWS, 5, 3)
        return [sum(ROWS[row]["label"] for row in share) / len(share) for share in shares]

    assert max(share_of_ones(0.1)) - min(share_of_ones(0.1)) > 0.5
    assert max(share_of_ones(1000.0)) - min(share_of_ones(1000.0)) < 0.15


def test_by_a_column_each_site_sees_few_values() -> None:
    shares = share_out(Split(None, "rating"), ROWS, 5, 0)
    assert [len(share) for share in shares] == [120] * 5
    kinds = [Counter(ROWS[row]["rating"] for row in share) for share in shares]
    assert all(len(kind) == 2 for kind in kinds)


@pytest.mark.parametrize(
    "text", ["", "uneven", "dirichlet", "dirichlet:0", "dirichlet:nan", "dirichlet:x", "by:", "by"]
)
def test_words_that_are_no_split(text: str) -> None:
    with pytest.raises(InputError, match="--split"):
        read_split(text)


def test_what_cannot_be_shared_out() -> None:
    with pytest.raises(InputError, match="rows for 100 sites"):
        share_out(Split(None, None), ROWS, 100, 0)
    with pytest.raises(InputError, match="column 'stars'"):
        share_out(Split(None, "stars"), ROWS, 2, 0)
    with pytest.raises(InputError, match="left one with under"):
        share_out(Split(0.0001, "label"), ROWS, 8, 0)
