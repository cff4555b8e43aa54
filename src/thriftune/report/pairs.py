"""Every two variants on the same test rows: is one better than the other, or is no difference shown?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from thriftune.records import PairTest
from thriftune.report.statistics import Estimate, holm, mean, over_rows_and_seeds, sign_test
from thriftune.report.variants import Metric, Variant, row_scores, seed_of

ALPHA = 0.05
SAME = 1e-12  # a difference of means that is rounding
RowScores = dict[int, tuple[float, float]]


def all_row_scores(variants: Sequence[Variant]) -> dict[str, RowScores]:
    return {cell.key: row_scores(cell) for variant in variants for cell in variant.done}


def compare_pairs(variants: Sequence[Variant], metric: Metric, rows: dict[str, RowScores]) -> list[PairTest]:
    """Every pair of variants with a score, with Holm's correction over all that could be tested.

    With one seed it is the exact McNemar test (a t test over rows for marks and losses): it says whether these two
    trained models differ. With several seeds, taken in pairs of the same seed, a difference must be larger than what
    other rows (the exact test, on the rows where one did better in the mean over its seeds) and other seeds (a t test
    whose error counts rows and seeds) would give: the larger p-value of the two counts.
    """
    found = [_test(first, second, metric, rows) for first, second in combinations(variants, 2)]
    tested = [pair for pair in found if pair.p_value is not None]
    adjusted = iter(holm([pair.p_value for pair in tested if pair.p_value is not None]))
    return [
        pair
        if pair.p_value is None
        else pair.model_copy(update={"adjusted_p_value": (value := next(adjusted)), "shown": value < ALPHA})
        for pair in found
    ]


def _test(first: Variant, second: Variant, metric: Metric, rows: dict[str, RowScores]) -> PairTest:
    seeds = _common_seeds(first, second)
    pairs = [(rows[first.by_seed(seed).key], rows[second.by_seed(seed).key]) for seed in seeds]
    if not pairs:
        return _untested(first, second, "not tested: no seed in common")
    ours, _ = pairs[0]
    if len(ours) < 2 or any(table.keys() != ours.keys() for pair in pairs for table in pair):
        return _untested(first, second, "not tested: the answers of each row are not there")
    numbers = list(ours)
    weights = [ours[number][1] for number in numbers]
    by_row = [mean([one[number][0] - other[number][0] for one, other in pairs]) for number in numbers]
    by_seed = [_weighted([one[number][0] - other[number][0] for number in numbers], weights) for one, other in pairs]
    higher = sum(difference > SAME for difference in by_row)
    lower = sum(difference < -SAME for difference in by_row)
    of_answers = all(score in (0.0, 1.0) for pair in pairs for table in pair for score, _ in table.values())
    shown = over_rows_and_seeds(by_row, weights, by_seed, continuity=of_answers)
    low, high = shown.interval()
    if of_answers:  # no true difference of two shares lies beyond
        low, high = max(low, -1.0), min(high, 1.0)
    better, worse = (higher, lower) if metric.higher_is_better else (lower, higher)
    p_value, test = _p_value(by_row, weights, by_seed, (higher, lower), of_answers)
    return PairTest(
        first=first.name,
        second=second.name,
        seeds=[seed for seed in seeds if seed != "None"],
        rows=len(numbers),
        first_better=better,
        second_better=worse,
        difference=mean(by_seed),
        low=low,
        high=high,
        p_value=p_value,
        test=test,
    )


def _p_value(
    by_row: Sequence[float],
    weights: Sequence[float],
    by_seed: Sequence[float],
    signs: tuple[int, int],
    of_answers: bool,
) -> tuple[float, str]:
    exact = sign_test(*signs) if of_answers else 0.0
    if of_answers and len(by_seed) == 1:
        return exact, "exact McNemar test"
    counted: Estimate = over_rows_and_seeds(by_row, weights, by_seed, continuity=False)
    p_value = max(exact, counted.p_value())
    of_seeds = f" and {len(by_seed)} seeds" if len(by_seed) > 1 else ""
    return p_value, f"{'exact sign test and ' if of_answers else ''}t test over rows{of_seeds}"


def _common_seeds(first: Variant, second: Variant) -> list[str]:
    """The seeds to pair by; a variant without seeds (the base) goes with each of the other's."""
    if not first.done or not second.done:
        return []
    if not first.seeds or not second.seeds:
        return first.seeds or second.seeds or [seed_of(first.done[0])]
    return [seed for seed in first.seeds if seed in second.seeds]


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    return mean([value * weight for value, weight in zip(values, weights, strict=True)]) / mean(weights)


def _untested(first: Variant, second: Variant, why: str) -> PairTest:
    return PairTest(
        first=first.name,
        second=second.name,
        seeds=[],
        rows=0,
        first_better=0,
        second_better=0,
        difference=None,
        low=None,
        high=None,
        p_value=None,
        test=why,
    )
