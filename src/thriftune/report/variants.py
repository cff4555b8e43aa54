"""Cells grouped into the columns of the table, the metric they are judged by, and what each scored on each row."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from thriftune.plan.show import ARTICLE_NAMES
from thriftune.records import EvalResult
from thriftune.report.cells import BASE, Cell
from thriftune.report.statistics import mean, of_both, over_rows_and_seeds, share_interval, spread

ORDER = ("full", "lora", "qlora", "dynamic")
LOWER_IS_BETTER = ("perplexity", "loss", "bits_per_byte", "bits per byte", "error", "wer", "cer", "brier")
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Metric:
    """`logarithmic`: means, spreads and tests are of its logarithm, the loss in nats a token (perplexity)."""

    name: str
    higher_is_better: bool
    as_percent: bool
    logarithmic: bool

    def inner(self, value: float) -> float:
        return math.log(value) if self.logarithmic else value

    def outer(self, value: float) -> float:
        return math.exp(min(value, 700.0)) if self.logarithmic else value

    def better(self, first: float, second: float) -> bool:
        return first > second if self.higher_is_better else first < second


def metric_of(results: Sequence[EvalResult]) -> Metric:
    """The results' metric. Shares and marks from 0 to 1 are shown in percent. Whether more is better is what the task
    says; where it does not, the metric's name tells."""
    name = results[0].metric
    said = results[0].details.get("higher_is_better")
    lower = any(word in name.lower() for word in LOWER_IS_BETTER) if said is None else not said
    shares = not lower and all(0 <= result.low <= result.value <= result.high <= 1 for result in results)
    positive = all(result.value > 0 for result in results)
    return Metric(name, not lower, shares, "perplexity" in name.lower() and positive)


@dataclass(frozen=True)
class Variant:
    """Cells that differ by their seed only, in the order of their seeds."""

    name: str
    label: str
    method: str
    cells: tuple[Cell, ...]

    @cached_property
    def done(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.done]

    @property
    def seeds(self) -> list[str]:
        return [seed_of(cell) for cell in self.done if cell.record.seed is not None]

    def by_seed(self, seed: str) -> Cell:
        """The done cell of this seed; of a variant without seeds, its one cell."""
        return next(cell for cell in self.done if cell.record.seed is None or seed_of(cell) == seed)


def share_a_device(variants: Sequence[Variant]) -> bool:
    """Whether cells ran beside others on one device: their times then tell of the company, not of the method."""
    return any(cell.record.sharing for variant in variants for cell in variant.done)


def seed_of(cell: Cell) -> str:
    return str(cell.record.seed)


def group(cells: Sequence[Cell]) -> list[Variant]:
    """Full, lora, qlora, other methods, and the base last; within a method by name, r=8 before r=16."""
    names = dict.fromkeys(cell.record.variant for cell in cells)
    methods = {cell.record.variant: cell.record.method for cell in cells}
    place = {method: number for number, method in enumerate(ORDER)} | {BASE: len(ORDER) + 1}
    ordered = sorted(names, key=lambda name: (place.get(methods[name], len(ORDER)), _natural(name)))
    labels = [label_of(name, methods[name]) for name in ordered]
    variants = []
    for name, label in zip(ordered, labels, strict=True):
        own = [cell for cell in cells if cell.record.variant == name]
        own.sort(key=lambda cell: (cell.record.seed is not None, cell.record.seed or 0))
        unique = label if labels.count(label) == 1 else name
        variants.append(Variant(name, unique, methods[name], tuple(own)))
    return variants


def _natural(name: str) -> list[tuple[float, str]]:
    """A key that sorts numbers by their size."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", name)
    return [(float(part), "") if place % 2 else (0.0, part) for place, part in enumerate(parts)]


def label_of(variant: str, method: str) -> str:
    """'lora lora.r=8' -> 'LoRA r=8': the method's usual name, and options without their section."""
    words = [word.rsplit(".", 1)[-1] if "=" not in word else _short(word) for word in variant.split(" ")[1:]]
    return " ".join([ARTICLE_NAMES.get(method, method), *words])


def _short(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.rsplit(".", 1)[-1] + equals + value


def row_scores(cell: Cell) -> dict[int, tuple[float, float]]:
    """Row -> (what it scored, what it counts for): its mark, else 1 or 0 for a right or wrong answer, each counting 1;
    of perplexity a window's loss and its tokens. Empty where the answers are missing or of another kind."""
    scores: dict[int, tuple[float, float]] = {}
    for answer in cell.answers:
        row = answer.get("row")
        if not isinstance(row, int):
            return {}
        mark = answer.get("score", answer.get("correct"))
        if isinstance(mark, bool | int | float):
            scores[row] = (float(mark), 1.0)
        elif isinstance(answer.get("loss"), int | float) and isinstance(answer.get("tokens"), int):
            scores[row] = (float(answer["loss"]), float(answer["tokens"]))
        else:
            return {}
    return scores


@dataclass(frozen=True)
class Scored:
    """A variant's score over its seeds. `by_seed` is in the metric's own unit, the interval counts rows and seeds."""

    mean: float
    spread: float | None
    low: float
    high: float
    by_seed: dict[str, float]


def score(variant: Variant, metric: Metric, rows: dict[str, dict[int, tuple[float, float]]]) -> Scored:
    """`rows` are `row_scores` of each cell by its key. The variant has at least one done cell."""
    results = {cell.key: cell.record.result for cell in variant.done if cell.record.result}
    by_seed = {seed_of(cell): results[cell.key].value for cell in variant.done}
    if len(results) == 1:
        only = next(iter(results.values()))
        return Scored(only.value, None, only.low, only.high, by_seed)
    inner = [metric.inner(value) for value in by_seed.values()]
    tables = [rows[key] for key in results]
    if all(len(table) > 1 and table.keys() == tables[0].keys() for table in tables):
        numbers = list(tables[0])
        means = [mean([table[number][0] for table in tables]) for number in numbers]
        weights = [tables[0][number][1] for number in numbers]
        estimate = over_rows_and_seeds(means, weights, inner, continuity=False)
        count = len(numbers)
    else:  # without the answers, each seed's interval says what other rows would do
        errors = [
            (metric.inner(result.high) - metric.inner(result.low)) / (2 * Z_95)
            for result in results.values()
            if result.low > 0 or not metric.logarithmic
        ]
        count = min(result.rows for result in results.values())
        estimate = of_both(mean(inner), mean(errors) ** 2 if errors else 0.0, count, inner)
    low, high = share_interval(estimate, count) if metric.as_percent else estimate.interval()
    middle = mean(list(by_seed.values())) if not metric.logarithmic else metric.outer(mean(inner))
    return Scored(middle, spread(list(by_seed.values())), metric.outer(low), metric.outer(high), by_seed)
