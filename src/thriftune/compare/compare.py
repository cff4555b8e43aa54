"""`thriftune compare`, top to bottom: the grid, its plan, the budget, the rates, the cells, the report."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thriftune.compare import budget
from thriftune.compare.budget import Rent, Trimmed, plan_words, planned_s
from thriftune.compare.cells import CellRunner
from thriftune.compare.child import Children, value_of
from thriftune.compare.folder import check, claim, read_cell, spent_s
from thriftune.compare.grid import BASE, Cell, Grid, make_grid
from thriftune.compare.jobs import Asked, PlanJob, Planned, Question
from thriftune.compare.locks import held_by_comparison, wait_for_orphans
from thriftune.compare.pages import report_folders
from thriftune.compare.search import Say, search_all, search_s
from thriftune.planning import read_market
from thriftune.records import ReportRecord
from thriftune.units import format_seconds


@dataclass(frozen=True)
class Compared:
    """`folder` has the report. `failed`: the names of cells that failed for another reason than memory."""

    folder: Path
    report: ReportRecord
    failed: tuple[str, ...]
    undone: bool


def compare(asked: Asked, say: Say) -> Compared:
    """Run what is missing of a comparison and write its report.

    Raises InputError for words that make no comparison, an existing folder with another one, a budget that is too
    small; StoppedBySignal after saving; DiskFullError.
    """
    grid, question, folder = _read(asked)
    check(folder, grid, question, asked.searches, asked.at_once)
    rent, most_s = _money(asked)
    planned = _plan(asked, grid, question)
    with ExitStack() as stack:
        stack.enter_context(held_by_comparison(folder))
        wait_for_orphans(folder)
        children = Children(folder)
        stack.enter_context(children.watching())
        trimmed = _within_budget(asked, grid, planned, folder, rent, most_s, say)
        claim(folder, grid, question, asked.searches, asked.at_once)
        notes = [*([trimmed.note] if trimmed.note else []), *planned.notes]
        rates = search_all(asked, grid, planned, folder, children, say)
        runner = CellRunner(asked, grid, question, planned, folder, children, rates, rent, most_s, say)
        notes += runner.run(trimmed)
        report = report_folders([folder], folder, notes, asked.gpu)
    failed = tuple(cell.name for cell in report.cells if cell.status == "failed")
    return Compared(folder, report, failed, not any(cell.status == "done" for cell in report.cells))


def show_grid(asked: Asked, say: Say) -> dict[str, Any]:
    """What `compare` would run, with the plan of each cell and the sum; nothing is trained or written."""
    grid, question, folder = _read(asked)
    check(folder, grid, question, asked.searches, asked.at_once)
    rent, most_s = _money(asked)
    planned = _plan(asked, grid, question)
    trimmed = _within_budget(asked, grid, planned, folder, rent, most_s, say)
    cells = []
    for cell in grid.cells:
        plan = planned.plans.get(cell.variant) if cell.method != BASE else None
        cells.append(
            {
                "cell": cell.name,
                "overrides": cell.overrides,
                "skipped": cell in trimmed.skipped,
                "plan": plan.model_dump(mode="json") if plan else None,
            }
        )
    return {"output": str(folder), "steps": planned.steps, "cells": cells, "price": rent.words() if rent else None}


def _read(asked: Asked) -> tuple[Grid, Question, Path]:
    grid = make_grid(asked.words, asked.config, asked.values, asked.methods, asked.seeds)
    data, model = grid.recipe.data.name, grid.recipe.model.name
    task = asked.task or data
    folder = asked.output or Path("compare") / f"{Path(model).name}-{Path(data).name.split('.')[0]}".lower()
    return grid, Question(task, asked.split, asked.limit, asked.general_text), folder


def _plan(asked: Asked, grid: Grid, question: Question) -> Planned:
    """Planned aside, so that words which are refused leave no folder behind."""
    recipes = {cell.variant: cell.recipe("planned") for cell in reversed(grid.cells) if cell.method != BASE}
    if not recipes:
        recipes = {BASE: grid.cells[0].recipe("planned")}
    job = PlanJob(dict(reversed(recipes.items())), question, task_is_named=asked.task is not None)
    with tempfile.TemporaryDirectory() as aside:
        children = Children(Path(aside))
        with children.watching():
            found: Planned = value_of(children.call("plan_cells", job))
    return found


def _money(asked: Asked) -> tuple[Rent | None, float | None]:
    """What the GPU costs, and the budget in seconds."""
    rent = budget.find_rent(asked.gpu, read_market())
    return rent, budget.limit_s(asked.budget_usd, asked.budget_hours, rent)


def _within_budget(
    asked: Asked, grid: Grid, planned: Planned, folder: Path, rent: Rent | None, most_s: float | None, say: Say
) -> Trimmed:
    """Print the grid with its plan and the sum, and leave out what the budget does not hold."""
    missing = [cell for cell in grid.cells if _is_missing(folder, cell, asked.force)]
    timed = all(planned.plans.get(cell.variant) is None or planned_s(planned, cell) for cell in missing)
    searching_s = search_s(asked, grid, planned, folder)
    say(
        f"{len(grid.cells)} cells, {len(grid.cells) - len(missing)} of them done; {planned.data}; {planned.steps} steps"
    )
    for cell in grid.cells:
        if cell.seed in (None, grid.seeds[0] if grid.seeds else None):
            say(f"  {cell.variant}: {plan_words(planned, cell, rent)}" + _times(cell, grid))
    total_s = searching_s + sum(planned_s(planned, cell) for cell in missing)
    if total_s:
        searching = f", {format_seconds(searching_s)} of it for the learning-rate search" if searching_s else ""
        money = f", ${rent.usd(total_s):.2f} ({rent.words()})" if rent else ""
        say(f"planned: {format_seconds(total_s)} of training{searching}{money}; evaluations come on top")
    if most_s is None:
        return Trimmed(tuple(missing), ())
    if not timed or planned.device == "cpu":
        say("the budget: no times are planned for a CPU, so it is held against the time of finished cells")
        return Trimmed(tuple(missing), ())
    trimmed = budget.trim(missing, lambda cell: planned_s(planned, cell), spent_s(folder) + searching_s, most_s, rent)
    if trimmed.note:
        say(trimmed.note)
    return trimmed


def _is_missing(folder: Path, cell: Cell, force: bool) -> bool:
    record = read_cell(folder, cell)
    return record is None or record.status not in (("done",) if force else ("done", "out_of_memory"))


def _times(cell: Cell, grid: Grid) -> str:
    return "" if cell.seed is None or len(grid.seeds) == 1 else f", for each of {len(grid.seeds)} seeds"
