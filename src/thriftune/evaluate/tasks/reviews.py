"""The built-in reviews: short made texts about films, books and more, marked like imdb's."""

from __future__ import annotations

from thriftune.evaluate.tasks.imdb import LABELS, parse_label
from thriftune.evaluate.tasks.task import Task

TASK = Task(
    name="reviews",
    data="reviews",
    split="test",
    metric="accuracy",
    max_new_tokens=8,
    choices=LABELS,
    parse=parse_label,
)
