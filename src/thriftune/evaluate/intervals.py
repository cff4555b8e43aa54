"""How far a score may be from the truth because only so many rows were asked."""

from __future__ import annotations

import math
from collections.abc import Sequence

from thriftune.errors import InputError

# The two-sided 95 % quantile of the standard normal distribution.
Z_95 = 1.959963984540054


def wilson(successes: int, rows: int, z: float) -> tuple[float, float]:
    """Wilson's score interval for a share: all p with |successes/rows - p| <= z sqrt(p (1 - p) / rows).

    With p' = successes / rows the ends are (p' + z^2/2n -+ z sqrt(p' (1 - p')/n + z^2/4n^2)) / (1 + z^2/n). Unlike the
    normal interval it never leaves [0, 1] and is not empty at 0 or n successes.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22:209;
    recommended for small n by Brown, Cai and DasGupta 2001, "Interval Estimation for a Binomial Proportion".

    Args:
        successes, rows: counts, 0 <= successes <= rows, rows >= 1.
        z: quantile of the normal distribution, 1.96 for 95 %.

    Returns:
        (low, high) with 0 <= low <= successes / rows <= high <= 1.

    Raises:
        ValueError: counts or z outside the ranges above.
    """
    if not (rows >= 1 and 0 <= successes <= rows and z >= 0):
        raise ValueError(f"wilson: {successes} successes of {rows} rows with z = {z}")
    share = successes / rows
    square = z * z / rows
    middle = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / rows + square / (4 * rows)) / (1 + square)
    # At the ends of the range the exact values are 0 and 1; rounding must not move them.
    low = 0.0 if successes == 0 else max(0.0, min(middle - half, share))
    high = 1.0 if successes == rows else min(1.0, max(middle + half, share))
    return low, high


def ratio_interval(sums: Sequence[float], counts: Sequence[int], z: float) -> tuple[float, float, float]:
    """A mean over tokens that come in windows: sum(sums) / sum(counts) with its normal interval.

    Tokens of one window depend on each other and windows much less, so windows are what is counted: the standard error
    is that of the ratio estimator, sqrt(W / (W - 1) * sum_w (s_w - m n_w)^2) / sum_w n_w, for W windows with sums s_w
    and counts n_w and the ratio m. (Cochran 1977, "Sampling Techniques", 6.4, without finite population correction.)

    Returns:
        (mean, low, high), low and high being mean -+ z standard errors.

    Raises:
        InputError: fewer than two windows, of which no spread can be computed.
    """
    windows = len(sums)
    if windows < 2 or len(counts) != windows or sum(counts) == 0:
        raise InputError(
            given=f"{windows} window{'s' if windows != 1 else ''} of text",
            allowed="at least 2 windows, because the interval comes from their spread",
            do="give a longer text, or for perplexity a smaller data.max_length",
        )
    tokens = sum(counts)
    mean = math.fsum(sums) / tokens
    squares = math.fsum((part - mean * count) ** 2 for part, count in zip(sums, counts, strict=True))
    error = math.sqrt(windows / (windows - 1) * squares) / tokens
    return mean, mean - z * error, mean + z * error
