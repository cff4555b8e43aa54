"""Is a difference larger than chance? Exact and small-sample statistics in plain Python: no scipy, no torch.

Two things vary when a comparison is done again: the test rows (other rows would be asked) and the seeds (another start,
another order). A method's interval and a difference between two methods count both, as far as the cells show them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
ITERATIONS = 500  # of the continued fraction, which needs about sqrt(degrees of freedom) of them
TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, its standard error, and the degrees of freedom that the error was estimated with."""

    mean: float
    error: float
    freedom: float

    def interval(self) -> tuple[float, float]:
        half = t_quantile(CONFIDENCE, self.freedom) * self.error
        return self.mean - half, self.mean + half

    def p_value(self) -> float:
        """Two-sided, of the mean being 0. Without any spread only a mean of 0 is possible by chance."""
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return t_tails(abs(self.mean) / self.error, self.freedom)


def sign_test(first_only: int, second_only: int) -> float:
    """The exact McNemar test: of the rows that set two methods apart, is the share that favours one other than half?

    Two-sided: twice the binomial tail with p = 1/2, at most 1. Rows on which both do the same say nothing about it.
    Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions", Psychometrika
    12:153; the exact form in Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91.
    """
    rows, fewer = first_only + second_only, min(first_only, second_only)
    if rows == 0:
        return 1.0
    # The terms of the tail in logarithms: 2^-rows is 0 in floating point from 1,075 rows on.
    logs = [_log_choose(rows, count) - rows * math.log(2) for count in range(fewer + 1)]
    largest = max(logs)
    return min(1.0, 2 * math.exp(largest) * math.fsum(math.exp(log - largest) for log in logs))


def _log_choose(total: int, part: int) -> float:
    return math.lgamma(total + 1) - math.lgamma(part + 1) - math.lgamma(total - part + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values made larger for how many were looked at, so that the chance of any false finding stays 5 %.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6:65.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation (n - 1) of values one a seed; None for fewer than two."""
    if len(values) < 2:
        return None
    middle = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def over_rows_and_seeds(
    rows: Sequence[float], weights: Sequence[float], by_seed: Sequence[float], *, continuity: bool
) -> Estimate:
    """A mean over rows (each row's value being its mean over seeds), with an error that counts rows and seeds.

    The variances of the two add up: that of the rows' weighted mean (the ratio estimator's, Cochran 1977, 6.4) and that
    of the seeds' means. What rows and seeds share is counted twice, which errs on the careful side (Owen 2007, "The
    pigeonhole bootstrap", Annals of Applied Statistics 1:386). Degrees of freedom are Welch's and Satterthwaite's.

    Args:
        rows: one value a row; weights: what it counts for, above 0 (1, or its tokens).
        by_seed: the same mean, of each seed alone. One seed adds nothing: the error is then that of other rows only.
        continuity: of differences between right (1) and wrong (0): adds one row for and one against, so that few
            rows that differ are not taken for certainty (Bonett and Price 2012, J. Educ. Behav. Statistics 37:479).

    Raises:
        ValueError: fewer than two rows.
    """
    if len(rows) < 2 or len(rows) != len(weights):
        raise ValueError(f"{len(rows)} rows with {len(weights)} weights")
    whole = math.fsum(weights)
    middle = math.fsum(value * weight for value, weight in zip(rows, weights, strict=True)) / whole
    squares = math.fsum((weight * (value - middle)) ** 2 for value, weight in zip(rows, weights, strict=True))
    count = len(rows)
    if continuity:
        squares, count, whole = squares + 2, count + 2, whole + 2
    return of_both(middle, count / (count - 1) * squares / whole**2, count, by_seed)


def of_both(middle: float, of_rows: float, rows: int, by_seed: Sequence[float]) -> Estimate:
    """The mean `middle` with an error that counts the variance `of_rows`, estimated from so many `rows`, and that of
    the seeds' means. Degrees of freedom as above."""
    of_seeds = (spread(by_seed) or 0.0) ** 2 / len(by_seed) if by_seed else 0.0
    both, freedom = of_rows + of_seeds, float(max(1, rows - 1))
    parts = of_rows**2 / freedom + (of_seeds**2 / (len(by_seed) - 1) if of_seeds else 0.0)
    return Estimate(middle, math.sqrt(both), both**2 / parts if parts > 0 else freedom)


def share_interval(estimate: Estimate, rows: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share whose error counts seeds as well: with as many rows as would give that error.

    With one seed it comes as near to Wilson's own as n - 1 does to n. Source: Franco, Little, Louis and Slud 2019,
    "Comparative study of confidence intervals for proportions in complex sample surveys", J. Survey Statistics and
    Methodology 7:334.
    """
    share = min(1.0, max(0.0, estimate.mean))
    variance = share * (1 - share)
    effective = variance / estimate.error**2 if variance > 0 and estimate.error > 0 else float(rows)
    z = t_quantile(CONFIDENCE, estimate.freedom)
    square = z * z / effective
    middle = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / effective + square / (4 * effective)) / (1 + square)
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def t_tails(t: float, freedom: float) -> float:
    """P(|T| >= t) of Student's distribution: I_x(freedom/2, 1/2) at x = freedom / (freedom + t^2)."""
    if freedom > 1e7:  # the normal distribution, to more digits than are shown
        return math.erfc(t / math.sqrt(2))
    # 1 - x is computed by itself: x rounds to 1 when t is small.
    square = t * t
    return _incomplete_beta(freedom / (freedom + square), square / (freedom + square), freedom / 2, 0.5)


def t_quantile(confidence: float, freedom: float) -> float:
    """t with P(|T| < t) = confidence, by bisection; 1.96 for 95 % and many degrees of freedom."""
    low, high = 0.0, 1.0
    while t_tails(high, freedom) > 1 - confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tails(middle, freedom) > 1 - confidence else (low, middle)
    return high


def _incomplete_beta(x: float, rest: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), `rest` being 1 - x.

    Source: the continued fraction 26.5.8 of Abramowitz and Stegun, evaluated as Lentz 1976 does.
    """
    if x <= 0 or rest <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(rest, x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    fraction, c, d = 1.0, 1.0, 0.0
    for step in range(ITERATIONS):
        half = step // 2
        if step == 0:
            term = 1.0
        elif step % 2 == 0:
            term = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        else:
            term = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        d = 1 / _away_from_zero(1 + term * d)
        c = _away_from_zero(1 + term / c)
        change = c * d
        fraction *= change
        if abs(change - 1) < 1e-15:
            break
    return math.exp(log_front) / a * (fraction - 1)


def _away_from_zero(number: float) -> float:
    return number if abs(number) > TINY else TINY
