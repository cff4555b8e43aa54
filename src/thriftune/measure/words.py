"""`thriftune plan --measure`: the plan for this machine's own GPU, or CPU, with times that were measured on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from thriftune.catalog.gpus import find_gpu
from thriftune.catalog.rows import Gpu
from thriftune.errors import InputError, ThriftuneError
from thriftune.machine import choose_device, quiet_libraries
from thriftune.measure.step import Step, StepTime, measure_step
from thriftune.plan.plan import make_plan
from thriftune.plan.search import Candidate, Device
from thriftune.plan.values import Timed
from thriftune.planning import ask, cpu_device, own_gpu, read_market, split_count, unknown_gpu
from thriftune.recipe import Recipe
from thriftune.records import Plan
from thriftune.units import format_seconds


def measure_words(
    recipe: Recipe,
    *,
    gpu_names: Sequence[str],
    gpus: int | None,
    methods: Sequence[str],
    prefer: str,
    say: Callable[[str], None],
) -> Plan:
    """The plan of `thriftune.planning.plan_words` for this machine, each method that fits timed on it. `say` is told
    what is being measured.

    Raises InputError when GPUs are named that are not this machine's, and what plan_words raises.
    """
    quiet_libraries()
    device = choose_device()
    market = read_market()
    rows = {gpu.key: gpu for gpu in market.gpus}
    place, notes = _this_machine(device, _counted(gpu_names, gpus, rows))
    _refuse_others(gpu_names, place, rows)
    question, config = ask(recipe, methods=methods, prefer=prefer, notes=notes)

    def stopwatch(method: str, candidate: Candidate) -> Timed:
        return _timed(config, question.case.recipe, method, candidate, device, say)

    return make_plan(replace(question, stopwatch=stopwatch), [place], market)


def _counted(names: Sequence[str], gpus: int | None, rows: Mapping[str, Gpu]) -> int:
    """How many GPUs are asked for. Raises InputError for an unknown name, and for more than one place."""
    counted = [split_count(name, gpus) for name in names or ["local"]]
    for _, word in counted:
        if word.lower() not in ("local", "cpu"):
            find_gpu(word, rows)
    if len(counted) > 1:
        raise _not_here(names)
    return counted[0][0]


def _this_machine(device: torch.device, count: int) -> tuple[Device, list[str]]:
    """Where this process would train, and what to know of it. Raises InputError for more GPUs than there are."""
    here = torch.cuda.device_count() if device.type == "cuda" else 0
    if count > max(1, here):
        raise InputError(
            given=f"{count} GPUs to measure on; this machine has {here}",
            allowed="as many GPUs as PyTorch finds here" if here else "its CPU, for no GPU was found",
            do="lower --gpus, or leave out --measure: the table has times for any number",
        )
    if not here:
        threads = torch.get_num_threads()
        how = f"{threads} thread{'s' if threads > 1 else ''}"
        return cpu_device(), [
            f"PyTorch finds no GPU here: planned for this computer's CPU and measured on it, with {how}"
        ]
    indices = range(count) if count > 1 else [device.index]
    place = own_gpu(indices, count)
    if place is None:
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        place = unknown_gpu(torch.cuda.get_device_name(device), total_bytes, free_bytes, count)
    return place, []


def _refuse_others(names: Sequence[str], place: Device, rows: Mapping[str, Gpu]) -> None:
    """Raise InputError when a GPU is named that is not the one here."""
    for name in names:
        _, word = split_count(name, None)
        here = place.gpu.key if place.gpu else "cpu"
        if word.lower() not in ("local", here) and (word.lower() == "cpu" or find_gpu(word, rows).key != here):
            raise _not_here(names)


def _not_here(names: Sequence[str]) -> InputError:
    return InputError(
        given=f"--measure with --gpu {' --gpu '.join(names)}",
        allowed="--measure for this machine alone: --gpu local, or no --gpu",
        do="leave out --gpu; or leave out --measure, and times are estimated from the table",
    )


def _timed(
    config: Mapping[str, Any],
    recipe: Recipe,
    method: str,
    candidate: Candidate,
    device: torch.device,
    say: Callable[[str], None],
) -> Timed:
    """The candidate's settings timed, with the table's estimate beside it; or why that was not possible."""
    work, table = candidate.work, candidate.time
    rows, choice = work.rows * work.micro_batches, candidate.choice
    if choice is None:
        what = f"{work.micro_batches} x {work.rows} rows of {round(work.padded_tokens_per_step / rows):,} tokens a step"
        what += ", recomputing activations" if candidate.checkpointing else ""
    else:
        what = f"{rows} rows of {round(work.packed.tokens / rows):,} tokens a step through the engine"
        what += f", layers keep {choice.keep.words}"
    say(f"measuring {method} on {device}: {what}")
    started = time.perf_counter()
    try:
        train = recipe.train.model_copy(update={"optim": candidate.optimizer if candidate.time else recipe.train.optim})
        recipe = recipe.model_copy(update={"train": train})
        found = measure_step(config, Step(recipe, method, candidate.checkpointing, work, device, candidate.choice))
    except ThriftuneError as error:
        say(f"  not measured: {error.given}")
        kept = " and keeps the table's time" if table else ""
        return Timed(None, f"was not measured{kept}: {error.given}")
    spent = f"measuring took {format_seconds(time.perf_counter() - started)}"
    say(f"  {format_seconds(found.step_s)} a step, by {found.layers}; {spent}")
    link_s = table.link_s if table else 0.0
    return Timed(found.step_s + link_s, _words(found, candidate, link_s))


def _words(found: StepTime, candidate: Candidate, link_s: float) -> str:
    table = candidate.time
    beside = f"the table says {format_seconds(table.step_s)}" if table else "the table has no CPUs"
    exchange = f", and {format_seconds(link_s)} for the exchange of gradients by the table" if link_s else ""
    return (
        f"was measured on this machine: {found.layers} timed, {format_seconds(found.step_s)} a step{exchange}; {beside}"
    )
