"""The runs of the learning-rate search, method by method; what has been tried is kept and not tried again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from thriftune.compare.budget import planned_s
from thriftune.compare.child import KILLED, Children, Ended, value_of
from thriftune.compare.grid import BASE, Cell, Grid
from thriftune.compare.jobs import Asked, Planned, RateJob
from thriftune.compare.rates import (
    MOST_HELD_OUT,
    USUAL_RATES,
    Tried,
    best_rate,
    default_rate,
    held_out_share,
    read_search,
    search_rates,
    search_recipe,
    search_steps,
    write_search,
)
from thriftune.errors import DiskFullError, DoesNotFitError

Say = Callable[[str], None]
DIVERGED = "diverged"


def _searched(asked: Asked, grid: Grid) -> list[Cell]:
    """For each method whose rate is to be searched, its first cell."""
    first: dict[str, Cell] = {}
    for cell in grid.cells:
        if asked.searches and cell.method != BASE and not cell.rate_given:
            first.setdefault(cell.method, cell)
    return list(first.values())


def search_s(asked: Asked, grid: Grid, planned: Planned, folder: Path) -> float:
    """Planned seconds of the searches that are not finished."""
    chosen = read_search(folder / "search").get("methods", {})
    cells = [cell for cell in _searched(asked, grid) if not chosen.get(cell.method, {}).get("chosen")]
    share = search_steps(planned.steps) / planned.steps
    return sum(USUAL_RATES * share * planned_s(planned, cell) for cell in cells)


def search_all(
    asked: Asked, grid: Grid, planned: Planned, folder: Path, children: Children, say: Say
) -> dict[str, float]:
    """Method -> its learning rate, searched or found in search.json; a method without one keeps its default."""
    place = folder / "search"
    search = read_search(place)
    rates = {}
    for cell in _searched(asked, grid):
        before = search.get("methods", {}).get(cell.method, {})
        if before.get("chosen") is None:
            search, chosen = _search_method(asked, grid, cell, planned, place, search, children, say)
        else:
            chosen = float(before["chosen"])
        if chosen is not None:
            rates[cell.method] = chosen
    return rates


def _search_method(
    asked: Asked, grid: Grid, cell: Cell, planned: Planned, place: Path, search: dict[str, Any], children: Children,
    say: Say,
) -> tuple[dict[str, Any], float | None]:  # fmt: skip
    method = cell.method
    known = {float(one["learning_rate"]): one for one in search.get("methods", {}).get(method, {}).get("tried", [])}
    found: list[Tried] = []
    steps = search_steps(planned.steps)
    facts = {
        "split": f"{grid.recipe.data.split}, {_held_out_words(planned.rows)}",
        "steps": steps,
        "steps_of_a_cell": planned.steps,
    }

    def measure(rate: float) -> Tried:
        nonlocal search
        one = known.get(rate)
        if one is not None and (one["value"] is not None or one["reason"] == DIVERGED):
            tried = Tried(rate, one["value"], one["reason"])
        else:
            output = place / method / f"{rate:g}"
            recipe = search_recipe(cell, rate, planned.steps, planned.rows, grid.seeds, output)
            say(f"search {method}: learning rate {rate:g}, {steps} steps")
            tried = _tried(rate, children.call("try_rate", RateJob(recipe, asked.force, asked.command)))
            came = tried.reason if tried.loss is None else f"eval loss {tried.loss:.4f}"
            say(f"search {method}: learning rate {rate:g}: {came}")
        found.append(tried)
        search = write_search(place, search, method, found, None, facts)
        if tried.reason not in ("", DIVERGED):
            raise DoesNotFitError(given=tried.reason, allowed="a search that fits", do="give the learning rate")
        return tried

    try:
        search_rates(default_rate(method), measure)
    except DoesNotFitError as error:
        say(f"search {method}: {error.given}; its cells take the default rate {default_rate(method):g}")
        return search, None
    chosen = best_rate(found)
    if chosen is None:
        say(f"search {method}: no rate gave a finite loss; its cells take the default {default_rate(method):g}")
    else:
        say(f"search {method}: took {chosen:g}")
    return write_search(place, search, method, found, chosen, facts), chosen


def _tried(rate: float, ended: Ended) -> Tried:
    if isinstance(ended.error, DoesNotFitError) and not isinstance(ended.error, DiskFullError):
        return Tried(rate, None, ended.error.given)
    if ended.killed_by == KILLED:
        return Tried(rate, None, "killed by the system, as it does when memory runs out")
    loss = value_of(ended)
    return Tried(rate, loss, "" if loss is not None else DIVERGED)


def _held_out_words(rows: int) -> str:
    return f"{held_out_share(rows):.2%} of the rows held out, at most {MOST_HELD_OUT:,} of them scored"
