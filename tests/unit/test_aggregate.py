"""Aggregation against the dense matrices it never forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thriftune.federated.aggregate import (
    NEGLIGIBLE,
    Factors,
    Share,
    Update,
    aggregate,
    change_norm,
    parts_of,
    refuse_unusable,
    stacked_mean,
    trained_half,
    truncated,
)

SHAPES = st.tuples(st.integers(1, 23), st.integers(1, 19))  # out and in differ, so that a transposition shows
RANKS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def draw(out: int, into: int, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(out, rank, generator=generator), torch.randn(rank, into, generator=generator))


def dense(factors: Factors) -> Tensor:
    return factors.b_OR.double() @ factors.a_RI.double()


def share(part: Factors, first: int, weight: float) -> Share:
    return Share(Factors(part.b_OR.double(), part.a_RI.double()), first, weight)


def dense_mean(current: Factors, shares: list[Share]) -> Tensor:
    """The current product, and what each site changed in it by its weight."""
    mean = dense(current)
    for one in shares:
        before = current.between(one.first, one.end)
        mean = mean + one.weight * (dense(one.factors) - dense(before))
    return mean


def some_shares(out: int, into: int, ranks: list[int], seed: int) -> list[Share]:
    """One site a rank, each at another turn of its parts."""
    total = sum(3 * number + 1 for number in range(len(ranks)))
    shares = []
    for number, rank in enumerate(ranks):
        parts = parts_of("svd", rank, max(ranks))
        first, end = parts[(seed + number) % len(parts)]
        part = draw(out, into, end - first, seed + number + 1)
        shares.append(share(part, first, (3 * number + 1) / total))
    return shares


def updates_of(shares: list[Share]) -> list[Update]:
    return [Update(str(number), 7.0 * one.weight, {"m": one.factors}, one.first) for number, one in enumerate(shares)]


@given(st.integers(1, 40), st.data())
def test_parts_hold_every_component_once_and_no_more_than_the_rank(whole: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, whole))
    parts = parts_of("svd", rank, whole)
    assert [component for first, end in parts for component in range(first, end)] == list(range(whole))
    assert all(0 < end - first <= rank for first, end in parts)
    assert parts_of("fedit", rank, whole) == [(0, rank)]


@given(SHAPES, RANKS, st.integers(0, 1000))
def test_the_stack_is_the_dense_weighted_mean_at_any_ranks(shape: tuple[int, int], ranks: list[int], seed: int) -> None:
    out, into = shape
    current, shares = draw(out, into, max(ranks), seed), some_shares(out, into, ranks, seed)
    stack = stacked_mean(Factors(current.b_OR.double(), current.a_RI.double()), shares)
    wanted = dense_mean(current, shares)
    assert (dense(stack) - wanted).norm() <= 1e-5 * wanted.norm()


@given(SHAPES, RANKS, st.integers(0, 1000))
def test_svd_is_the_best_approximation_of_the_global_rank(shape: tuple[int, int], ranks: list[int], seed: int) -> None:
    out, into = shape
    current, shares = draw(out, into, max(ranks), seed), some_shares(out, into, ranks, seed)
    found = aggregate("svd", {"m": current}, updates_of(shares))
    wanted = dense_mean(current, shares)
    values = torch.linalg.svdvals(wanted)
    kept = min(max(ranks), len(values))
    error = (dense(found.adapter["m"]) - wanted).norm()
    assert error <= (values[kept:].square().sum() + NEGLIGIBLE * wanted.square().sum()).sqrt() + 1e-9 * wanted.norm()
    assert found.adapter["m"].b_OR.shape == current.b_OR.shape
    assert found.adapter["m"].a_RI.shape == current.a_RI.shape
    share_kept = float(values[:kept].square().sum() / values.square().sum())
    if len(shares) == 1:  # taken as it is
        assert found.energy_kept is None
    else:
        assert (
            found.energy_kept is not None and share_kept - NEGLIGIBLE - 1e-9 <= found.energy_kept <= share_kept + 1e-9
        )


@pytest.mark.parametrize(("out", "into"), [(24, 40), (40, 24)])
def test_factors_whose_product_is_the_mean_come_back_as_they_are(out: int, into: int) -> None:
    """A site's moments belong to coordinates: what need not be turned is not, however far from orthogonal the rows."""
    factors = Factors(draw(out, into, 6, seed=3).b_OR.double(), draw(out, into, 6, seed=4).a_RI.double())
    mixed = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    stack = Factors(factors.b_OR @ mixed, torch.linalg.inv(mixed) @ factors.a_RI)
    found, _, _ = truncated(stack, 6, factors.a_RI)
    assert torch.allclose(found.b_OR, factors.b_OR, rtol=1e-6, atol=1e-8)
    assert torch.allclose(found.a_RI, factors.a_RI, rtol=1e-6, atol=1e-8)


def test_new_rows_of_a_stay_near_the_sites_rows_and_can_all_train() -> None:
    """B = 0 in all but two components: the rows of A that stand for nothing yet are no zeros."""
    current = draw(30, 50, 6, seed=1)
    small = [Factors(draw(30, 50, 6, seed=2 + site).b_OR * 0.01, current.a_RI) for site in range(3)]
    for part in small:
        part.b_OR[:, 2:] = 0.0
    start = Factors(current.b_OR * 0.0, current.a_RI)
    found = aggregate("svd", {"m": start}, [Update(str(site), 1.0, {"m": part}) for site, part in enumerate(small)])
    a_RI = found.adapter["m"].a_RI
    assert torch.allclose(a_RI, current.a_RI.double(), rtol=1e-6, atol=1e-6)
    assert float(found.adapter["m"].b_OR[:, 2:].abs().max()) < 1e-9


def test_a_direction_that_no_row_of_a_has_gets_a_row_that_is_long_enough() -> None:
    """Two sites whose changes of A and B go together: their mean has what neither mean factor has."""
    current = Factors(torch.zeros(8, 2), torch.eye(2, 9))
    away = torch.zeros(2, 9)
    away[0, 5] = 3.0
    b_OR = torch.zeros(8, 2)
    b_OR[4, 0] = 2.0
    parts = [Factors(sign * b_OR, current.a_RI + sign * away) for sign in (1.0, -1.0)]
    found = aggregate("svd", {"m": current}, [Update(str(site), 1.0, {"m": part}) for site, part in enumerate(parts)])
    wanted = sum(dense(part) for part in parts) / 2
    assert float(wanted[4, 5]) == 6.0
    assert torch.allclose(dense(found.adapter["m"]), wanted, atol=1e-9)
    assert float(found.adapter["m"].a_RI.norm(dim=1).min()) > 0.09


def test_one_full_update_is_taken_to_the_bit() -> None:
    current, part = draw(9, 14, 4, seed=1), draw(9, 14, 4, seed=2)
    for aggregation in ("svd", "fedit", "ffa", "rolora"):
        found = aggregate(aggregation, {"m": current}, [Update("only", 5.0, {"m": part})]).adapter["m"]
        assert torch.equal(found.b_OR, part.b_OR.double()) and torch.equal(found.a_RI, part.a_RI.double())


@pytest.mark.parametrize("aggregation", ["ffa", "rolora"])
@pytest.mark.parametrize("round_number", [0, 1])
def test_with_one_factor_shared_the_linear_methods_are_exact(aggregation: str, round_number: int) -> None:
    current = draw(13, 21, 4, seed=5)
    half = trained_half(aggregation, round_number)
    drawn = [draw(13, 21, 4, seed=6 + site) for site in range(3)]
    parts = [Factors(part.b_OR, current.a_RI) if half == "b" else Factors(current.b_OR, part.a_RI) for part in drawn]
    weights = [1.0, 2.0, 5.0]
    updates = [Update(str(site), weight, {"m": part}) for site, (part, weight) in enumerate(zip(parts, weights))]  # noqa: B905
    found = aggregate(aggregation, {"m": current}, updates).adapter["m"]
    wanted = dense_mean(current, [share(part, 0, weight / 8) for part, weight in zip(parts, weights)])  # noqa: B905
    assert (dense(found) - wanted).norm() <= 1e-5 * wanted.norm()
    assert half == ("b" if aggregation == "ffa" or round_number == 0 else "a")


def test_averaging_both_factors_is_not_the_mean_of_the_updates() -> None:
    """What fedit gets wrong, so that the control is known to be one."""
    current = draw(13, 21, 4, seed=5)
    parts = [draw(13, 21, 4, seed=6 + site) for site in range(3)]
    updates = [Update(str(site), 1.0, {"m": part}) for site, part in enumerate(parts)]
    found = aggregate("fedit", {"m": current}, updates)
    wanted = dense_mean(current, [share(part, 0, 1 / 3) for part in parts])
    assert (dense(found.adapter["m"]) - wanted).norm() > 0.1 * wanted.norm()
    assert found.energy_kept is None, "nothing was cut"


def test_equal_updates_give_that_update() -> None:
    """K sites with the same data end where one of them does."""
    current, part = draw(17, 11, 4, seed=1), draw(17, 11, 4, seed=2)
    found = aggregate("svd", {"m": current}, [Update(str(site), 1.0 + site, {"m": part}) for site in range(4)])
    assert torch.allclose(dense(found.adapter["m"]), dense(part), rtol=1e-9, atol=1e-9)
    assert found.energy_kept == pytest.approx(1.0)


def test_the_norm_of_a_change_is_the_dense_one() -> None:
    current = {"m": draw(15, 8, 6, seed=1), "n": draw(7, 9, 6, seed=2)}
    update = Update("a", 1.0, {"m": draw(15, 8, 3, seed=3), "n": draw(7, 9, 3, seed=4)}, first=2)
    changes = [dense(update.adapter[name]) - dense(current[name].between(2, 5)) for name in current]
    wanted = math.sqrt(sum(float(change.square().sum()) for change in changes))
    assert change_norm(current, update, 2.0) == pytest.approx(2.0 * wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_with_the_sites_name(value: float) -> None:
    current = {"m": draw(6, 5, 2, seed=1)}
    bad = draw(6, 5, 2, seed=2)
    bad.a_RI[1, 1] = value
    updates = [Update("good", 1.0, {"m": draw(6, 5, 2, seed=3)}), Update("clinic-7", 1.0, {"m": bad})]
    taken, refused, norms = refuse_unusable(current, updates, 1.0, 10.0, [])
    assert [update.site for update in taken] == ["good"] and len(norms) == 1
    assert [entry.site for entry in refused] == ["clinic-7"] and "clinic-7" in refused[0].reason


def test_an_outsized_change_is_refused_by_the_round_or_by_the_rounds_before() -> None:
    current = {"m": draw(6, 5, 2, seed=1)}
    usual = [Update(name, 1.0, {"m": draw(6, 5, 2, seed=3 + place)}) for place, name in enumerate("ab")]
    huge = Update("c", 1.0, {"m": Factors(draw(6, 5, 2, seed=9).b_OR * 1000, draw(6, 5, 2, seed=9).a_RI)})
    taken, refused, norms = refuse_unusable(current, [*usual, huge], 1.0, 10.0, [])
    assert [update.site for update in taken] == ["a", "b"] and [entry.site for entry in refused] == ["c"]
    assert refuse_unusable(current, [usual[0], huge], 1.0, 10.0, [])[1] == []
    assert [entry.site for entry in refuse_unusable(current, [usual[0], huge], 1.0, 10.0, norms)[1]] == ["c"]


def test_a_mean_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no updates"):
        aggregate("svd", {"m": draw(3, 4, 2, seed=1)}, [])
