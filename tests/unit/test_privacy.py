"""Clipping and noise: what one site can do to the mean, how much noise there is, and what it adds up to."""

from __future__ import annotations

import math

import pytest
import torch

from thriftune.errors import InputError
from thriftune.federated.aggregate import Factors, Half, Update
from thriftune.federated.privacy import epsilon_of, private_mean, secure_normal
from thriftune.recipe import FederatedRecipe, Recipe

CLIP = 0.5


def rounds(noise: float, aggregation: str = "ffa") -> FederatedRecipe:
    values = {"aggregation": aggregation, "clip_norm": CLIP, "noise_multiplier": noise}
    return Recipe.build({"federated": values}, source="the test").federated


def adapter(seed: int, scale: float = 1.0) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            scale * torch.randn(out, 3, generator=generator), scale * torch.randn(3, into, generator=generator)
        )
        for name, out, into in (("m", 7, 11), ("n", 12, 5))
    }


def moved(current: dict[str, Factors], by: dict[str, Factors], half: Half) -> dict[str, Factors]:
    return {
        name: Factors(now.b_OR + by[name].b_OR, now.a_RI)
        if half == "b"
        else Factors(now.b_OR, now.a_RI + by[name].a_RI)
        for name, now in current.items()
    }


def distance(one: dict[str, Factors], other: dict[str, Factors]) -> float:
    parts = [(one[name].b_OR - other[name].b_OR, one[name].a_RI - other[name].a_RI) for name in one]
    return math.sqrt(sum(float(part.double().square().sum()) for pair in parts for part in pair))


@pytest.mark.parametrize("half", ["a", "b"])
def test_without_noise_it_is_the_mean_of_the_clipped_changes(half: Half) -> None:
    current = adapter(1)
    small, large = adapter(2, 0.001), adapter(3, 100.0)
    updates = [Update("s", 1.0, moved(current, small, half)), Update("l", 1.0, moved(current, large, half))]
    found = private_mean(current, updates, half, rounds(0.0), sites=2)
    field = "b_OR" if half == "b" else "a_RI"
    norm = math.sqrt(sum(float(getattr(part, field).square().sum()) for part in large.values()))
    for name in current:
        change = (getattr(small[name], field) + getattr(large[name], field) * CLIP / norm) / 2
        assert torch.allclose(getattr(found[name], field), (getattr(current[name], field) + change).double(), atol=1e-5)
        other = "a_RI" if half == "b" else "b_OR"
        assert torch.equal(getattr(found[name], other), getattr(current[name], other).double())


def test_one_site_moves_the_mean_by_no_more_than_its_share_of_the_norm() -> None:
    """The sensitivity that the accountant takes for granted, for a site that sends anything, or is not there."""
    current = adapter(1)
    honest = [Update(str(site), 1.0, moved(current, adapter(2 + site, 0.1), "b")) for site in range(3)]
    without = private_mean(current, honest, "b", rounds(0.0), sites=4)
    hostile = Update("evil", 1e9, moved(current, adapter(9, 1e6), "b"))
    with_it = private_mean(current, [*honest, hostile], "b", rounds(0.0), sites=4)
    assert distance(without, with_it) == pytest.approx(CLIP / 4, rel=1e-6)


def test_the_noise_has_the_deviation_that_was_asked_for() -> None:
    current = {"m": Factors(torch.zeros(200, 50), torch.zeros(50, 3))}
    found = private_mean(current, [Update("a", 1.0, current)], "b", rounds(4.0), sites=8)
    noise = found["m"].b_OR
    assert float(noise.std()) == pytest.approx(4.0 * CLIP / 8, rel=0.05)
    assert abs(float(noise.mean())) < 0.01
    again = private_mean(current, [Update("a", 1.0, current)], "b", rounds(4.0), sites=8)
    assert not torch.equal(noise, again["m"].b_OR)


def test_normal_numbers_are_normal_and_follow_no_seed() -> None:
    torch.manual_seed(0)
    first = secure_normal([50_000])
    torch.manual_seed(0)
    assert not torch.equal(first, secure_normal([50_000]))
    below = torch.tensor([float((first < bound).double().mean()) for bound in (-2.0, -1.0, 0.0, 1.0, 2.0)])
    assert torch.allclose(below, torch.tensor([0.0228, 0.1587, 0.5, 0.8413, 0.9772]), atol=0.01)
    assert secure_normal([0, 3]).shape == (0, 3) and bool(torch.isfinite(first).all())


def renyi_epsilon(noise: float, rounds: int, delta: float) -> float:
    """The Gaussian mechanism's Renyi divergence of order a is a / (2 z^2) a round (Mironov 2017, arXiv:1702.07476);
    turned into epsilon by Canonne, Kamath and Steinke 2020 (arXiv:2004.00010), proposition 12; the least over a."""
    orders = torch.linspace(1.001, 400.0, 400_000, dtype=torch.float64)
    divergence = rounds * orders / (2 * noise**2)
    return float((divergence + torch.log1p(-1 / orders) - (math.log(delta) + orders.log()) / (orders - 1)).min())


def exact_epsilon(noise: float, rounds: int, delta: float) -> float:
    """From the exact delta of the Gaussian mechanism (Balle and Wang 2018, arXiv:1805.06530, theorem 8), by halving;
    so many rounds are one with noise / sqrt(rounds)."""
    shift = math.sqrt(rounds) / noise
    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        ends = torch.tensor([shift / 2 - middle / shift, -shift / 2 - middle / shift], dtype=torch.float64)
        first, second = torch.special.ndtr(ends).tolist()
        low, high = (middle, high) if first - math.exp(middle) * second > delta else (low, middle)
    return high


@pytest.mark.parametrize(("noise", "rounds"), [(4.0, 1), (4.0, 10), (2.0, 10), (1.0, 1), (8.0, 100)])
def test_epsilon_is_the_gaussian_mechanisms(noise: float, rounds: int) -> None:
    """The accountant tries some orders only, so it is a little above the least, and never below the exact value."""
    pytest.importorskip("dp_accounting", reason="dp-accounting (the extra federated) is not installed")
    found, least = epsilon_of(noise, rounds, 1e-5), renyi_epsilon(noise, rounds, 1e-5)
    assert least * (1 - 1e-6) <= found <= least * 1.01
    assert exact_epsilon(noise, rounds, 1e-5) < found


def test_epsilon_of_the_page_and_without_noise() -> None:
    """docs/federated.md: ten rounds with a multiplier of 2 are epsilon 8.1 at delta 1e-5."""
    pytest.importorskip("dp_accounting", reason="dp-accounting (the extra federated) is not installed")
    assert round(epsilon_of(2.0, 10, 1e-5), 1) == 8.1
    one = epsilon_of(4.0, 1, 1e-5)
    assert one < epsilon_of(4.0, 10, 1e-5) < 10 * one
    assert epsilon_of(8.0, 10, 1e-5) < epsilon_of(4.0, 10, 1e-5)
    assert epsilon_of(0.0, 10, 1e-5) == math.inf


def test_noise_where_it_would_mean_nothing_is_refused() -> None:
    from thriftune.errors import RecipeError
    from thriftune.federated.site import check_recipe

    for values, words in (
        ({"aggregation": "svd", "clip_norm": 1.0}, "rolora or ffa"),
        ({"aggregation": "ffa", "noise_multiplier": 1.0}, "clip_norm"),
    ):
        with pytest.raises(RecipeError, match=words):
            check_recipe(Recipe.build({"method": "lora", "federated": values}, source="the test"))
    with pytest.raises(InputError, match="weight_decay"):
        check_recipe(Recipe.build({"train": {"weight_decay": 0.1}}, source="the test"))
