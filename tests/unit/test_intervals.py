"""Wilson's interval against published values and its own definition; the interval of a mean over windows."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thriftune.errors import InputError
from thriftune.evaluate.intervals import Z_95, ratio_interval, wilson


@pytest.mark.parametrize(
    ("successes", "rows", "low", "high"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0000),
    ],
)
def test_wilson_gives_published_values(successes, rows, low, high):
    assert wilson(successes, rows, Z_95) == pytest.approx((low, high), abs=5e-5)


counts = st.integers(1, 100_000).flatmap(lambda rows: st.tuples(st.integers(0, rows), st.just(rows)))


@given(counts, st.floats(0, 6))
def test_wilson_stays_in_range_around_the_share(count, z):
    successes, rows = count
    low, high = wilson(successes, rows, z)
    assert 0 <= low <= successes / rows <= high <= 1


@given(counts)
def test_wilson_is_symmetric_and_its_ends_are_z_errors_away(count):
    successes, rows = count
    low, high = wilson(successes, rows, Z_95)
    assert wilson(rows - successes, rows, Z_95) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    for end in (low, high):
        if 0 < end < 1:
            error = math.sqrt(end * (1 - end) / rows)
            assert abs(successes / rows - end) == pytest.approx(Z_95 * error, rel=1e-6, abs=1e-12)


@given(st.integers(0, 50), st.integers(2, 40))
def test_wilson_narrows_with_more_rows(successes, factor):
    few = wilson(successes, 50, Z_95)
    many = wilson(successes * factor, 50 * factor, Z_95)
    assert many[1] - many[0] < few[1] - few[0]


def test_wilson_holds_the_truth_about_95_times_in_100():
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        successes = sum(draw.random() < 0.8 for _ in range(60))
        low, high = wilson(successes, 60, Z_95)
        held += low <= 0.8 <= high
    assert 0.93 <= held / 2000 <= 0.97


@pytest.mark.parametrize(("successes", "rows", "z"), [(1, 0, 2.0), (-1, 5, 2.0), (6, 5, 2.0), (1, 5, -1.0)])
def test_wilson_refuses_impossible_counts(successes, rows, z):
    with pytest.raises(ValueError, match="wilson"):
        wilson(successes, rows, z)


def test_with_equal_windows_the_ratio_interval_is_that_of_a_mean():
    sums = [10.0, 14.0, 9.0, 12.0]
    mean, low, high = ratio_interval(sums, [5] * 4, Z_95)
    error = statistics.stdev(part / 5 for part in sums) / 2
    assert (mean, low, high) == pytest.approx((2.25, 2.25 - Z_95 * error, 2.25 + Z_95 * error))


def test_a_short_window_weighs_little():
    mean, low, high = ratio_interval([200.0, 202.0, 198.0, 9.0], [100, 100, 100, 1], Z_95)
    assert mean == pytest.approx(609 / 301)
    assert high - low < 0.15


def test_one_window_has_no_spread():
    with pytest.raises(InputError, match="1 window of text"):
        ratio_interval([3.0], [2], Z_95)
