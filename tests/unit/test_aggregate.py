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
    Update,
    aggregate,
    change_norm,
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


def dense_mean(current: Factors, parts: list[Factors], weights: list[float]) -> Tensor:
    """Each site's whole update: what it trained, and the components it left as they were."""
    total = sum(weights)
    mean = torch.zeros_like(dense(current))
    for part, weight in zip(parts, weights, strict=True):
        rest = Factors(current.b_OR[:, part.rank :], current.a_RI[part.rank :])
        mean += weight / total * (dense(part) + dense(rest))
    return mean


@given(SHAPES, RANKS, st.integers(0, 1000))
def test_the_stack_is_the_dense_weighted_mean_at_any_ranks(shape: tuple[int, int], ranks: list[int], seed: int) -> None:
    out, into = shape
    current = draw(out, into, max(ranks), seed)
    parts = [draw(out, into, rank, seed + number + 1) for number, rank in enumerate(ranks)]
    weights = [float(3 * number + 1) for number in range(len(parts))]
    shares = [weight / sum(weights) for weight in weights]
    full = [Factors(part.b_OR.double(), part.a_RI.double()) for part in parts]
    stack = stacked_mean(Factors(current.b_OR.double(), current.a_RI.double()), full, shares)
    wanted = dense_mean(current, parts, weights)
    assert (dense(stack) - wanted).norm() <= 1e-5 * wanted.norm()


@given(SHAPES, RANKS, st.integers(0, 1000))
def test_svd_is_the_best_approximation_of_the_global_rank(shape: tuple[int, int], ranks: list[int], seed: int) -> None:
    out, into = shape
    current = draw(out, into, max(ranks), seed)
    parts = [draw(out, into, rank, seed + number + 1) for number, rank in enumerate(ranks)]
    weights = [float(number + 1) for number in range(len(parts))]
    updates = [Update(str(number), weights[number], {"m": part}) for number, part in enumerate(parts)]
    found = aggregate("svd", {"m": current}, updates)
    wanted = dense_mean(current, parts, weights)
    values = torch.linalg.svdvals(wanted)
    kept = min(max(ranks), len(values))
    error = (dense(found.adapter["m"]) - wanted).norm()
    assert error <= (values[kept:].square().sum() + NEGLIGIBLE * wanted.square().sum()).sqrt() + 1e-9 * wanted.norm()
    assert found.adapter["m"].b_OR.shape == current.b_OR.shape
    assert found.adapter["m"].a_RI.shape == current.a_RI.shape
    share = float(values[:kept].square().sum() / values.square().sum())
    if len(parts) == 1:  # taken as it is
        assert found.energy_kept is None
    else:
        assert found.energy_kept is not None and share - NEGLIGIBLE - 1e-9 <= found.energy_kept <= share + 1e-9


@pytest.mark.parametrize(("out", "into"), [(24, 40), (40, 24)])
def test_leading_blocks_hold_the_most_energy(out: int, into: int) -> None:
    """A site of rank 2 or 5 gets the best 2 or 5 components, however they are turned within."""
    stack = draw(out, into, 12, seed=3)
    full = Factors(stack.b_OR.double(), stack.a_RI.double())
    found, _, _ = truncated(full, 8, torch.randn(8, into, dtype=torch.float64), [2, 5, 8])
    values = torch.linalg.svdvals(dense(stack))
    for rank in (2, 5, 8):
        most = (values[rank:].square().sum() + NEGLIGIBLE * values.square().sum()).sqrt()
        assert values[rank:].norm() * (1 - 1e-9) <= (dense(found.top(rank)) - dense(stack)).norm() <= most


def test_new_rows_of_a_stay_near_the_sites_rows_and_can_all_train() -> None:
    """B = 0 in all but two components: the rows of A that stand for nothing yet are no zeros."""
    current = draw(30, 50, 6, seed=1)
    small = [Factors(draw(30, 50, 6, seed=2 + site).b_OR * 0.01, current.a_RI) for site in range(3)]
    for part in small:
        part.b_OR[:, 2:] = 0.0
    start = Factors(current.b_OR * 0.0, current.a_RI)
    found = aggregate("svd", {"m": start}, [Update(str(site), 1.0, {"m": part}) for site, part in enumerate(small)])
    a_RI = found.adapter["m"].a_RI
    row_norm = current.a_RI.double().square().sum(1).mean().sqrt()
    assert torch.allclose(a_RI.norm(dim=1), row_norm.expand(6))
    alike = torch.nn.functional.cosine_similarity(a_RI, current.a_RI.double(), dim=1)
    assert float(alike.min()) > 0.6


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
    wanted = dense_mean(current, parts, weights)
    assert (dense(found) - wanted).norm() <= 1e-5 * wanted.norm()
    assert half == ("b" if aggregation == "ffa" or round_number == 0 else "a")


def test_averaging_both_factors_is_not_the_mean_of_the_updates() -> None:
    """What fedit gets wrong, so that the control is known to be one."""
    current = draw(13, 21, 4, seed=5)
    parts = [draw(13, 21, 4, seed=6 + site) for site in range(3)]
    updates = [Update(str(site), 1.0, {"m": part}) for site, part in enumerate(parts)]
    found = aggregate("fedit", {"m": current}, updates)
    wanted = dense_mean(current, parts, [1.0, 1.0, 1.0])
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
    update = Update("a", 1.0, {"m": draw(15, 8, 4, seed=3), "n": draw(7, 9, 4, seed=4)})
    wanted = math.sqrt(
        sum(float((dense(update.adapter[name]) - dense(current[name].top(4))).square().sum()) for name in current)
    )
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
