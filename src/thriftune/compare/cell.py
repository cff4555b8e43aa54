"""What a comparison does in its child processes: plan the cells, try a learning rate, train and score a cell."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from thriftune.compare.grid import BASE
from thriftune.compare.jobs import CellJob, PlanJob, Planned, RateJob
from thriftune.console import ProgressLine
from thriftune.data import StepOrder, encode_prompt
from thriftune.errors import DiskFullError, DoesNotFitError, InputError, ModelError, NonFiniteLossError, first_line
from thriftune.evaluate import GENERAL, TASKS, check_rows, check_task, file_label
from thriftune.infer.latency import first_token_s
from thriftune.infer.merge import merge_adapter
from thriftune.machine import choose_device, quiet_libraries
from thriftune.methods import METHODS
from thriftune.models.surgery import dequantise
from thriftune.opening import open_for_use
from thriftune.plan.work import Rows
from thriftune.planning import plan_run
from thriftune.recipe import Recipe
from thriftune.records import CellRecord, EvalResult, RunRecord, read_record, write_record
from thriftune.run import Prepared, prepare_run, run, run_place
from thriftune.serving import evaluate_opened, task_data, told
from thriftune.target import OpenedTarget, Target, attach_adapter, find_target
from thriftune.train.checkpoint import newest_checkpoint
from thriftune.train.recover import is_out_of_memory
from thriftune.units import format_bytes

PROMPTS = 8  # of the task, for the time to the first token
REPEATS = 3
PLAIN_PROMPT = "What is the capital of France, and why is it known?"  # for tasks whose answers hold no prompts


def work(function: str, argument: Any, threads: int | None) -> Any:
    """What the parent asked a child for. `threads`: of the processor; None leaves them as they are."""
    if threads is not None:
        torch.set_num_threads(threads)
    functions: dict[str, Callable[[Any], Any]] = {"plan_cells": plan_cells, "try_rate": try_rate, "run_cell": run_cell}
    return functions[function](argument)


def plan_cells(job: PlanJob) -> Planned:
    """Read the rows once and plan every variant with their exact lengths.

    Raises InputError, ModelError and DataError for a task, a model or data that would be refused later.
    """
    quiet_libraries()
    recipes = list(job.recipes.values())
    question = job.question
    data = task_data(recipes[0].data, question.task, None)
    if not job.task_is_named and question.task not in TASKS:
        raise InputError(
            given=f"the data {question.task} has no task of its own, and no --task was given",
            allowed="a task that scores these rows, such as exact:COLUMN, FILE.py:FUNCTION, perplexity or lm_eval:NAME",
            do="name it with --task",
        )
    check_task(question.task, data)
    check_rows(question.task, data, question.split)
    prepared = prepare_run(recipes[0], force=True)
    rows = Rows(
        tokens=[len(example) for example in prepared.data.train],
        targets=[example.num_targets for example in prepared.data.train],
        count=len(prepared.data.train),
        source=f"{prepared.data.train_rows.description}, every row",
    )
    place = run_place(prepared.device)
    plans, notes = {}, []
    for variant, recipe in job.recipes.items():
        planned = plan_run(recipe, rows, prepared.description.folder, place, True)
        plans[variant] = planned.chosen
        if planned.note:
            notes.append(f"{variant}: {planned.note}")
    return Planned(rows.count, _steps(prepared), prepared.data.audit.source, str(prepared.device), plans, notes)


def _steps(prepared: Prepared) -> int:
    train = prepared.recipe.train
    return StepOrder(
        num_examples=len(prepared.data.train),
        examples_per_step=train.per_device_train_batch_size * train.gradient_accumulation_steps,
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        seed=prepared.recipe.seed,
        shuffle=prepared.recipe.data.shuffle,
    ).steps


def try_rate(job: RateJob) -> float | None:
    """The eval loss of a run of the search, None when it diverged. Its weights and checkpoints are removed after.

    Raises DoesNotFitError for every way to run out of memory, StoppedBySignal and what the model and data refuse.
    """
    quiet_libraries()
    output = Path(job.recipe.output or "")
    record = _finished_run(output)
    label = f"search, {output.parent.name} {output.name}" if job.at_once > 1 else ""
    try:
        if record is None:
            record = _train(prepare_run(_going_on(job.recipe), force=job.force), job.command, label)
    except NonFiniteLossError:
        pass
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFitError(
            given=f"the search runs out of memory: {_given(error)}",
            allowed="a run that fits",
            do="lower data.max_length, or give the method's learning_rate",
        ) from None
    for folder in (output / "adapter", output / "model", *output.glob("checkpoint-*")):
        shutil.rmtree(folder, ignore_errors=True)
    loss = record.eval_loss if record else None
    return loss if loss is not None and math.isfinite(loss) else None


def run_cell(job: CellJob) -> CellRecord:
    """Train unless the run is there, score, and leave cell.json, also for what does not fit.

    Raises StoppedBySignal (after saving) and DiskFullError; other errors of ours are the caller's to record.
    """
    quiet_libraries()
    if job.method != BASE and _finished_run(job.folder) is None:
        try:
            prepared = prepare_run(_going_on(job.recipe), force=job.force)
        except DoesNotFitError as error:
            return _undone(job, "refused", f"{error.given}; {error.do}")
        try:
            _train(prepared, job.command, job.folder.name if job.at_once > 1 else "")
        except (DoesNotFitError, RuntimeError, MemoryError) as error:
            if not _ran_out(error):
                raise
            return _undone(job, "out_of_memory", f"in training: {_given(error)}{_guess(job)}")
        del prepared
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    try:
        return _score(job)
    except (DoesNotFitError, RuntimeError, MemoryError) as error:
        if not _ran_out(error):
            raise
        return _undone(job, "out_of_memory", f"in its evaluation: {_given(error)}{_guess(job)}")


def _going_on(recipe: Recipe) -> Recipe:
    """The recipe, resuming where an earlier go has left something to resume from."""
    output = Path(recipe.output or "")
    if not (output / "record.json").is_file() and newest_checkpoint(output) is None:
        return recipe
    train = recipe.train.model_copy(update={"resume_from_checkpoint": "auto"})
    return recipe.model_copy(update={"train": train})


def _finished_run(output: Path) -> RunRecord | None:
    """The record of a run that was trained to its end and whose result is there."""
    path = output / "record.json"
    record = read_record(path, RunRecord) if path.is_file() else None
    if record is None or record.status != "done":
        return None
    return record


def _train(prepared: Prepared, command: str, label: str) -> RunRecord:
    console = Console(stderr=True)
    progress = ProgressLine(console, prepared.recipe.train.logging_steps, label)
    return run(prepared, observers=[progress], command=command, resume_command=command)


def _ran_out(error: BaseException) -> bool:
    return (isinstance(error, DoesNotFitError) and not isinstance(error, DiskFullError)) or is_out_of_memory(error)


def _guess(job: CellJob) -> str:
    beside = f"; beside {job.sharing} others on its device" if job.sharing else ""
    if job.plan is None:
        return f"; there was no plan for it{beside}"
    planned, usable = format_bytes(job.plan.peak_bytes), format_bytes(job.plan.usable_bytes)
    return f"; the plan was {planned} of {usable}{beside}"


def _given(error: BaseException) -> str:
    return error.given if isinstance(error, DoesNotFitError) else first_line(error)


def _undone(job: CellJob, status: Literal["refused", "out_of_memory"], reason: str) -> CellRecord:
    record = CellRecord(
        status=status,
        reason=reason,
        method=job.method,
        variant=job.variant,
        seed=job.seed,
        overrides=job.overrides,
        plan=job.plan,
    )
    write_record(job.folder / "cell.json", record)
    return record


def _score(job: CellJob) -> CellRecord:
    """The task, the general text, and the time to the first token beside the base and folded into it."""
    device = choose_device()
    target = _target(job)
    with closing(open_for_use(target, target.recipe, device, alone=False, say=told)) as opened:
        result = _evaluated(job, opened, job.question.task)
        general = _evaluated(job, opened, GENERAL)
        prompts = _prompts(result, opened)
        waited_s = first_token_s(opened.model, prompts, device=device, repeats=REPEATS)
        merged_s, note = _merged_first_token_s(opened, prompts, device)
    details = {**result.details, "first_token": f"{len(prompts)} prompts, {REPEATS} times each{note}"}
    finished = _finished_run(job.folder) if job.method != BASE else None
    record = CellRecord(
        status="done",
        method=job.method,
        variant=job.variant,
        seed=job.seed,
        overrides=job.overrides,
        plan=finished.plan if finished and finished.plan else job.plan,
        result=result.model_copy(update={"details": details}),
        general=general,
        first_token_s=waited_s,
        merged_first_token_s=merged_s,
        result_bytes=_result_bytes(job),
        at_once=job.at_once,
        sharing=job.sharing,
    )
    write_record(job.folder / "cell.json", record)
    return record


def _target(job: CellJob) -> Target:
    if job.method == BASE:
        return Target(BASE, job.recipe, job.recipe.model, None, False, False)
    return find_target(str(job.folder))


def _evaluated(job: CellJob, opened: OpenedTarget, task: str) -> EvalResult:
    """A score, written beside the cell's record; the answers of the task are kept, the general text's are not."""
    question, is_general = job.question, task == GENERAL
    data = task_data(job.recipe.data, task, question.general_text if is_general else None)
    path = job.folder / f"eval-{file_label(task)}.jsonl"
    limit = None if is_general else question.limit
    answers = None if is_general else path
    result = evaluate_opened(opened, data, job.recipe, task, question.split, limit, answers)
    write_record(path.with_suffix(".json"), result)
    return result


def _prompts(result: EvalResult, opened: OpenedTarget) -> list[list[int]]:
    """Token ids of the first prompts that the task asked."""
    texts = []
    if result.answers is not None:
        with Path(result.answers).open(encoding="utf-8") as file:
            for line, _ in zip(file, range(PROMPTS), strict=False):
                text = json.loads(line).get("prompt")
                texts += [text] if isinstance(text, str) and text else []
    tokenizer, positions = opened.tokenizer, opened.loaded.description.max_positions
    found = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    if not found:
        found = [encode_prompt([{"role": "user", "content": PLAIN_PROMPT}], tokenizer, opened.target.recipe.data)]
    return [ids[-(positions - 1) :] if positions else ids for ids in found if ids]


def _merged_first_token_s(
    opened: OpenedTarget, prompts: list[list[int]], device: torch.device
) -> tuple[float | None, str]:
    """Seconds with the adapter folded into its 16-bit base, in memory; and what to note where that cannot be."""
    if opened.target.adapter is None:
        return None, ""
    if opened.rows_at_once is not None:
        return None, "; not merged: the 16-bit base does not fit where layers are streamed"
    try:
        adapted: Any = opened.model
        if opened.target.four_bit:
            adapted = attach_adapter(dequantise(adapted.unload()), opened.target.adapter)
        merged = merge_adapter(adapted)
        return first_token_s(merged.eval(), prompts, device=device, repeats=REPEATS), ""
    except (torch.OutOfMemoryError, ModelError) as error:
        why = error.given if isinstance(error, ModelError) else "the 16-bit base does not fit beside it"
        Console(stderr=True).print(f"not timed merged: {why}", style="yellow", highlight=False)
        return None, f"; not merged: {why}"


def _result_bytes(job: CellJob) -> int | None:
    if job.method == BASE:
        return None
    folder = job.folder / METHODS[job.method].result_folder
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) or None
