"""The built-in word problems: one to three steps with small numbers, marked like gsm8k's answers."""

from __future__ import annotations

from thriftune.evaluate.tasks.gsm8k import parse_number
from thriftune.evaluate.tasks.task import Task

TASK = Task(
    name="sums",
    data="sums",
    split="test",
    metric="accuracy",
    max_new_tokens=128,
    choices=None,
    parse=parse_number,
)
