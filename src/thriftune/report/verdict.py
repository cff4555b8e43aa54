"""Which method to take, and why, in one sentence: written by rules from the numbers, so that noise ranks nothing.

1. A trained variant has to beat the base by more than chance; when none does, the base is kept.
2. Of those that do, the ones from which the best differs by no more than chance are equals.
3. Of the equals the fastest is taken; among those about as fast (within a tenth, or with seeds that overlap), the one
   with the least memory; then the one that trains the fewest parameters. Times of cells that shared a device are not
   looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thriftune.records import PairTest, ReportRow, ReportValue
from thriftune.report.cells import BASE
from thriftune.report.variants import Metric, Scored, Variant, share_a_device
from thriftune.report.wording import (
    STATUS_WORDS,
    difference_range,
    difference_text,
    listed,
    p_text,
    score_text,
)
from thriftune.units import format_bytes, format_seconds

AS_FAST = 1.1  # times this far apart are about the same
MOST_NAMES = 3  # in one clause
MOST_UNSHOWN = 4  # differences to the chosen that are not shown, each a line
WORTH_SAYING = 1.05  # of memory and speed


@dataclass(frozen=True)
class Facts:
    """What the rules look at. `scores` are in the order of `variants`, None where no cell is done."""

    variants: Sequence[Variant]
    metric: Metric
    scores: Sequence[Scored | None]
    pairs: Sequence[PairTest]
    table: Sequence[ReportRow]

    def score(self, variant: Variant) -> Scored:
        found = self.scores[self.variants.index(variant)]
        if found is None:
            raise AssertionError(f"{variant.name} has no score")
        return found

    def value(self, key: str, variant: Variant) -> ReportValue | None:
        """None where the table has a dash, and for times that do not compare variants."""
        if key == "train" and share_a_device(self.variants):
            return None
        for row in self.table:
            if row.key == key:
                value = row.values[self.variants.index(variant)]
                return value if value.mean is not None else None
        return None

    def differ(self, first: Variant, second: Variant) -> bool | None:
        """Whether a difference is shown; None when it could not be tested."""
        names = {first.name, second.name}
        pair = next((pair for pair in self.pairs if {pair.first, pair.second} == names), None)
        return pair.shown if pair and pair.p_value is not None else None

    def apart(self, first: Variant, second: Variant) -> bool:
        """Whether chance is unlikely to have set them apart; where no test could be made, by intervals that do not
        overlap, which asks for more than a test does."""
        shown = self.differ(first, second)
        if shown is not None:
            return shown
        one, other = self.score(first), self.score(second)
        return one.high < other.low or other.high < one.low

    def text(self, variant: Variant) -> str:
        return score_text(self.score(variant).mean, self.metric)


def verdict(facts: Facts) -> tuple[str, Variant | None]:
    """One sentence, and the variant that it says to take."""
    done = [variant for variant, found in zip(facts.variants, facts.scores, strict=True) if found is not None]
    trained = [variant for variant in done if variant.method != BASE]
    base = next((variant for variant in done if variant.method == BASE), None)
    undone = _undone(facts.variants)
    if not done:
        return f"No verdict: {undone or 'there is no cell'}.", None
    if not trained:
        return _sentence([f"No verdict: only the base is scored ({facts.text(done[0])})"], undone), None
    worth = [variant for variant in trained if base is None or _is_better(facts, variant, base)]
    if base is not None and not worth:
        return _sentence([_keep_base(facts, base, _best(facts, trained))], undone), base
    best = _best(facts, worth)
    equals = [variant for variant in worth if variant is best or not facts.apart(best, variant)]
    chosen = _choose(facts, equals)
    clauses = [_why(facts, chosen, trained, base), *_needs(facts, chosen, equals, trained)]
    return f"Take {chosen.label}: {_sentence(clauses, undone)}", chosen


def _sentence(clauses: Sequence[str], undone: str) -> str:
    return "; ".join([*clauses, *([undone] if undone else [])]) + "."


def certainty(facts: Facts, chosen: Variant | None) -> list[str]:
    """What the verdict rests on: rows, seeds, the tests, and how large a difference to the chosen could be unseen."""
    done = [variant for variant in facts.variants if variant.done]
    trained = [variant for variant in done if variant.method != BASE]
    if not done:
        return []
    counts = {len(variant.seeds) for variant in trained}
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(next(iter(counts), 0))
    result = done[0].done[0].record.result
    rows = f"{result.rows:,}" if result else "no"
    lines = [f"{rows} test rows; {seeds} seed{'s' if seeds != '1' else ''} a method."]
    if counts and max(counts) < 2:
        lines.append("With one seed the tests compare these trained models; other seeds could rank them otherwise.")
    tested = [pair for pair in facts.pairs if pair.p_value is not None]
    labels = {variant.name: variant.label for variant in facts.variants}
    unshown = [
        _unshown(pair, labels, facts.metric, len(tested))
        for pair in tested
        if chosen is not None and chosen.name in (pair.first, pair.second) and not pair.shown and pair.low is not None
    ]
    lines += unshown[:MOST_UNSHOWN]
    if len(unshown) > MOST_UNSHOWN:
        lines.append(f"Nor is one shown between it and {len(unshown) - MOST_UNSHOWN} more: see the differences below.")
    if tested:
        lines.append(
            f"A difference counts as shown when its p-value, corrected by Holm's method for {len(tested)} "
            f"pair{'s' if len(tested) != 1 else ''}, is below 0.05."
        )
    return lines


def _unshown(pair: PairTest, labels: dict[str, str], metric: Metric, pairs: int) -> str:
    """'No difference shown between full and LoRA (p = 0.4): the true one lies between -0.1 and +0.4 points ...'"""
    low, high = pair.low or 0.0, pair.high or 0.0
    reach = difference_range(low, high, metric).replace(" to ", " and ")
    unit = difference_text(0.0, metric).partition(" ")[2]
    line = f"No difference shown between {labels[pair.first]} and {labels[pair.second]} (p = {_adjusted(pair)}): "
    line += f"the true one lies between {reach} {unit}".rstrip() + " with 95 % confidence."
    if low > 0 or high < 0:
        line += f" Alone that would count; of {pairs} pairs looked at, one such may be chance."
    return line


def _adjusted(pair: PairTest) -> str:
    return p_text(pair.adjusted_p_value) if pair.adjusted_p_value is not None else "-"


def _best(facts: Facts, trained: Sequence[Variant]) -> Variant:
    sign = -1 if facts.metric.higher_is_better else 1
    return min(trained, key=lambda variant: sign * facts.score(variant).mean)


def _beats(facts: Facts, first: Variant, second: Variant) -> bool:
    return facts.metric.better(facts.score(first).mean, facts.score(second).mean)


def _is_better(facts: Facts, first: Variant, second: Variant) -> bool:
    return facts.apart(first, second) and _beats(facts, first, second)


def _keep_base(facts: Facts, base: Variant, best: Variant) -> str:
    numbers = f"{facts.text(best)} with {best.label}, {facts.text(base)} without training"
    if facts.apart(best, base):
        return f"Keep the base: training made it worse ({numbers})"
    if facts.differ(best, base) is None:
        return f"Keep the base, or test further: no method's interval lies clear of its own (the best has {numbers})"
    return f"Keep the base: no difference from it shown for any method (the best has {numbers})"


def _choose(facts: Facts, equals: Sequence[Variant]) -> Variant:
    times = {variant.name: facts.value("train", variant) for variant in equals}
    known = [variant for variant in equals if times[variant.name] is not None]
    if known:
        fastest = min(known, key=lambda variant: _mean(times[variant.name]))
        fast = [variant for variant in known if not _slower(times[variant.name], times[fastest.name])]
    else:
        fast = list(equals)

    def needs(variant: Variant) -> tuple[float, float]:
        return _mean(facts.value("peak_measured", variant)), _mean(facts.value("trainable", variant))

    return min(fast, key=needs)


def _mean(value: ReportValue | None) -> float:
    return value.mean if value is not None and value.mean is not None else float("inf")


def _slower(value: ReportValue | None, than: ReportValue | None, factor: float = AS_FAST) -> bool:
    """Clearly more: by `factor` in the mean, and with every seed."""
    if value is None or than is None or not value.by_seed or not than.by_seed:
        return False
    return _mean(value) > factor * _mean(than) and min(value.by_seed.values()) > max(than.by_seed.values())


def _why(facts: Facts, chosen: Variant, trained: Sequence[Variant], base: Variant | None) -> str:
    """The scores: what it equals, what it beats, and the base."""
    parts = []
    others = [variant for variant in trained if variant is not chosen] + ([base] if base is not None else [])
    same = [variant for variant in trained if variant is not chosen and facts.differ(chosen, variant) is False]
    worse = [variant for variant in others if facts.differ(chosen, variant) and _beats(facts, chosen, variant)]
    unknown = [variant for variant in others if facts.differ(chosen, variant) is None]
    own = [facts.text(chosen)]
    if len(trained) == 1:
        parts.append(f"the only method that was trained and scored ({own[0]})")
        own = []
    if same:
        parts.append(f"no difference from {_labels(same)} shown ({_against_texts(facts, own, same)})")
        own = []
    if worse:
        parts.append(f"better than {_labels(worse)} ({_against_texts(facts, own, worse)})")
        own = []
    if unknown:
        parts.append(f"not tested against {_labels(unknown)} ({_against_texts(facts, own, unknown)})")
    return ", ".join(parts)


def _labels(variants: Sequence[Variant]) -> str:
    """Names, or how many others where there are too many for a sentence."""
    if len(variants) > MOST_NAMES:
        return f"{len(variants)} others"
    return listed(["the base" if variant.method == BASE else variant.label for variant in variants])


def _against_texts(facts: Facts, own: Sequence[str], others: Sequence[Variant]) -> str:
    """'92.8 against 92.8 and 91.0 %'; without `own`, which was said before, '92.8 and 91.0 %'."""
    unit = " %" if facts.metric.as_percent else ""
    if len(others) > MOST_NAMES:
        texts = [facts.text(_best(facts, others)).removesuffix(unit)]
        told = f"{texts[0]}{unit} the best of them"
        return " against ".join([*own, told])
    texts = [facts.text(variant).removesuffix(unit) for variant in others]
    return " against ".join([*(text.removesuffix(unit) for text in own), listed(texts)]) + unit


def _needs(facts: Facts, chosen: Variant, equals: Sequence[Variant], trained: Sequence[Variant]) -> list[str]:
    """Memory and speed against the equal that needs most memory, and who needs less than the chosen."""
    clauses = []
    own_memory, own_time = facts.value("peak_measured", chosen), facts.value("train", chosen)
    others = [variant for variant in equals if variant is not chosen] or [v for v in trained if v is not chosen]
    if others and own_memory is not None:
        heaviest = max(others, key=lambda variant: _known(facts.value("peak_measured", variant)))
        clauses += _against(facts, chosen, heaviest)
    lighter = [
        variant
        for variant in trained
        if variant is not chosen and _slower(own_memory, facts.value("peak_measured", variant), WORTH_SAYING)
    ]
    least = min(lighter, key=lambda variant: _mean(facts.value("peak_measured", variant)), default=None)
    faster = [variant for variant in trained if _slower(own_time, facts.value("train", variant), AS_FAST)]
    first = min(faster, key=lambda variant: _mean(facts.value("train", variant)), default=None)
    sizes = durations = ""
    if least is not None:
        sizes = f"{format_bytes(_mean(facts.value('peak_measured', least)))} against {format_bytes(_mean(own_memory))}"
    if first is not None:
        durations = f"{format_seconds(_mean(facts.value('train', first)))} against {format_seconds(_mean(own_time))}"
    if least is not None and least is first:
        return [*clauses, f"{least.label} needs the least memory and time ({sizes}, {durations})"]
    clauses += [f"{least.label} needs the least memory ({sizes})"] if least is not None else []
    clauses += [f"{first.label} is the fastest ({durations})"] if first is not None else []
    return clauses


def _known(value: ReportValue | None) -> float:
    return value.mean if value is not None and value.mean is not None else 0.0


def _against(facts: Facts, chosen: Variant, other: Variant) -> list[str]:
    """'19 % less memory and 1.3 x the speed of full'; nothing where neither is worth a number."""
    parts = []
    ours, theirs = facts.value("peak_measured", chosen), facts.value("peak_measured", other)
    if ours and theirs and _mean(theirs) > WORTH_SAYING * _mean(ours):
        parts.append(f"{100 * (1 - _mean(ours) / _mean(theirs)):.0f} % less memory")
    ours, theirs = facts.value("train", chosen), facts.value("train", other)
    if _slower(theirs, ours, WORTH_SAYING):
        parts.append(f"{_mean(theirs) / _mean(ours):.1f} x the speed")
    if not parts:
        return []
    return [f"{' and '.join(parts)} {'of' if 'speed' in parts[-1] else 'than'} {other.label}"]


def _undone(variants: Sequence[Variant]) -> str:
    """'full ran out of memory', 'QLoRA and full were ...' of the variants of which no cell is done."""
    states: dict[str, list[str]] = {}
    for variant in variants:
        if not variant.done and variant.cells:
            words = " and ".join(dict.fromkeys(STATUS_WORDS[cell.record.status] for cell in variant.cells))
            states.setdefault(words, []).append(variant.label)
    return "; ".join(f"{listed(labels)} {words}" for words, labels in states.items())
