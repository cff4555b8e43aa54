"""The cells of a comparison, each run in a child, one after another or several at once; what cannot be done becomes a
row that says so."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thriftune.compare.budget import Rent, Trimmed, plan_words, planned_s
from thriftune.compare.child import KILLED, Children, Ended, Seat, Work, seats
from thriftune.compare.folder import cell_folder, read_cell, spent_s
from thriftune.compare.grid import BASE, Cell, Grid
from thriftune.compare.jobs import Asked, CellJob, Planned, Question
from thriftune.compare.search import Say
from thriftune.errors import DiskFullError, InputError, StoppedBySignal
from thriftune.records import CellRecord, RunRecord, read_record, write_record
from thriftune.units import format_bytes, format_seconds


@dataclass
class CellRunner:
    """`rates`: method -> the searched learning rate. `most_s`: the budget in seconds, None for none."""

    asked: Asked
    grid: Grid
    question: Question
    planned: Planned
    folder: Path
    children: Children
    rates: dict[str, float]
    rent: Rent | None
    most_s: float | None
    say: Say
    _spent_s: float = 0.0
    _took_s: dict[str, list[float]] = field(default_factory=dict)  # variant -> seconds of its cells, all told
    _left: list[Cell] = field(default_factory=list)
    _running: dict[str, tuple[Cell, float]] = field(default_factory=dict)  # name -> the cell, and when it began
    _notes: list[str] = field(default_factory=list)

    def run(self, trimmed: Trimmed) -> list[str]:
        """Run the cells that are kept; returns notes for the report.

        Raises StoppedBySignal, DiskFullError, and what the base's evaluation refuses, since all cells would.
        """
        self._spent_s = spent_s(self.folder)
        for cell in trimmed.skipped:
            self._leave(cell, "skipped", trimmed.note)
        self._left = list(trimmed.kept)
        self.children.work_through(seats(self.asked.at_once), self._following, self._ended)
        return self._notes

    def _following(self, seat: Seat) -> Work | None:
        if not self._left:
            return None
        why = self._over_budget()
        if why:
            for other in self._left:
                self._leave(other, "skipped", why)
            self.say(f"{why}: {len(self._left)} cells skipped")
            self._notes.append(why)
            self._left = []
            return None
        cell = self._left.pop(0)
        rate = self.rates.get(cell.method)
        words = plan_words(self.planned, cell, self.rent) + (f", learning rate {rate:g}" if rate else "")
        self.say(f"{self._mark(cell)}: {words}")
        self._running[cell.name] = (cell, time.perf_counter())
        return Work(cell, "run_cell", self._job(cell, rate, seat))

    def _ended(self, work: Work, ended: Ended) -> None:
        cell, started = self._running.pop(work.key.name)
        took_s = time.perf_counter() - started
        self._spent_s += took_s
        self._took_s.setdefault(cell.variant, []).append(took_s)
        record = self._record(cell, ended)
        left_s = (sum(map(self._expected_s, self._left)) + self._running_s()) / self.asked.at_once
        ahead = f"; about {format_seconds(left_s)} left" if left_s else ""
        self.say(f"{self._mark(cell)}: {self._outcome(cell, record)}, {format_seconds(took_s)} in all{ahead}")

    def _mark(self, cell: Cell) -> str:
        return f"[{self.grid.cells.index(cell) + 1}/{len(self.grid.cells)}] {cell.name}"

    def _running_s(self) -> float:
        """Expected of the cells that run now, from their beginning."""
        return sum(self._expected_s(cell) for cell, _ in self._running.values())

    def _job(self, cell: Cell, rate: float | None, seat: Seat) -> CellJob:
        folder = cell_folder(self.folder, cell)
        return CellJob(
            folder=folder,
            method=cell.method,
            variant=cell.variant,
            seed=cell.seed,
            overrides=cell.overrides,
            recipe=cell.recipe(str(folder), rate),
            plan=self.planned.plans.get(cell.variant) if cell.method != BASE else None,
            question=self.question,
            force=self.asked.force,
            command=self.asked.command,
            at_once=self.asked.at_once,
            sharing=seat.sharing,
        )

    def _record(self, cell: Cell, ended: Ended) -> CellRecord:
        """What the child left, or why it left nothing."""
        if isinstance(ended.value, CellRecord):
            return ended.value
        if isinstance(ended.error, (StoppedBySignal, DiskFullError)):
            raise ended.error
        if isinstance(ended.error, InputError) and cell.method == BASE:
            raise ended.error
        if ended.error is not None:
            return self._leave(cell, "failed", f"{ended.error.given}; {ended.error.do}")
        if ended.killed_by == KILLED:
            plan = plan_words(self.planned, cell, None)
            reason = f"killed by the system, as it does when memory runs out ({plan})"
            return self._leave(cell, "out_of_memory", reason)
        return self._leave(cell, "failed", ended.crash or f"killed by signal {ended.killed_by}")

    def _leave(self, cell: Cell, status: Any, reason: str) -> CellRecord:
        record = CellRecord(
            status=status,
            reason=reason,
            method=cell.method,
            variant=cell.variant,
            seed=cell.seed,
            overrides=cell.overrides,
            plan=self.planned.plans.get(cell.variant) if cell.method != BASE else None,
        )
        write_record(cell_folder(self.folder, cell) / "cell.json", record)
        return record

    def _outcome(self, cell: Cell, record: CellRecord) -> str:
        """'accuracy 0.9301, peak 5.11 GiB (planned 5.20 GiB), trained in 12 min', or why it is not done."""
        if record.result is None:
            return f"{record.status.replace('_', ' ')}: {record.reason}"
        words = f"{record.result.metric} {record.result.value:.4f}"
        path = cell_folder(self.folder, cell) / "record.json"
        if cell.method == BASE or not path.is_file():
            return words
        run = read_record(path, RunRecord)
        measured = run.reserved_bytes or run.peak_bytes
        plan = f" (planned {format_bytes(record.plan.peak_bytes)})" if record.plan else ""
        return f"{words}, peak {format_bytes(measured)}{plan}, trained in {format_seconds(run.train_s)}"

    def _expected_s(self, cell: Cell) -> float:
        """Of finished cells of this variant, else the plan's training, else the mean over all finished ones."""
        own = self._took_s.get(cell.variant)
        if own:
            return sum(own) / len(own)
        known = [seconds for variant, found in self._took_s.items() if variant != BASE for seconds in found]
        return planned_s(self.planned, cell) or (sum(known) / len(known) if known else 0.0)

    def _over_budget(self) -> str:
        """Why no further cell is started, '' while one may be. A new seed is begun only if all of it fits."""
        left = self._left
        if self.most_s is None:
            return ""
        if self._spent_s >= self.most_s:
            return f"the budget is used up after {format_seconds(self._spent_s)}"
        seed = left[0].seed
        first = self.grid.seeds[0] if self.grid.seeds else None
        if seed in (None, first) or any(self._is_begun(cell) for cell in self.grid.cells if cell.seed == seed):
            return ""
        needed_s = sum(self._expected_s(cell) for cell in left if cell.seed == seed) + self._running_s()
        if self._spent_s + needed_s <= self.most_s:
            return ""
        return (
            f"the budget of {format_seconds(self.most_s)} does not hold seed {seed} of every method, after "
            f"{format_seconds(self._spent_s)}"
        )

    def _is_begun(self, cell: Cell) -> bool:
        record = read_cell(self.folder, cell)
        return cell.name in self._running or (record is not None and record.status != "skipped")
