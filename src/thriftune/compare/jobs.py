"""What the comparing process hands to its children and gets back. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thriftune.recipe import Recipe
from thriftune.records import PlannedMethod


@dataclass(frozen=True)
class Question:
    """What every cell is asked: the task with its split and rows, and the general text (None: the package's own)."""

    task: str
    split: str
    limit: int | None
    general_text: str | None


@dataclass(frozen=True)
class CellJob:
    """Train and score one cell. `command` goes into the run's record; `force` trains what the plan says cannot fit.

    `at_once`: cells that run at once, this one among them; `sharing`: others of them on its device.
    """

    folder: Path
    method: str
    variant: str
    seed: int | None
    overrides: dict[str, Any]
    recipe: Recipe
    plan: PlannedMethod | None
    question: Question
    force: bool
    command: str
    at_once: int
    sharing: int


@dataclass(frozen=True)
class PlanJob:
    """`recipes`: variant -> its recipe, all on the same rows; the base model's alone when nothing is trained.

    `task_is_named`: False where the question's task is the data's name, for want of another.
    """

    recipes: Mapping[str, Recipe]
    question: Question
    task_is_named: bool


@dataclass(frozen=True)
class Planned:
    """`plans`: variant -> its plan on this machine, None where none can be made; then `notes` says why."""

    rows: int
    steps: int
    data: str
    device: str
    plans: dict[str, PlannedMethod | None]
    notes: list[str]


@dataclass(frozen=True)
class RateJob:
    """One run of the learning-rate search; `at_once` such run, this one among them."""

    recipe: Recipe
    force: bool
    command: str
    at_once: int


@dataclass(frozen=True)
class Asked:
    """The verb's words and options as given. `command` is the whole line, for the records."""

    words: Sequence[str]
    config: Path | None
    values: dict[str, Any]
    methods: Sequence[str]
    seeds: str
    task: str | None
    split: str
    limit: int | None
    general_text: str | None
    output: Path | None
    searches: bool
    at_once: int
    tries_at_once: int
    gpu: str | None
    budget_usd: float | None
    budget_hours: float | None
    force: bool
    command: str
