"""What the ways to score share: what is asked, what comes of it, which rows, and the interval."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from thriftune.evaluate.intervals import Z_95, ratio_interval, wilson
from thriftune.infer.batching import Progress, ProgressCallback
from thriftune.recipe import DataRecipe, GenerationRecipe

# Which rows `limit` draws, and what sampled answers are drawn with: the same for every model, or scores would differ
# for reasons that are not the model's.
SUBSET_SEED = 0
ANSWER_SEED = 0


@dataclass
class Asked:
    """What an evaluation is done with. `events` collects what happened on the way (memory that ran out)."""

    model: Any
    tokenizer: Any
    data: DataRecipe
    settings: GenerationRecipe
    limit: int | None
    split: str | None
    on_progress: ProgressCallback
    events: list[str] = field(default_factory=list)

    def progress(self, progress: Progress) -> None:
        if progress.event:
            self.events.append(progress.event)
        self.on_progress(progress)


@dataclass(frozen=True)
class Score:
    """What a task found, before it becomes a record."""

    metric: str
    value: float
    low: float
    high: float
    answers: list[dict[str, Any]]
    details: dict[str, Any]


def draw_subset(total: int, limit: int | None) -> list[int]:
    """Which of `total` rows are asked, in their order: all, or `limit` of them by a fixed seed."""
    if limit is None or limit >= total:
        return list(range(total))
    return sorted(random.Random(SUBSET_SEED).sample(range(total), limit))


def share(right: Sequence[bool]) -> dict[str, float]:
    """Share of right answers with Wilson's 95 % interval: `value`, `low`, `high`."""
    low, high = wilson(sum(right), len(right), Z_95)
    return {"value": sum(right) / len(right), "low": low, "high": high}


def mean_of_marks(marks: Sequence[float]) -> tuple[dict[str, float], str]:
    """Mean of marks from 0 to 1 with its 95 % interval, and which interval that is, in words.

    Marks that are all 0 or 1 are a share and get Wilson's. Others get the normal interval of their mean, cut to [0, 1]:
    with the some hundred rows that a test has it is as good as a bootstrap, and the same numbers come out every time.
    Marks that are all the same part of 1 (or a single one) say nothing about the spread: the interval is [0, 1].
    """
    if all(mark in (0, 1) for mark in marks):
        return share([mark == 1 for mark in marks]), "Wilson's, of a share"
    if len(set(marks)) == 1:
        return {"value": marks[0], "low": 0.0, "high": 1.0}, "everything from 0 to 1, because the marks have no spread"
    value, low, high = ratio_interval(marks, [1] * len(marks), Z_95)
    return {"value": value, "low": max(0.0, low), "high": min(1.0, high)}, "normal, of a mean, within 0 and 1"
