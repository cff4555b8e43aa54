"""The settings a method runs with on one GPU: what the recipe fixes stays, the rest is the fastest that fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from thriftune.catalog.rows import Gpu
from thriftune.engine.sizes import Choice, Keep
from thriftune.engine.takes import refuse_fp8
from thriftune.plan.adapter import Adapter, adapter_of
from thriftune.plan.engine import engine_case, engine_choice, least_choice, why_not_engine
from thriftune.plan.engine_memory import engine_memory
from thriftune.plan.engine_time import engine_time
from thriftune.plan.memory import memory_of, optimizers_of, setup_of
from thriftune.plan.offload import Streamed, streamed
from thriftune.plan.time import time_of
from thriftune.plan.values import Memory, Path, Time, Timed, Work
from thriftune.plan.work import Rows, work_of
from thriftune.recipe import Recipe
from thriftune.shapes import ModelShape

SHORTEST_ROWS = 16  # tokens; below that no training is worth a plan
ROWS = "per_device_train_batch_size"
STREAMING_GAIN = 0.9  # of the time of a step with all layers on the GPU: what streaming must stay under to be taken


@dataclass(frozen=True, slots=True)
class Device:
    """`count` equal GPUs, each with `usable_bytes` for the run; without a `gpu`, a computer's own memory. `no_engine`
    says why the engine does not run there, where that is for another reason than the GPU itself."""

    gpu: Gpu | None
    count: int
    usable_bytes: int
    no_engine: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked: this model, trained by this recipe, on rows of these lengths. `free` leaves rows at once and
    recomputation to the planner even where the recipe names them."""

    shape: ModelShape
    recipe: Recipe
    rows: Rows
    free: bool = False
    _works: dict[tuple[int, int], Work] = field(default_factory=dict, compare=False)
    _adapters: dict[str, Adapter] = field(default_factory=dict, compare=False)

    def work(self, rows_at_once: int, gpus: int) -> Work:
        """The work of a step with so many rows at once and the recipe's rows a step, drawn once for all methods."""
        key = (rows_at_once, gpus)
        if key not in self._works:
            self._works[key] = work_of(self.rows, self.recipe_with(rows_at_once), gpus)
        return self._works[key]

    def adapter(self, method: str) -> Adapter:
        """What `method` starts to train, matched with the model's modules once. Raises InputError for wrong targets."""
        key = method if method in ("full", "dynamic") else "lora"
        if key not in self._adapters:
            self._adapters[key] = adapter_of(self.shape, self.recipe.adapter_at_start(method), method)
        return self._adapters[key]

    @property
    def rows_a_step(self) -> int:
        """Examples an optimizer step, on each GPU."""
        train = self.recipe.train
        return train.per_device_train_batch_size * train.gradient_accumulation_steps

    def recipe_with(self, rows_at_once: int) -> Recipe:
        accumulated = self.rows_a_step // rows_at_once
        changes = {ROWS: rows_at_once, "gradient_accumulation_steps": accumulated}
        return self.recipe.model_copy(update={"train": self.recipe.train.model_copy(update=changes)})

    def engine_reason(self, method: str, device: Device) -> str | None:
        """Why such a run does not go through the engine; None when it does."""
        return device.no_engine or why_not_engine(self.shape, self.recipe, method, self.adapter(method), device.gpu)

    def check_precision(self, method: str, device: Device) -> None:
        """Raise InputError when the recipe asks for 8-bit products and the engine does not take such a run."""
        reason = self.engine_reason(method, device)
        if reason is not None:
            refuse_fp8(self.recipe, reason)

    @property
    def freed(self) -> Case:
        """The same with rows at once and recomputation left to the planner, and to the engine."""
        train = self.recipe.train.model_copy(update={"gradient_checkpointing": "auto"})
        return replace(self, recipe=self.recipe.model_copy(update={"train": train}), free=True)

    def cut_to(self, length: int) -> Case:
        """The same rows with at most `length` tokens; answers stand at a row's end and are cut last."""
        tokens = tuple(min(count, length) for count in self.rows.tokens)
        targets = tuple(min(count, length - 1) for count in self.rows.targets)
        return replace(self, rows=replace(self.rows, tokens=tokens, targets=targets), _works={})


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a method, and what it takes. `time` is None on a CPU, for which none is estimated. Through the
    engine `choice` is what it will choose for itself, and `least_bytes` what it could run in with less."""

    rows_at_once: int
    accumulation: int
    checkpointing: bool
    work: Work
    memory: Memory
    time: Time | None
    optimizer: str
    choice: Choice | None = None
    least_bytes: int | None = None
    streamed: Streamed | None = None

    @property
    def path(self) -> Path:
        return "generic" if self.choice is None else "engine"

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """The recipe options that this candidate's numbers hold for, and what the engine chooses beside them."""
        train = recipe.train
        switch = "on" if self.checkpointing else "off"
        found: dict[str, Any] = {
            ROWS: self.rows_at_once,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_checkpointing": switch if self.choice is None else train.gradient_checkpointing,
            "max_length": recipe.data.max_length,
            "optim": self.optimizer,
        }
        if train.max_steps > 0:
            found["max_steps"] = train.max_steps
        else:
            found["num_train_epochs"] = train.num_train_epochs
        if self.choice is not None:
            found |= {
                "layers_keep": self.choice.keep.words,
                "recomputes": self.choice.keep > Keep.ALL,
                "tokens_at_once": self.choice.most_tokens,
                "layers_unpacked": self.choice.held,
            }
        return found | (self.streamed.settings if self.streamed is not None else {})


Stopwatch = Callable[[str, Candidate], Timed]  # times a method, by name, with these settings


def allowed_settings(case: Case) -> Iterator[tuple[int, bool]]:
    """(rows at once, recompute), the most convenient first: as asked for; recomputing; fewer rows at once; both.

    The examples of a step stay the same, so only rows at once that divide them are tried. Rows at once that the recipe
    names, and recomputation that it switches on or off, are not changed.
    """
    train = case.recipe.train
    asked = train.per_device_train_batch_size
    if ROWS in train.model_fields_set and not case.free:
        counts = [asked]
    else:
        counts = [count for count in range(asked, 0, -1) if case.rows_a_step % count == 0]
    switch = "auto" if case.free else train.gradient_checkpointing
    switches = {"on": (True,), "off": (False,), "auto": (False, True)}[switch]
    for some in (counts[:1], counts[1:]):
        for recompute in switches:
            for count in some:
                yield count, recompute


def candidates(case: Case, method: str, device: Device) -> list[Candidate]:
    """Every way the recipe leaves open, in the order of `allowed_settings`; through the engine, which chooses for
    itself, the way that it will choose. Raises InputError for wrong targets."""
    adapter = case.adapter(method)
    optimizers = optimizers_of(case.recipe, method, device.gpu is not None)
    if case.engine_reason(method, device) is None:
        return _engine_candidates(case, method, device, optimizers)
    found = []
    for rows_at_once, recompute in allowed_settings(case):
        setup = setup_of(case.recipe, method, recompute, device.gpu is not None)
        work = case.work(rows_at_once, device.count)
        memory = memory_of(case.shape, adapter, setup, work, device.gpu)
        time = None
        if device.gpu is not None:
            time = time_of(case.shape, adapter, setup, work, device.gpu, device.count)
        accumulation = case.rows_a_step // rows_at_once
        found.append(Candidate(rows_at_once, accumulation, recompute, work, memory, time, optimizers[-1]))
    return found


def _engine_candidates(case: Case, method: str, device: Device, optimizers: Sequence[str]) -> list[Candidate]:
    """One for each optimizer. Layers are streamed where the recipe says how many stay; else where they do not fit, and
    where they do only with steps cut into so small parts that streaming is clearly faster."""
    ways = [_engine_candidate(case, method, device, name) for name in optimizers]
    if may_stream(case.recipe, method, device):
        others = [_streamed_candidate(case, method, device, name) for name in optimizers]
        if case.recipe.resident_layers is not None:
            ways = others
        else:
            fitting = [way.time.step_s for way in ways if way.time and way.memory.peak_bytes <= device.usable_bytes]
            most_s = STREAMING_GAIN * min(fitting) if fitting else math.inf
            ways += [other for other in others if other.time and other.time.step_s < most_s]
    least = min(way.least_bytes or 0 for way in ways)
    return [replace(way, least_bytes=least) for way in ways]


def _engine_candidate(case: Case, method: str, device: Device, optimizer: str) -> Candidate:
    """What the engine will choose with this memory; the least that it can run with, when that is too little."""
    gpu, rows_at_once = device.gpu, case.recipe.train.per_device_train_batch_size
    work = case.work(rows_at_once, device.count)
    setup = setup_of(case.recipe, method, False, gpu is not None, optimizer)
    engine = engine_case(case.shape, case.adapter(method), setup, gpu)
    chosen = engine_choice(engine, case.recipe, work.packed, device.usable_bytes)
    taken = engine_memory(engine, chosen, work.packed)
    least_bytes = taken.peak_bytes  # on a CPU, whose memory the engine does not count
    if gpu is not None:
        least = least_choice(engine, case.recipe, work.packed)
        smallest = engine_memory(engine, least, work.packed)
        least_bytes = smallest.peak_bytes
        if taken.peak_bytes > device.usable_bytes:
            chosen, taken = least, smallest
    time = engine_time(engine, chosen, work, gpu, device.count) if gpu is not None else None
    recomputes = chosen.keep > Keep.ALL
    accumulation = case.rows_a_step // rows_at_once
    return Candidate(rows_at_once, accumulation, recomputes, work, taken, time, optimizer, chosen, least_bytes)


def _streamed_candidate(case: Case, method: str, device: Device, optimizer: str) -> Candidate:
    """With as many layers on the GPU as this memory holds, and the others streamed."""
    rows_at_once = case.recipe.train.per_device_train_batch_size
    work = case.work(rows_at_once, device.count)
    setup = setup_of(case.recipe, method, False, device.gpu is not None, optimizer)
    way = streamed(
        engine_case(case.shape, case.adapter(method), setup, device.gpu), case.recipe, work, device.usable_bytes
    )
    accumulation = case.rows_a_step // rows_at_once
    return Candidate(
        rows_at_once, accumulation, True, work, way.memory, way.time, optimizer, way.choice, way.least_bytes, way
    )


def may_stream(recipe: Recipe, method: str, device: Device) -> bool:
    """On one GPU, with layers that keep their input alone; where memory is not counted, only if the recipe asks."""
    if method != "qlora" or recipe.offload == "off" or recipe.train.gradient_checkpointing == "off" or device.count > 1:
        return False
    return device.gpu is not None or recipe.resident_layers is not None


def choose(found: Iterable[Candidate], usable_bytes: int) -> Candidate:
    """The fastest that fits; of equally fast ones, and where no time is known, the first. The smallest if none fits."""
    found = list(found)
    fitting = [candidate for candidate in found if candidate.memory.peak_bytes <= usable_bytes]
    if fitting:
        return min(fitting, key=lambda candidate: candidate.time.step_s if candidate.time else 0.0)
    return min(found, key=lambda candidate: candidate.memory.peak_bytes)


def least_bytes(case: Case, method: str, device: Device, like: Candidate) -> int:
    """Bytes at the peak with the smallest settings: those of `like`, or the engine's least."""
    if case.engine_reason(method, device) is None:
        return min(way.least_bytes or 0 for way in candidates(case, method, device))
    adapter = case.adapter(method)
    setup = setup_of(case.recipe, method, like.checkpointing, device.gpu is not None)
    return memory_of(case.shape, adapter, setup, case.work(like.rows_at_once, device.count), device.gpu).peak_bytes


def longest_that_fits(case: Case, method: str, device: Device, smallest: Candidate) -> int | None:
    """The largest max_length with which the smallest setting fits, found by bisection; None when none does."""

    def fits(length: int) -> bool:
        return least_bytes(case.cut_to(length), method, device, smallest) <= device.usable_bytes

    low, high = SHORTEST_ROWS, max(case.rows.tokens)
    if high <= low or not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low - low % 64 if low >= 128 else low


def smallest_gpu(case: Case, method: str, gpus: Iterable[Gpu], smallest: Candidate) -> Gpu | None:
    """The GPU with the least memory on which the smallest setting fits. Unified memory is left out: no 4-bit kernels,
    and nothing of ours runs there yet."""
    for gpu in sorted(gpus, key=lambda gpu: (gpu.usable_bytes, gpu.key)):
        if gpu.unified_memory or gpu.usable_bytes < smallest.memory.parts["weights"]:
            continue
        if least_bytes(case, method, Device(gpu, 1, gpu.usable_bytes), smallest) <= gpu.usable_bytes:
            return gpu
    return None
