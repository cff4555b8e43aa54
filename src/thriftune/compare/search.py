"""The runs of the learning-rate search, method by method; what has been tried is kept and not tried again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thriftune.compare.budget import planned_s
from thriftune.compare.child import KILLED, Children, Ended, Seat, Work, seats, value_of
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
    search_recipe,
    search_steps,
    waves_of_rates,
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
    search = Search(asked, grid, planned, folder / "search", say)
    children.work_through(seats(asked.tries_at_once), search.following, search.ended)
    return search.rates


@dataclass
class _Method:
    """The search of one method. `order`: rates in the order in which they were asked for; `wave`: those of now."""

    cell: Cell
    waves: Generator[list[float], list[Tried], None]
    known: dict[float, dict[str, Any]]  # from search.json
    order: list[float] = field(default_factory=list)
    wave: list[float] = field(default_factory=list)
    found: dict[float, Tried] = field(default_factory=dict)
    done: bool = False


class Search:
    """All searches of a comparison, whose tries may run at the same time. `rates` is what they have come to."""

    def __init__(self, asked: Asked, grid: Grid, planned: Planned, place: Path, say: Say) -> None:
        self.rates: dict[str, float] = {}
        self._asked, self._grid, self._planned, self._place, self._say = asked, grid, planned, place, say
        self._steps = search_steps(planned.steps)
        self._facts = {
            "split": f"{grid.recipe.data.split}, {_held_out_words(planned.rows)}",
            "steps": self._steps,
            "steps_of_a_cell": planned.steps,
        }
        self._written = read_search(place)
        self._waiting: deque[tuple[_Method, float]] = deque()
        for cell in _searched(asked, grid):
            before = self._written.get("methods", {}).get(cell.method, {})
            if before.get("chosen") is not None:
                self.rates[cell.method] = float(before["chosen"])
                continue
            known = {float(one["learning_rate"]): one for one in before.get("tried", [])}
            method = _Method(cell, waves_of_rates(default_rate(cell.method)), known)
            self._begin(method, next(method.waves))

    def following(self, _: Seat) -> Work | None:
        """The next try."""
        while self._waiting:
            method, rate = self._waiting.popleft()
            if method.done:
                continue
            output = self._place / method.cell.method / f"{rate:g}"
            recipe = search_recipe(method.cell, rate, self._planned.steps, self._planned.rows, self._grid.seeds, output)
            self._say(f"search {method.cell.method}: learning rate {rate:g}, {self._steps} steps")
            return Work(
                (method, rate),
                "try_rate",
                RateJob(recipe, self._asked.force, self._asked.command, self._asked.tries_at_once),
            )
        return None

    def ended(self, work: Work, how: Ended) -> None:
        """Keep what came of a try. Raises what is no matter of the rate."""
        method, rate = work.key
        tried = _tried(rate, how)
        came = tried.reason if tried.loss is None else f"eval loss {tried.loss:.4f}"
        self._say(f"search {method.cell.method}: learning rate {rate:g}: {came}")
        self._keep(method, tried)

    def _begin(self, method: _Method, wave: list[float]) -> None:
        """Ask for these rates, but for those that an earlier go has tried."""
        method.wave = wave
        method.order += wave
        for rate in wave:
            one = method.known.get(rate)
            if one is not None and (one["value"] is not None or one["reason"] == DIVERGED):
                self._keep(method, Tried(rate, one["value"], one["reason"]))
            else:
                self._waiting.append((method, rate))

    def _keep(self, method: _Method, tried: Tried) -> None:
        method.found[tried.rate] = tried
        self._write(method, None)
        if method.done:
            return
        if tried.reason not in ("", DIVERGED):
            name = method.cell.method
            self._say(f"search {name}: {tried.reason}; its cells take the default rate {default_rate(name):g}")
            method.done = True
        elif all(rate in method.found for rate in method.wave):
            try:
                self._begin(method, method.waves.send([method.found[rate] for rate in method.wave]))
            except StopIteration:
                self._choose(method)

    def _choose(self, method: _Method) -> None:
        name, chosen = method.cell.method, best_rate(method.found.values())
        method.done = True
        self._write(method, chosen)
        if chosen is None:
            self._say(f"search {name}: no rate gave a finite loss; its cells take the default {default_rate(name):g}")
            return
        self.rates[name] = chosen
        self._say(f"search {name}: took {chosen:g}")

    def _write(self, method: _Method, chosen: float | None) -> None:
        found = [method.found[rate] for rate in method.order if rate in method.found]
        self._written = write_search(self._place, self._written, method.cell.method, found, chosen, self._facts)


def _tried(rate: float, ended: Ended) -> Tried:
    if isinstance(ended.error, DoesNotFitError) and not isinstance(ended.error, DiskFullError):
        return Tried(rate, None, ended.error.given)
    if ended.killed_by == KILLED:
        return Tried(rate, None, "killed by the system, as it does when memory runs out")
    loss = value_of(ended)
    return Tried(rate, loss, "" if loss is not None else DIVERGED)


def _held_out_words(rows: int) -> str:
    return f"{100 * held_out_share(rows):.3g} % of the rows held out, at most {MOST_HELD_OUT:,} of them scored"
