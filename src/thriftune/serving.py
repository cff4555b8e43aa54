"""The verbs that use a model: `eval`, `predict`, `chat`. Each opens a target and writes what came."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console

from thriftune.data import load_file
from thriftune.errors import OutputError
from thriftune.evaluate import (
    GENERAL,
    GSM8K_FEW_SHOT,
    HARNESS,
    PERPLEXITY,
    TASKS,
    check_task,
    evaluate,
    file_label,
    is_own,
)
from thriftune.infer.batching import Progress, ProgressCallback
from thriftune.infer.chat import chat_loop
from thriftune.infer.predict import predict_rows
from thriftune.machine import choose_device, quiet_libraries
from thriftune.opening import open_for_use
from thriftune.recipe import DataRecipe, GenerationRecipe, Recipe, read_recipe
from thriftune.records import EvalResult, write_record
from thriftune.target import OpenedTarget, Target, find_target
from thriftune.units import format_seconds

MOST_ROWS = 256  # at once where layers are streamed and nobody says: products of so many rows hide most transfers


def evaluate_target(
    name: str,
    words: Sequence[str],
    *,
    task: str,
    data_path: str | None,
    split: str,
    limit: int | None,
    answers: Path | None,
) -> EvalResult:
    """Score a target; the result and every answer are kept in the run's folder, or under evals/ for a bare model."""
    target, recipe = _target(name, words)
    # A run asks as it was trained, reviews with their question; a bare model is asked what the rows say.
    own_rows = data_path if is_own(task) and not target.is_run else None
    data = task_data(recipe.data.model_copy(update={"name": own_rows}) if own_rows else recipe.data, task, data_path)
    check_task(task, data)
    folder = Path(name) if target.is_run and (Path(name) / "recipe.yaml").is_file() else Path("evals")
    stem = f"eval-{file_label(task)}" if folder == Path(name) else f"{_slug(name)}-{file_label(task)}"
    if limit is not None:
        stem += f"-{limit}"
    with closing(open_for_use(target, recipe, choose_device(), alone=False, say=told)) as opened:
        result = evaluate_opened(opened, data, recipe, task, split, limit, answers or folder / f"{stem}.jsonl")
    write_record(folder / f"{stem}.json", result)
    return result


def evaluate_opened(
    opened: OpenedTarget,
    data: DataRecipe,
    recipe: Recipe,
    task: str,
    split: str,
    limit: int | None,
    answers: Path | None,
) -> EvalResult:
    """The score; where layers are streamed its details say so, because then its times are not those of a model held
    whole."""
    settings = recipe.generation if _reads_whole_rows(task) else with_rows(opened, data, recipe.generation)
    result = evaluate(
        task,
        opened.model,
        opened.tokenizer,
        data=data,
        settings=settings,
        limit=limit,
        split=split,
        answers_path=answers,
        model_name=opened.target.base.name,
        adapter_name=str(opened.target.adapter) if opened.target.adapter else None,
        on_progress=progress_lines(f"{task}"),
    )
    if opened.rows_at_once is None:
        return result
    how = {"layers_streamed": opened.layers_streamed, "rows_at_once": settings.batch_size}
    return result.model_copy(update={"details": {**result.details, **how}})


def task_data(trained_on: DataRecipe, task: str, data_path: str | None) -> DataRecipe:
    """Where a task's rows are, rendered as the model was trained: the run's own place when it trained on that set.

    A user's own task is asked of the run's data set unless `data_path` names others; the fixed general text and the
    harness's tasks bring their own unless it does.
    """
    if task == GENERAL or task.startswith(HARNESS):
        return trained_on.model_copy(update={"name": task, "path": data_path})
    if is_own(task):
        if data_path is None:
            return trained_on
        if not Path(data_path).expanduser().exists():
            return trained_on.model_copy(update={"name": data_path, "path": None})
        return trained_on.model_copy(update={"path": data_path})
    names = {GSM8K_FEW_SHOT: "gsm8k"} | {name: known.data for name, known in TASKS.items()}
    name = names.get(task, trained_on.name)
    path = data_path or (trained_on.path if trained_on.name == name else None)
    return trained_on.model_copy(
        update={"name": name, "path": path, "columns": {} if trained_on.name != name else trained_on.columns}
    )


def predict_with_target(name: str, words: Sequence[str], *, input_file: Path, output: Path | None) -> int:
    """Answer every row of a file, streamed in order. The output file appears under its name once it is whole."""
    rows = load_file(str(input_file), "--input")
    target, recipe = _target(name, words)
    count = 0
    # A run asks as it was trained, reviews with their question; a bare model is asked what the rows say.
    data = recipe.data if target.is_run else recipe.data.model_copy(update={"name": str(input_file)})
    with closing(open_for_use(target, recipe, choose_device(), alone=False, say=told)) as opened:
        answered = predict_rows(
            opened.model,
            opened.tokenizer,
            rows,
            data,
            with_rows(opened, data, recipe.generation),
            seed=recipe.seed,
            on_progress=progress_lines("predict"),
        )
        with _whole_file(output) as file:
            for row in answered:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                count += 1
    return count


def chat_with_target(name: str, words: Sequence[str]) -> None:
    target, recipe = _target(name, words)

    def read_line() -> str:
        return input("> " if sys.stdin.isatty() else "")

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    with closing(open_for_use(target, recipe, choose_device(), alone=True, say=told)) as opened:
        chat_loop(
            opened.model,
            opened.tokenizer,
            recipe.data,
            recipe.generation,
            read_line,
            write,
            seed=recipe.seed,
            most_tokens=opened.rows_at_once and opened.rows_at_once(1),  # rows of one token each: tokens of one row
        )


def with_rows(opened: OpenedTarget, data: DataRecipe, settings: GenerationRecipe) -> GenerationRecipe:
    """The settings with as many rows at once as have room, where layers are streamed and the recipe leaves the number
    as it comes: every token costs a pass of all streamed layers over the link, whatever the number of rows."""
    if opened.rows_at_once is None or settings.batch_size != GenerationRecipe().batch_size:
        return settings
    tokens, positions = data.max_length + settings.max_new_tokens, opened.loaded.description.max_positions
    rows = opened.rows_at_once(min(tokens, positions or tokens))
    if rows is None:
        return settings
    rows = min(rows, MOST_ROWS)
    told(f"generation.batch_size: {rows} rows at once have room beside the layers")
    return settings.model_copy(update={"batch_size": rows})


def _reads_whole_rows(task: str) -> bool:
    """Whether logits of all positions are asked for, which take far more than a row's cache."""
    return task in (PERPLEXITY, GENERAL) or task.startswith(HARNESS)


def told(text: str) -> None:
    Console(stderr=True).print(text, highlight=False, markup=False)


def _target(name: str, words: Sequence[str]) -> tuple[Target, Recipe]:
    quiet_libraries()
    target = find_target(name)
    return target, read_recipe(None, words, target.recipe.dump())


def progress_lines(label: str) -> ProgressCallback:
    """Progress on standard error: one line rewritten on a terminal, a line every ten seconds elsewhere."""
    console = Console(stderr=True)
    started = time.perf_counter()
    last = started

    def report(progress: Progress) -> None:
        nonlocal last
        if progress.event:
            console.print(progress.event, style="yellow", highlight=False)
        now = time.perf_counter()
        finished = progress.done >= progress.total
        if finished or now - last >= (0.2 if console.is_terminal else 10.0):
            last = now
            left_s = (now - started) / max(1, progress.done) * (progress.total - progress.done)
            text = f"{label}: {progress.done} of {progress.total} rows, {format_seconds(left_s)} left"
            console.print(text, end="\r" if console.is_terminal and not finished else "\n", highlight=False)

    return report


@contextmanager
def _whole_file(output: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file written aside and renamed when everything is in it."""
    if output is None:
        yield sys.stdout
        return
    aside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            yield file
        aside.replace(output)
    except OSError as error:
        raise OutputError(
            given=f"{output} cannot be written: {error.strerror or error}",
            allowed="a file you may write to, with room",
            do="name another --output",
        ) from None
    finally:
        with suppress(OSError):  # a parent that is a file
            aside.unlink(missing_ok=True)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.").lower() or "model"
