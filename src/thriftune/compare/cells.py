"""The cells of a comparison, run one after another, each in a child; what cannot be done becomes a row that says so."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thriftune.compare.budget import Rent, Trimmed, plan_words, planned_s
from thriftune.compare.child import KILLED, Children, Ended
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

    def run(self, trimmed: Trimmed) -> list[str]:
        """Run the cells that are kept; returns notes for the report.

        Raises StoppedBySignal, DiskFullError, and what the base's evaluation refuses, since all cells would.
        """
        self._spent_s = spent_s(self.folder)
        for cell in trimmed.skipped:
            self._leave(cell, "skipped", trimmed.note)
        left = list(trimmed.kept)
        while left:
            cell = left[0]
            why = self._over_budget(left)
            if why:
                for other in left:
                    self._leave(other, "skipped", why)
                self.say(f"{why}: {len(left)} cells skipped")
                return [why]
            self._run_one(cell, left)
            left = left[1:]
        return []

    def _run_one(self, cell: Cell, left: list[Cell]) -> None:
        number = self.grid.cells.index(cell) + 1
        mark = f"[{number}/{len(self.grid.cells)}] {cell.name}"
        rate = self.rates.get(cell.method)
        self.say(f"{mark}: {plan_words(self.planned, cell, self.rent)}" + (f", learning rate {rate:g}" if rate else ""))
        started = time.perf_counter()
        ended = self.children.call("run_cell", self._job(cell, rate))
        took_s = time.perf_counter() - started
        self._spent_s += took_s
        self._took_s.setdefault(cell.variant, []).append(took_s)
        record = self._record(cell, ended)
        left_s = sum(self._expected_s(other) for other in left[1:])
        ahead = f"; about {format_seconds(left_s)} left" if left_s else ""
        self.say(f"{mark}: {self._outcome(cell, record)}, {format_seconds(took_s)} in all{ahead}")

    def _job(self, cell: Cell, rate: float | None) -> CellJob:
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

    def _over_budget(self, left: list[Cell]) -> str:
        """Why no further cell is started, '' while one may be. A new seed is begun only if all of it fits."""
        if self.most_s is None:
            return ""
        if self._spent_s >= self.most_s:
            return f"the budget is used up after {format_seconds(self._spent_s)}"
        seed = left[0].seed
        first = self.grid.seeds[0] if self.grid.seeds else None
        if seed in (None, first) or any(self._is_begun(cell) for cell in self.grid.cells if cell.seed == seed):
            return ""
        needed_s = sum(self._expected_s(cell) for cell in left if cell.seed == seed)
        if self._spent_s + needed_s <= self.most_s:
            return ""
        return (
            f"the budget of {format_seconds(self.most_s)} does not hold seed {seed} of every method, after "
            f"{format_seconds(self._spent_s)}"
        )

    def _is_begun(self, cell: Cell) -> bool:
        record = read_cell(self.folder, cell)
        return record is not None and record.status != "skipped"
