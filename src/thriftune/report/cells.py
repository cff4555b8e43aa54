"""Cells read from folders: a comparison's, one cell's, an ordinary run's, or a base model's evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from thriftune.errors import InputError
from thriftune.records import CellRecord, EvalResult, RunRecord, StepMetrics, read_record

GENERAL = "general"  # the task whose loss tells what was forgotten
BASE = "base"
# Options that set no two cells apart: where a run writes, what it prints, how it is gone on with.
NOT_A_DIFFERENCE = {
    *{"method", "seed", "output", "report_to", "train.resume_from_checkpoint", "train.logging_steps"},
    *{"train.save_strategy", "train.save_steps", "train.save_total_limit"},
}
ALLOWED = "the folder of a comparison (cells/), a cell (cell.json) or a run (record.json), or a base's evals/NAME.json"


@dataclass(frozen=True)
class Cell:
    """A cell with what lies beside it. `steps` and `answers` are empty where their files are not there."""

    folder: Path
    record: CellRecord
    run: RunRecord | None
    steps: list[StepMetrics]
    answers: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def key(self) -> str:
        """Unlike the name it is unique among cells of several comparisons."""
        return str(self.folder)

    @property
    def done(self) -> bool:
        return self.record.status == "done" and self.record.result is not None


def read_cells(folders: Sequence[Path]) -> list[Cell]:
    """The cells of all folders, each once, in the order given and by name inside a comparison.

    An ordinary run with eval-TASK.json becomes a cell; its variant is its method and the options in which the runs
    of that method differ. Raises InputError for a place that is none of these and for files that cannot be read.
    """
    places: dict[Path, Path] = {}
    for folder in folders:
        for place in _places(Path(folder)):
            places.setdefault(place.resolve(), place)
    if not places:
        raise InputError(given="no folder", allowed=ALLOWED, do="name one or several")
    texts: dict[str, str] = {}
    cells, plain = [], []
    for place in places.values():
        cell = _read_cell(place, texts) if _is_cell(place) else None
        cells.append(cell or _read_ordinary(place, texts))
        plain.append(cell is None)
    return _with_variants(cells, plain)


def _places(folder: Path) -> list[Path]:
    if (folder / "cells").is_dir():
        found = sorted(place for place in (folder / "cells").iterdir() if place.is_dir())
        if not found:
            raise InputError(given=f"{folder} has no cell yet", allowed=ALLOWED, do="let the comparison run first")
        return found
    if _is_cell(folder) or (folder / "record.json").is_file() or (folder.is_file() and folder.suffix == ".json"):
        return [folder]
    raise InputError(given=f"{folder} holds no record", allowed=ALLOWED, do="correct the path")


def _is_cell(folder: Path) -> bool:
    return (folder / "cell.json").is_file() or folder.parent.name == "cells"


def _read_cell(folder: Path, texts: dict[str, str]) -> Cell:
    run = read_record(folder / "record.json", RunRecord) if (folder / "record.json").is_file() else None
    if (folder / "cell.json").is_file():
        record = read_record(folder / "cell.json", CellRecord)
    else:
        method, _, seed = folder.name.partition("-seed")
        record = CellRecord(
            status="failed",
            reason="stopped before it was scored",
            method=run.method if run else method,
            variant=run.method if run else method,
            seed=run.recipe.seed if run else int(seed) if seed.isdecimal() else None,
        )
    return Cell(folder, record, run, _steps(folder), _answers(folder, record.result, texts))


def processes_of(run: RunRecord) -> int:
    """How many trained together, with a GPU each where there are GPUs; records of before this was noted say one."""
    return int(run.hardware.get("processes", 1))


def _read_ordinary(place: Path, texts: dict[str, str]) -> Cell:
    """A run's folder, or the evaluation of a base model, as a cell."""
    if place.is_file():
        of_base = read_record(place, EvalResult)
        if of_base.adapter is not None:
            given = f"{place} is the evaluation of the adapter {of_base.adapter}"
            raise InputError(given=given, allowed=ALLOWED, do="name the run's folder instead")
        record = CellRecord(status="done", method=BASE, variant=BASE, result=of_base)
        return Cell(place, record, None, [], _answers(place.parent, of_base, texts))
    _refuse_a_federation(place / "record.json")
    run = read_record(place / "record.json", RunRecord)
    # Of one task the last counts, which is eval-TASK.json and not eval-TASK-100.json, where only 100 rows were asked.
    results = {found.task: found for found in map(_result, sorted(place.glob("eval-*.json")))}
    general = results.pop(GENERAL, None)
    done = run.status == "done"
    reason = "" if done else f"the run is {run.status}" + (f": {run.events[-1]}" if run.events else "")
    if done and len(results) != 1:
        given = f"{place} has {'no evaluation' if not results else 'evaluations of ' + ', '.join(sorted(results))}"
        raise InputError(
            given=given,
            allowed="runs scored on one task, in eval-TASK.json beside record.json",
            do=f"run `thriftune eval {place} --task NAME`" if not results else "move the others aside",
        )
    result = next(iter(results.values())) if done else None
    record = CellRecord(
        status="done" if done else "failed",
        reason=reason,
        method=run.method,
        variant=run.method,
        seed=run.recipe.seed,
        plan=run.plan,
        result=result,
        general=general,
        result_bytes=_size(place / ("model" if run.method == "full" else "adapter")),
    )
    return Cell(place, record, run, _steps(place), _answers(place, result, texts))


def _refuse_a_federation(path: Path) -> None:
    """Raise InputError for the record of one, which is no run's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # reading it as a run's says what is wrong
    if isinstance(content, dict) and "federation" in content:
        raise InputError(
            given=f"{path.parent} is a federation, whose rows lie at its sites",
            allowed=ALLOWED,
            do="look at its record.json, and score its adapter with `thriftune eval`",
        )


def _result(path: Path) -> EvalResult:
    return read_record(path, EvalResult)


def _size(folder: Path) -> int | None:
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return sum(path.stat().st_size for path in files) or None


def _steps(folder: Path) -> list[StepMetrics]:
    """The steps that are whole: a run that was killed may have left half a last line."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            steps.append(StepMetrics.model_validate_json(line))
        except ValidationError as error:
            if number == len(lines):
                break
            given = f"{path}, line {number} is not a step: {error.errors()[0]['msg']}"
            raise InputError(given=given, allowed="one step a line", do="restore or remove the file") from None
    return steps


def _answers(folder: Path, result: EvalResult | None, texts: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of the answers file: the one beside the record first, since folders get moved. Equal prompts of different
    cells are kept once: of 25,000 reviews and ten cells that is a gigabyte."""
    if result is None or result.answers is None:
        return []
    named = Path(result.answers)
    path = next((path for path in (folder / named.name, named) if path.is_file()), None)
    if path is None:
        return []
    found = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                answer = json.loads(line)
            except ValueError as error:
                answer, problem = None, str(error)
            else:
                problem = "not an object"
            if not isinstance(answer, dict):
                given = f"{path}, line {number} cannot be read: {problem}"
                raise InputError(given=given, allowed="one JSON object a line", do="run the evaluation again")
            prompt = answer.get("prompt")
            if isinstance(prompt, str):
                answer["prompt"] = texts.setdefault(prompt, prompt)
            found.append(answer)
    return found


def flat_options(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's dump with dotted names: {'lora': {'r': 8}} -> {'lora.r': 8}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flat_options(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _with_variants(cells: list[Cell], plain: list[bool]) -> list[Cell]:
    """Ordinary runs of one method that differ in an option become variants by that option."""
    options = [
        flat_options(cell.run.recipe.model_dump(mode="json")) if ordinary and cell.run else {}
        for cell, ordinary in zip(cells, plain, strict=True)
    ]
    named = []
    for cell, own in zip(cells, options, strict=True):
        same = [other for other in options if other and own and other["method"] == own["method"]]
        differing = {
            name: value
            for name, value in own.items()
            if name not in NOT_A_DIFFERENCE and any(other.get(name) != value for other in same)
        }
        if differing:
            words = " ".join(f"{name}={value}" for name, value in sorted(differing.items()))
            update = {"variant": f"{cell.record.method} {words}", "overrides": differing}
            cell = replace(cell, record=cell.record.model_copy(update=update))
        named.append(cell)
    return named
