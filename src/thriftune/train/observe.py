"""Who watches a run: the console, the metrics file, trackers. The loop calls every observer at the same points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from thriftune.records import StepMetrics


class Observer(Protocol):
    def start(self, first_step: int, num_steps: int) -> None: ...

    def step(self, metrics: StepMetrics) -> None: ...

    def event(self, text: str) -> None: ...

    def saved(self, folder: Path) -> None: ...

    def end(self) -> None: ...


class Observers:
    """Several observers as one, called in order. Also keeps the events, for the record."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = list(observers)
        self.events: list[str] = []

    def start(self, first_step: int, num_steps: int) -> None:
        for observer in self._observers:
            observer.start(first_step, num_steps)

    def step(self, metrics: StepMetrics) -> None:
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
        self._file.write(metrics.model_dump_json() + "\n")
        self._file.flush()

    def event(self, text: str) -> None:
        pass

    def saved(self, folder: Path) -> None:
        pass

    def end(self) -> None:
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
