"""The demo: a whole comparison on what ships inside the package, its page, and three answers before and after."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thriftune.compare import Asked, compare
from thriftune.errors import OutputError
from thriftune.records import ReportRecord
from thriftune.report import report_text
from thriftune.units import format_seconds

TASK = "reviews"
METHODS = ("base", "full", "lora", "qlora")
SEED = "42"
SHOWN = "lora"  # whose answers are shown
# Chosen so that everything stays under four minutes on two CPU cores. Of three rates a method, these had the lowest
# loss on held-out rows of the training split after nearly as many steps (docs/compare.md).
WORDS = (
    *("per_device_train_batch_size=8", "gradient_accumulation_steps=1"),
    *("full:learning_rate=3.2e-4", "lora:learning_rate=2e-3", "qlora:learning_rate=2e-3"),
    *("logging_steps=50", "save_strategy=no"),
)


@dataclass(frozen=True)
class DemoOutcome:
    """`failed`: cells that did not come to their end."""

    report: ReportRecord
    shown: list[dict[str, str]]
    folder: Path
    wall_s: float
    failed: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "report": self.report.model_dump(mode="json"),
            "answers": self.shown,
            "page": str(self.folder / "report.html"),
            "wall_s": self.wall_s,
        }

    def as_text(self) -> str:
        lines = [report_text(self.report), "", f"three answers, before and after {SHOWN}:"]
        for answer in self.shown:
            lines += [
                f"  {answer['prompt']}",
                f"    before: {answer['before']!r}   after: {answer['after']!r}   right: {answer['target']!r}",
            ]
        lines += [
            "",
            f"everything took {format_seconds(self.wall_s)}; the page: {self.folder / 'report.html'}",
            f"talk to it: thriftune chat {self.folder / 'cells' / f'{SHOWN}-seed{SEED}'}",
        ]
        return "\n".join(lines)


def run_demo(output: Path, say: Callable[[str], None], limit: int | None) -> DemoOutcome:
    """Compare the methods on the pocket model and the built-in reviews, in `output`, which must be absent, empty or an
    earlier demo. `limit`: score only so many rows.

    Raises OutputError for a folder with something else in it, StoppedBySignal.
    """
    started = time.perf_counter()
    # The pocket model's products are too small to share; on busy cores two threads are ten times slower than one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _clear_earlier_demo(output)
    compared = compare(
        Asked(
            words=WORDS,
            config=None,
            values={"model": "pocket", "data": TASK},
            methods=METHODS,
            seeds=f"{SEED},",
            task=TASK,
            split="test",
            limit=limit,
            general_text=None,
            output=output,
            searches=False,
            at_once=1,
            tries_at_once=1,
            gpu=None,
            budget_usd=None,
            budget_hours=None,
            force=False,
            command="thriftune demo",
        ),
        say,
    )
    answers = [output / "cells" / name / f"eval-{TASK}.jsonl" for name in ("base", f"{SHOWN}-seed{SEED}")]
    shown = _three_answers(*answers) if all(path.is_file() for path in answers) else []
    return DemoOutcome(compared.report, shown, output, time.perf_counter() - started, compared.failed)


def open_page(folder: Path) -> bool:
    """Show the page in a browser where a person is at a screen. True when one was asked to."""
    screen = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not screen or not sys.stdout.isatty():
        return False
    return webbrowser.open((folder / "report.html").resolve().as_uri())


def _clear_earlier_demo(output: Path) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not any((output / name).is_file() for name in ("compare.yaml", "recipe.yaml")):
        raise OutputError(
            given=f"{output} exists and is no earlier demo",
            allowed="a new or empty folder, or an earlier demo's",
            do="name another --output",
        )
    shutil.rmtree(output)


def _three_answers(before: Path, after: Path) -> list[dict[str, str]]:
    """Three held-out rows with what was generated before and after: the first ones that the tuning changed."""
    rows = [
        {
            "prompt": _shortened(tuned["prompt"]),
            "before": _shortened(base["answer"]),
            "after": _shortened(tuned["answer"]),
            "target": tuned["target"],
        }
        for base, tuned in zip(_lines(before), _lines(after), strict=True)
    ]
    changed = [row for row in rows if row["before"] != row["after"]]
    return (changed + rows)[:3]


def _lines(path: Path) -> list[dict[str, Any]]:
    # Only \n separates rows: str.splitlines would also break at U+2028 inside an answer.
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _shortened(text: str, longest: int = 220) -> str:
    """One line without the template's marks."""
    flat = " ".join(re.sub(r"<\|\w+\|>", " ", text).split())
    return flat if len(flat) <= longest else flat[: longest - 3] + "..."
