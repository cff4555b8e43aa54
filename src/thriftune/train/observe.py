"""Who watches a run: the console, the metrics file, trackers. The loop calls every observer at the same points."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from thriftune.errors import DiskFullError, OutputError
from thriftune.records import StepMetrics
from thriftune.train.checkpoint import is_disk_full, last_good


class Observer(Protocol):
    def start(self, first_step: int, num_steps: int) -> None: ...

    def step(self, metrics: StepMetrics) -> None: ...

    def event(self, text: str) -> None: ...

    def saved(self, folder: Path) -> None: ...

    def end(self) -> None: ...


class Observers:
    """Several observers as one, called in order. Also keeps the events and the last step's numbers, for the record."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = list(observers)
        self.events: list[str] = []
        self.started = False
        self.last: StepMetrics | None = None

    def start(self, first_step: int, num_steps: int) -> None:
        self.started = True
        for observer in self._observers:
            observer.start(first_step, num_steps)

    def step(self, metrics: StepMetrics) -> None:
        self.last = metrics
        for observer in self._observers:
            observer.step(metrics)

    def event(self, text: str) -> None:
        self.events.append(text)
        for observer in self._observers:
            observer.event(text)

    def saved(self, folder: Path) -> None:
        for observer in self._observers:
            observer.saved(folder)

    def end(self) -> None:
        for observer in self._observers:
            observer.end()


class MetricsFile:
    """metrics.jsonl: one StepMetrics a line, flushed as it comes; a resumed run goes on after its checkpoint's step."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, first_step: int, num_steps: int) -> None:
        kept = [metrics for metrics in read_metrics(self._path) if metrics.step <= first_step] if first_step else []
        self._file = self._path.open("w", encoding="utf-8")
        for metrics in kept:
            self.step(metrics)

    def step(self, metrics: StepMetrics) -> None:
        try:
            self._file.write(metrics.model_dump_json() + "\n")
            self._file.flush()
        except OSError as error:
            given = f"step {metrics.step} cannot be written to {self._path}: {error.strerror or error}"
            good = last_good(self._path.parent)
            if is_disk_full(error):
                raise DiskFullError(
                    given=given, allowed="a disk with room", do=f"free some space and resume; {good}"
                ) from None
            raise OutputError(
                given=given, allowed="a file you may write to", do=f"mend that and resume; {good}"
            ) from None

    def event(self, text: str) -> None:
        pass

    def saved(self, folder: Path) -> None:
        pass

    def end(self) -> None:
        with suppress(OSError):  # every step was flushed; what cannot be written now was refused aloud before
            self._file.close()


def read_metrics(path: Path) -> list[StepMetrics]:
    """The steps of a metrics.jsonl; a last line cut by a crash is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(StepMetrics.model_validate_json(line))
        except ValueError:
            break
    return found
