"""The report's statistics against exact enumeration, known tables, and simulated comparisons without a difference."""

import math
import random
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thriftune.evaluate.intervals import Z_95, wilson
from thriftune.report.statistics import (
    Estimate,
    holm,
    over_rows_and_seeds,
    share_interval,
    sign_test,
    spread,
    t_quantile,
    t_tails,
)


@given(st.integers(0, 7), st.integers(0, 7))
def test_the_sign_test_is_the_share_of_coin_tosses_as_uneven(first: int, second: int) -> None:
    rows = first + second
    uneven = abs(first - second)
    tosses = [sum(toss) for toss in product((1, -1), repeat=rows)]
    exact = Fraction(sum(abs(toss) >= uneven for toss in tosses), len(tosses))
    assert sign_test(first, second) == pytest.approx(float(exact), abs=1e-12)


def test_the_sign_test_of_many_rows_does_not_run_out_of_digits() -> None:
    assert sign_test(2500, 2500) == 1.0
    assert 0 < sign_test(2400, 2600) < 0.01
    normal = math.erfc(abs(2400 - 2600) / math.sqrt(5000) / math.sqrt(2))
    assert sign_test(2400, 2600) == pytest.approx(normal, rel=0.06)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (30, 2.0423), (120, 1.9799), (1e9, 1.95996)]
)
def test_student_quantiles_are_those_of_the_tables(freedom: float, quantile: float) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(quantile, abs=1e-4)


@given(st.floats(0.01, 30), st.floats(1, 400))
def test_student_tails_are_the_area_under_the_density(t: float, freedom: float) -> None:
    """By Simpson's rule in the angle t = sqrt(freedom) tan(angle), where the density is a power of the cosine."""
    angle, steps = math.atan(t / math.sqrt(freedom)), 2000
    width = angle / steps
    heights = [math.cos(number * width) ** (freedom - 1) for number in range(steps + 1)]
    area = width / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    assert t_tails(t, freedom) == pytest.approx(1 - 2 * math.exp(log_scale) * area, abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_finds_what_its_steps_find(p_values: list[float]) -> None:
    """The procedure as it was written: from the smallest on, until one is not below 5 % of what is left."""
    found: set[int] = set()
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        if p_values[index] * (len(p_values) - place) >= 0.05:
            break
        found.add(index)
    assert {index for index, value in enumerate(holm(p_values)) if value < 0.05} == found
    assert all(value >= raw for value, raw in zip(holm(p_values), p_values, strict=True))


@given(st.integers(20, 400), st.data())
def test_one_seed_gives_nearly_wilsons_interval(rows: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, rows))
    scores = [1.0] * right + [0.0] * (rows - right)
    estimate = over_rows_and_seeds(scores, [1.0] * rows, [right / rows], continuity=False)
    low, high = share_interval(estimate, rows)
    assert (low, high) == pytest.approx(wilson(right, rows, Z_95), abs=0.5 / rows)
    assert 0 <= low <= right / rows <= high <= 1


def test_seeds_that_differ_make_the_interval_wider() -> None:
    rows = [1.0] * 900 + [0.0] * 100
    alike = share_interval(over_rows_and_seeds(rows, [1.0] * 1000, [0.9, 0.9, 0.9], continuity=False), 1000)
    apart = share_interval(over_rows_and_seeds(rows, [1.0] * 1000, [0.86, 0.9, 0.94], continuity=False), 1000)
    assert apart[0] < alike[0] < 0.9 < alike[1] < apart[1]


def test_rows_count_by_their_weight() -> None:
    estimate = over_rows_and_seeds([1.0, 3.0], [3.0, 1.0], [], continuity=False)
    assert estimate.mean == 1.5
    assert estimate.error == pytest.approx(math.sqrt(2 / 1 * (1.5**2 + 1.5**2)) / 4)


def test_fewer_than_two_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="1 rows"):
        over_rows_and_seeds([1.0], [1.0], [1.0], continuity=False)


def test_no_spread_is_no_certainty_about_nothing() -> None:
    assert Estimate(0.0, 0.0, 9).p_value() == 1.0
    assert Estimate(0.1, 0.0, 9).p_value() == 0.0
    assert spread([1.0]) is None
    assert spread([1.0, 3.0]) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("of_seed", [0.0, 0.01, 0.03])
def test_methods_that_do_not_differ_are_seldom_found_to(of_seed: float) -> None:
    """Two methods whose seeds move the share of right answers by `of_seed`, compared 300 times on 400 rows."""
    chance = random.Random(5)
    found = 0
    for _ in range(300):
        hard = [chance.random() for _ in range(400)]
        seeds = []
        for _ in range(3):
            shifts = (chance.gauss(0, of_seed), chance.gauss(0, of_seed))
            one, other = ([row + 0.1 * chance.gauss(0, 1) + shift < 0.85 for row in hard] for shift in shifts)
            seeds.append([a - b for a, b in zip(one, other, strict=True)])
        rows = [sum(row) / 3 for row in zip(*seeds, strict=True)]
        by_seed = [sum(seed) / 400 for seed in seeds]
        found += over_rows_and_seeds(rows, [1.0] * 400, by_seed, continuity=False).p_value() < 0.05
    assert found / 300 < 0.08
