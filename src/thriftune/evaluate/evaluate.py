"""`evaluate`: a task, a model -> an EvalResult, and every answer in a file."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from thriftune.data import load_rows
from thriftune.errors import InputError
from thriftune.evaluate.few_shot import GSM8K_FEW_SHOT, score_few_shot
from thriftune.evaluate.general import GENERAL, score_general
from thriftune.evaluate.harness import HARNESS, check_harness_task, score_with_harness
from thriftune.evaluate.own import FORMS, check_own_rows, is_own, own_task, score_own
from thriftune.evaluate.perplexity import PERPLEXITY, score_perplexity
from thriftune.evaluate.rows import score_rows
from thriftune.evaluate.score import Asked, Score
from thriftune.evaluate.tasks import TASKS, Task
from thriftune.infer.batching import ProgressCallback
from thriftune.recipe import DataRecipe, GenerationRecipe, did_you_mean
from thriftune.records import EvalResult, write_text_atomically

NAMES = (*TASKS, GSM8K_FEW_SHOT, PERPLEXITY, GENERAL)


def evaluate(
    task: str,
    model: Any,
    tokenizer: Any,
    *,
    data: DataRecipe,
    settings: GenerationRecipe,
    limit: int | None,
    split: str | None,
    answers_path: Path | None,
    model_name: str,
    adapter_name: str | None,
    on_progress: ProgressCallback,
) -> EvalResult:
    """Ask the model every row of a task and score the answers.

    Args:
        task: a name in `NAMES`; 'exact:COLUMN' or 'FILE.py:FUNCTION', a task of the caller's own (see `own`); or
            'lm_eval:NAME', a task of lm-evaluation-harness (see `harness`).
        model, tokenizer: a causal language model of transformers or PEFT, and its tokenizer.
        data: where the rows are, how they are rendered, and the prompts' limit `max_length`. For perplexity the text
            is `data.path` (or `data.name`), and `max_length` the window; for general and lm_eval, `data.path` is the
            text or rows that stand in for their own, and must be None for those. The name of another task's data set
            is refused; files and hub ids are the caller's choice.
        settings: `max_new_tokens` is lowered to what the task can need.
        limit: ask only so many rows (windows), drawn with a fixed seed: the same rows for every model. None: all.
        split: None for the task's own, mostly 'test'. Texts have no splits.
        answers_path: where a jsonl with one object a row goes; None keeps no answers.
        model_name, adapter_name: go into the record.
        on_progress: told after every batch.

    Returns:
        the main score with its 95 % interval: Wilson's for shares, else the one that `details` names. `details` has
        the other scores, the settings and what happened on the way.

    Raises:
        InputError: an unknown task, or data that do not belong to it.
        DataError: rows that cannot be read or marked.
        DoesNotFitError: a single row does not fit into memory.
    """
    start_s = time.perf_counter()
    if limit is not None and limit < 1:
        raise InputError(given=f"a limit of {limit} rows", allowed="1 or more, or no limit", do="correct the limit")
    asked = Asked(model, tokenizer, data, settings, limit, split, on_progress)
    score = _score(task, asked)
    if answers_path is not None:
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in score.answers]
        write_text_atomically(answers_path, "".join(lines))
    return EvalResult(
        task=task,
        metric=score.metric,
        value=score.value,
        low=score.low,
        high=score.high,
        rows=len(score.answers),
        model=model_name,
        adapter=adapter_name,
        answers=None if answers_path is None else str(answers_path),
        details={**score.details, "events": asked.events},
        wall_s=time.perf_counter() - start_s,
    )


def check_task(task: str, data: DataRecipe) -> None:
    """Refuse what can be refused without a model, before one is loaded or trained: names, a user's file, an extra.

    Raises InputError as `evaluate` does.
    """
    if task in (PERPLEXITY, GENERAL, GSM8K_FEW_SHOT):
        return
    if task.startswith(HARNESS):
        check_harness_task(task)
    elif is_own(task):
        own_task(task)
    else:
        _task_called(task, data)


def check_rows(task: str, data: DataRecipe, split: str | None) -> None:
    """Refuse rows that are not there or that a task cannot mark, before a model is loaded. `task` has been checked.

    Raises DataError.
    """
    if task in TASKS:
        load_rows(data, split or TASKS[task].split)
    elif is_own(task):
        check_own_rows(own_task(task), data, split)


def file_label(task: str) -> str:
    """The task's name as part of a file's: 'exact:label' -> 'exact-label', 'a/marks.py:mark' -> 'marks.py-mark'."""
    without_folders = re.sub(r"(^|:)[^:]*/", r"\1", task)
    return re.sub(r"[^\w.]+", "-", without_folders).strip("-.")


def _score(task: str, asked: Asked) -> Score:
    if task == PERPLEXITY:
        return score_perplexity(asked)
    if task == GENERAL:
        return score_general(asked)
    if task == GSM8K_FEW_SHOT:
        return score_few_shot(asked)
    if task.startswith(HARNESS):
        return score_with_harness(task, asked)
    if is_own(task):
        return score_own(own_task(task), asked)
    return score_rows(_task_called(task, asked.data), asked)


def _task_called(name: str, data: DataRecipe) -> Task:
    if name not in TASKS:
        raise InputError(
            given=f"the task {name!r}{did_you_mean(name, NAMES)}",
            allowed=", ".join((*NAMES, *FORMS, f"{HARNESS}NAME")),
            do="choose one of these",
        )
    task = TASKS[name]
    if data.name != task.data and data.name in {other.data for other in TASKS.values()}:
        raise InputError(
            given=f"task {name} on the data set {data.name}",
            allowed=f"data.name={task.data}, or a file or hub id with rows of its kind",
            do=f"give data.name={task.data}, or --task {data.name}",
        )
    return task
