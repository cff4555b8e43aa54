"""What a person sees: a live line on a terminal, plain lines elsewhere. No torch; results go to standard output,
everything else to standard error, so that `--json` prints one object and nothing more."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from thriftune.records import StepMetrics
from thriftune.units import format_bytes, format_count, format_seconds

MARKS = {"ok": ("ok  ", "green"), "note": ("note", "cyan"), "warn": ("WARN", "bold yellow")}


class ProgressLine:
    """Step, loss, tokens/s, memory now and peak, power, time left. Live on a terminal; every `every` steps a line.

    A run beside others has a `label`, which stands before each of its lines, and is not live; alone it has none."""

    def __init__(self, console: Console, every: int, label: str) -> None:
        self._console = console
        self._every = every
        self._label = f"{label}: " if label else ""
        self._live: Live | None = None
        self._energy_j: float | None = None  # at the last new reading
        self._since_s = 0.0  # in steps since then
        self._power_words = ""

    def start(self, first_step: int, num_steps: int) -> None:
        self._first_step, self._num_steps = first_step, num_steps
        self._started = time.perf_counter()
        if self._console.is_terminal and not self._label:
            self._live = Live(
                Text(f"step {first_step}/{num_steps}"), console=self._console, transient=True, refresh_per_second=8
            )
            self._live.start()

    def step(self, metrics: StepMetrics) -> None:
        line = self._describe(metrics)
        if self._live is not None:
            self._live.update(Text(line, overflow="ellipsis", no_wrap=True))
        due = metrics.step % self._every == 0 or metrics.step in (self._first_step + 1, self._num_steps)
        if due or metrics.eval_loss is not None:
            self._console.print(f"{self._label}{line}", markup=False, highlight=False, soft_wrap=True)

    def _describe(self, metrics: StepMetrics) -> str:
        done = metrics.step - self._first_step
        left_s = (time.perf_counter() - self._started) / done * (self._num_steps - metrics.step)
        parts = [
            f"step {metrics.step}/{self._num_steps}",
            f"loss {metrics.loss:.4f}",
            f"{format_count(round(metrics.tokens_per_s))} tokens/s",
            f"memory {format_bytes(metrics.memory_bytes)} (peak {format_bytes(metrics.peak_bytes)})",
        ]
        if metrics.eval_loss is not None:
            parts.insert(2, f"eval loss {metrics.eval_loss:.4f}")
        if metrics.energy_j is not None:
            parts.append(self._power(metrics.energy_j, metrics.step_s))
        parts.append(f"{format_seconds(left_s)} left")
        return "  ".join(parts)

    def _power(self, energy_j: float, step_s: float) -> str:
        """Energy over time since the last reading; the same again while the meter has no new one."""
        self._since_s += step_s
        if self._energy_j is None:
            self._power_words = f"{energy_j:.0f} J"
        elif energy_j > self._energy_j:
            self._power_words = f"{(energy_j - self._energy_j) / self._since_s:.0f} W"
        if energy_j != self._energy_j:
            self._energy_j, self._since_s = energy_j, 0.0
        return self._power_words

    def event(self, text: str) -> None:
        self._console.print(Text(f"{self._label}{text}", style="yellow"), soft_wrap=True)

    def saved(self, folder: Path) -> None:
        self._console.print(Text(f"{self._label}saved {folder}", style="dim"), soft_wrap=True)

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def print_audit(console: Console, lines: Sequence[tuple[str, str]], example: Sequence[tuple[str, bool]] | None) -> None:
    """The audit's verdicts, then one decoded row with its trained part coloured (or between >>> <<< without colour)."""
    for verdict, text in lines:
        mark, style = MARKS[verdict]
        console.print(Text.assemble((mark, style), "  ", text), soft_wrap=True)
    if example is None:
        return
    shown = Text("      first row: ", style="dim")
    coloured = console.is_terminal and not console.no_color
    for piece, trained in example:
        if coloured:
            shown.append(piece, style="bold green" if trained else "dim")
        else:
            shown.append(f">>>{piece}<<<" if trained else piece)
    console.print(shown, soft_wrap=True)
    console.print(Text("      (trained: " + ("green)" if coloured else ">>> <<<)"), style="dim"))
