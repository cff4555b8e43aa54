"""A user's own task: rows of any shape that training takes, and a rule for what is right.

exact:COLUMN         the answer equals the row's column, after `normalise`
FILE.py:FUNCTION     def mark(answer: str, row: dict) -> bool | float, from 0 to 1; the file is run, as asked
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy

from thriftune.data import Rows, load_file, load_rows, stop_token_ids
from thriftune.errors import DataError, InputError
from thriftune.evaluate.rows import asked_row
from thriftune.evaluate.score import ANSWER_SEED, Asked, Score, draw_subset, mean_of_marks
from thriftune.infer.batching import Progress
from thriftune.infer.generate import decode, generate_rows
from thriftune.infer.predict import encode_row
from thriftune.infer.prompts import pad_token_id_of, room_for_answer
from thriftune.recipe import DataRecipe, did_you_mean

EXACT = "exact:"
FORMS = ("exact:COLUMN", "FILE.py:FUNCTION")
SPLIT = "test"
NORMALISED = "equal after Unicode NFKC, upper and lower case made one, and every run of spaces made one space"

_FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<function>\w+)")


@dataclass(frozen=True)
class OwnTask:
    """`marked(answer, rows, index)` gives the keys prediction, target and score of one answer; `check(rows, index)`
    refuses a row that cannot be marked, before anything is asked."""

    metric: str
    words: str
    check: Callable[[Rows, int], None]
    marked: Callable[[str, Rows, int], dict[str, Any]]


def is_own(task: str) -> bool:
    return task.startswith(EXACT) or _FUNCTION.fullmatch(task) is not None


def own_task(task: str) -> OwnTask:
    """Raises InputError when the column is not named, or the file or its function is not there or does not run."""
    if task.startswith(EXACT):
        return _exact(task.removeprefix(EXACT))
    match = _FUNCTION.fullmatch(task)
    assert match is not None, "is_own was asked first"
    return _by_function(Path(match["file"]).expanduser(), match["function"])


def score_own(own: OwnTask, asked: Asked) -> Score:
    """The mean of the marks over the rows, each asked as in training, without its answer where it has one.

    The first row is asked and marked alone: a mistake in a user's function shows at once and not after an hour.
    """
    rows = _rows(asked.data, asked.split)
    indices = draw_subset(len(rows), asked.limit)
    room = room_for_answer(asked.data, asked.model, asked.settings.max_new_tokens)
    stops = stop_token_ids(asked.tokenizer, getattr(asked.model, "generation_config", None), asked.data)
    prompts = [encode_row(rows, index, asked.tokenizer, room) for index in indices]
    for index in indices:
        own.check(rows, index)
    answers: list[dict[str, Any]] = []
    for part in (slice(0, 1), slice(1, None)):
        done = len(answers)

        def report(progress: Progress, done: int = done) -> None:
            asked.progress(Progress(done + progress.done, len(indices), progress.event))

        generated = generate_rows(
            asked.model,
            prompts[part],
            asked.settings,
            stops,
            pad_token_id_of(asked.tokenizer),
            seed=ANSWER_SEED,
            first_row=done,
            on_progress=report,
        )
        for index, prompt, ids in zip(indices[part], prompts[part], generated, strict=True):
            text = decode(asked.tokenizer, ids)
            mark = own.marked(text, rows, index)
            correct = mark["score"] == 1
            asked_for = asked_row(rows, index, asked.tokenizer, prompt)
            answers.append({**asked_for, "answer": text, **mark, "correct": correct, "tokens": len(ids)})
    value, interval = mean_of_marks([answer["score"] for answer in answers])
    details = {
        "marked_by": own.words,
        "interval": interval,
        "data": rows.description,
        "rows_of_split": len(rows),
        "max_length": room.max_length,
        "settings": asked.settings.model_dump(),
        "reached_max_new_tokens": sum(answer["tokens"] >= asked.settings.max_new_tokens for answer in answers),
    }
    return Score(own.metric, **value, answers=answers, details=details)


def check_own_rows(own: OwnTask, data: DataRecipe, split: str | None) -> None:
    """Refuse rows that cannot be marked, without a model. Raises DataError as `score_own` does."""
    rows = _rows(data, split)
    for index in range(len(rows)):
        own.check(rows, index)


def _rows(data: DataRecipe, split: str | None) -> Rows:
    """A single file stands for whatever is to be scored; folders, named sets and the hub have splits."""
    path = Path(data.path or data.name).expanduser()
    rows = load_file(str(path), "--data") if path.is_file() else load_rows(data, split or SPLIT)
    if not len(rows):
        raise DataError(given=f"{rows.description}: no rows", allowed="at least one row", do="check the source")
    return rows


def normalise(text: str) -> str:
    """What `exact` compares; `NORMALISED` says it in words."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _exact(column: str) -> OwnTask:
    if not column:
        raise InputError(
            given="the task exact: without a column", allowed="exact:COLUMN", do="name the column with the right answer"
        )

    def target(rows: Rows, index: int) -> str:
        row = rows.rows[index]
        value = row.get(column)
        if isinstance(value, bool):
            return str(value).lower()
        if (isinstance(value, str) and value.strip()) or isinstance(value, int | float):
            return str(value)
        given = f"no column {column!r}{did_you_mean(column, map(str, row))}" if column not in row else repr(value)[:60]
        raise DataError(
            given=f"{rows.places[index]}: exact:{column} finds {given}",
            allowed="a text that is not empty, a number, true or false, in every row; the columns are "
            + ", ".join(str(key) for key in row),
            do="name the column with the right answer, or correct the row",
        )

    def marked(answer: str, rows: Rows, index: int) -> dict[str, Any]:
        prediction, wanted = normalise(answer), normalise(target(rows, index))
        return {"prediction": prediction, "target": wanted, "score": float(prediction == wanted)}

    def check(rows: Rows, index: int) -> None:
        target(rows, index)

    return OwnTask("exact_match", f"the column {column!r}: {NORMALISED}", check, marked)


def _by_function(file: Path, name: str) -> OwnTask:
    module = _run_file(file)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(
            given=f"{file} has no function {name!r}{did_you_mean(name, known)}",
            allowed="def mark(answer: str, row: dict) -> bool or float",
            do=f"name one of its functions: {', '.join(known) or 'there is none'}",
        )

    def marked(answer: str, rows: Rows, index: int) -> dict[str, Any]:
        return {"prediction": answer, "target": None, "score": _mark(function, file, name, answer, rows, index)}

    return OwnTask("mean_mark", f"{name} in {file}", lambda rows, index: None, marked)


def _mark(function: Callable[..., Any], file: Path, name: str, answer: str, rows: Rows, index: int) -> float:
    try:
        mark = function(answer, dict(rows.rows[index]))
    except Exception as problem:
        raise DataError(
            given=f"{rows.places[index]}: {name} in {_place_of(problem, file)} raised "
            f"{type(problem).__name__}: {problem} on the answer {answer[:60]!r}",
            allowed="a function that marks every answer, the empty one too",
            do="correct the function, or the row",
        ) from problem
    is_number = isinstance(mark, bool | int | float | numpy.bool_ | numpy.number)
    if not is_number or not math.isfinite(mark) or not 0 <= mark <= 1:
        raise DataError(
            given=f"{rows.places[index]}: {name} in {file} returned {mark!r} on the answer {answer[:60]!r}",
            allowed="True, False, or a number from 0 to 1",
            do="correct what the function returns" + ("; it may lack a return" if mark is None else ""),
        )
    return float(mark)


def _run_file(file: Path) -> ModuleType:
    """The file as a module of its own; what it imports from its folder is found. Raises InputError."""
    if not file.is_file():
        raise InputError(
            given=f"the file {file} does not exist (looked from {Path.cwd()})",
            allowed="FILE.py:FUNCTION with a Python file",
            do="correct the path",
        )
    spec = importlib.util.spec_from_file_location(f"own_task_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "a name that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as problem:
        raise InputError(
            given=f"{_place_of(problem, file)} does not run: {type(problem).__name__}: {problem}",
            allowed="a Python file that can be imported",
            do="correct it; `python FILE.py` shows the same error",
        ) from problem
    finally:
        sys.path.remove(str(file.resolve().parent))
    return module


def _place_of(problem: BaseException, file: Path) -> str:
    """'marks.py line 7': the last line of the user's file that the error went through."""
    if isinstance(problem, SyntaxError) and problem.filename is not None:
        return f"{problem.filename} line {problem.lineno}"
    frames = traceback.extract_tb(problem.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]
    return f"{file} line {lines[-1]}" if lines else str(file)
