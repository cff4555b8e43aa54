"""The plan of a run that is about to start: its own rows, this machine's memory, and whether it may start at all."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thriftune.errors import DoesNotFitError, InputError
from thriftune.model_files import read_config
from thriftune.plan.memory import OPTIMIZERS
from thriftune.plan.plan import KNOWN_METHODS, METHODS, Question, make_plan, plan_method
from thriftune.plan.search import Case, Device
from thriftune.plan.show import three_lines
from thriftune.plan.work import Rows
from thriftune.planning.devices import capped, machine_memory, read_market
from thriftune.recipe import MethodName, Recipe
from thriftune.records import GpuPlan, Plan, PlannedMethod
from thriftune.shapes import from_config
from thriftune.units import format_bytes


@dataclass(frozen=True, slots=True)
class RunPlan:
    """How a run is to go. Without a `plan` (and `chosen`), `note` says why and the recipe's own settings are taken."""

    method: MethodName
    reason: str
    rows_at_once: int
    accumulation: int
    checkpointing: bool
    optimizer: str
    plan: Plan | None = None
    chosen: PlannedMethod | None = None
    note: str = ""

    @property
    def streams(self) -> bool:
        """Whether the plan has layers streamed: the recipe says how many stay, or not all of them fit."""
        return self.chosen is not None and "layers_streamed" in self.chosen.settings

    @property
    def decision(self) -> tuple[float, ...]:
        """What all processes of a run must have decided alike, as numbers."""
        optimizer = ("auto", *OPTIMIZERS).index(self.optimizer)
        return (
            float(KNOWN_METHODS.index(self.method)),
            float(self.rows_at_once),
            float(self.checkpointing),
            float(optimizer),
        )

    def lines(self) -> list[str]:
        """What to print before the run starts."""
        if self.plan is None or self.chosen is None:
            return [self.note]
        return three_lines(self.plan.gpus[0], self.chosen)


def plan_run(recipe: Recipe, rows: Rows, folder: Path, device: Device, force: bool = False) -> RunPlan:
    """The plan of a run whose model lies in `folder`, with method auto decided: the first of lora and qlora that fits.

    Raises DoesNotFitError with the nearest thing that does when the plan does not fit the GPU, unless `force`. In a
    computer's own memory, where the system pages, only weights larger than all of it are refused.
    """
    market, device = read_market(), capped(device, recipe)
    try:
        shape = from_config(read_config(folder), recipe.model.name)
        case = Case(shape, recipe, rows)
        if device.gpu is not None and importlib.util.find_spec("triton") is None:
            device = replace(device, no_engine="Triton is not installed")
        methods = ("lora", "qlora") if recipe.method == "auto" else (recipe.method,)
        question = Question(case, methods, "balanced", True, str(folder / "config.json"))
        plan = make_plan(question, [device], market)
    except InputError as error:  # a config or targets that the planner cannot read; training may
        return _without_plan(recipe, f"no plan: {error.given}")
    found = plan.gpus[0]
    by_name = {planned.method: planned for planned in found.methods}
    name = found.recommended.method
    chosen = by_name[name] if name else min(found.methods, key=lambda planned: planned.peak_bytes)
    case.check_precision(chosen.method, device)
    if not chosen.fits and not force and (device.gpu is not None or chosen.memory["weights"] > machine_memory()[1]):
        others = [plan_method(case, method, device, market) for method in METHODS if method not in by_name]
        raise _does_not_fit(recipe, found, chosen, [planned for planned in others if planned.fits])
    settings = chosen.settings
    return RunPlan(
        method=_method_name(chosen.method),
        reason="asked for" if recipe.method != "auto" else "by the plan",
        rows_at_once=settings["per_device_train_batch_size"],
        accumulation=settings["gradient_accumulation_steps"],
        checkpointing=settings["gradient_checkpointing"] == "on",
        optimizer=recipe.train.optim if device.gpu is None else settings["optim"],
        plan=plan,
        chosen=chosen,
    )


def refuse_other_plans(differing: int, processes: int) -> None:
    """Raise InputError when so many of a run's processes have decided otherwise than the first: memory that is free
    changes, and machines differ."""
    if differing:
        raise InputError(
            given=f"{differing} of {processes} processes planned other settings than the first: the memory that they "
            "found free differs",
            allowed="one method, one per_device_train_batch_size, one gradient_checkpointing and one optim for all",
            do="name these four in the recipe, or free the same memory on every GPU",
        )


def _without_plan(recipe: Recipe, note: str) -> RunPlan:
    train = recipe.train
    return RunPlan(
        method="lora" if recipe.method == "auto" else recipe.method,
        reason="no plan could be made" if recipe.method == "auto" else "asked for",
        rows_at_once=train.per_device_train_batch_size,
        accumulation=train.gradient_accumulation_steps,
        checkpointing=train.gradient_checkpointing == "on",
        optimizer=train.optim,
        note=note,
    )


def _method_name(text: str) -> MethodName:
    names: dict[str, MethodName] = {"full": "full", "lora": "lora", "qlora": "qlora", "dynamic": "dynamic"}
    return names[text]


def _does_not_fit(
    recipe: Recipe, found: GpuPlan, closest: PlannedMethod, fitting: Sequence[PlannedMethod]
) -> DoesNotFitError:
    """`fitting` are methods that were not asked for and would fit."""
    even = "even with " if recipe.method == "auto" else ""
    ways = [f"take --method {planned.method} ({format_bytes(planned.peak_bytes)})" for planned in fitting]
    ways += [f"{closest.method} {note}" for note in closest.notes[1:]]
    return DoesNotFitError(
        given=f"{recipe.model.name} needs about {format_bytes(closest.peak_bytes)} {even}{closest.method}, at its "
        f"smallest settings; {found.gpu} has {format_bytes(closest.usable_bytes)} free",
        allowed="a run whose planned peak fits in free memory",
        do="; ".join([*ways, "or close other programs; --force tries all the same"]),
    )
