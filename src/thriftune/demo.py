"""The demo: the main job on what ships inside the package. Tune, score before and after, show three answers."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from thriftune.errors import OutputError
from thriftune.recipe import Recipe, read_recipe
from thriftune.records import EvalResult, RunRecord, write_record
from thriftune.units import format_seconds, format_share

TASK = "reviews"
# Chosen so that base, training and tuned together stay under three minutes on two CPU cores (docs/log.md).
RECIPE = {
    "model": "pocket",
    "data": {"name": TASK, "max_samples": 1600},
    "method": "lora",
    "train": {
        "learning_rate": 2e-3,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "logging_steps": 25,
        "save_strategy": "no",
    },
}


@dataclass(frozen=True)
class DemoOutcome:
    record: RunRecord
    base: EvalResult
    tuned: EvalResult
    shown: list[dict[str, str]]
    wall_s: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "record": self.record.model_dump(mode="json"),
            "base": self.base.model_dump(mode="json"),
            "tuned": self.tuned.model_dump(mode="json"),
            "answers": self.shown,
            "wall_s": self.wall_s,
        }

    def as_text(self) -> str:
        lines = [
            "",
            f"{TASK}: {self.base.rows} held-out rows, accuracy (95 % interval)",
            *(
                f"  {name:6} {100 * result.value:5.1f} %  ({100 * result.low:.1f} to {100 * result.high:.1f})"
                for name, result in (("base", self.base), ("tuned", self.tuned))
            ),
            "",
            "three answers, before and after:",
        ]
        for answer in self.shown:
            lines += [
                f"  {answer['prompt']}",
                f"    before: {answer['before']!r}   after: {answer['after']!r}   right: {answer['target']!r}",
            ]
        share = format_share(self.record.trainable_parameters, self.record.total_parameters)
        folder = Path(self.record.adapter or "").parent
        lines += [
            "",
            f"{self.record.trainable_parameters:,} parameters trained ({share}) in "
            f"{format_seconds(self.record.train_s)}; "
            f"everything took {format_seconds(self.wall_s)}",
            f"talk to it: thriftune chat {folder}",
        ]
        return "\n".join(lines)


def run_demo(output: Path, console: Console) -> DemoOutcome:
    """Tune the pocket model on the built-in reviews into `output`, which must be absent, empty or an earlier demo."""
    from thriftune.console import ProgressLine, print_audit
    from thriftune.data import audit_lines
    from thriftune.machine import choose_device
    from thriftune.run import prepare_run, run
    from thriftune.serving import evaluate_opened, task_data
    from thriftune.target import find_target, open_target

    started = time.perf_counter()
    # The pocket model's products are too small to share; on busy cores two threads are ten times slower than one.
    torch.set_num_threads(1)
    recipe: Recipe = read_recipe(None, [], {**RECIPE, "output": str(output)})
    _clear_earlier_demo(output)
    prepared = prepare_run(recipe)
    print_audit(console, audit_lines(prepared.data.audit), None)
    record = run(
        prepared,
        observers=[ProgressLine(console, recipe.train.logging_steps)],
        command="thriftune demo",
        resume_command="thriftune demo",
    )
    data = task_data(recipe.data, TASK, None)
    results = {}
    for name, target_name in (("base", "pocket"), ("tuned", str(output))):
        opened = open_target(find_target(target_name), choose_device())
        answers = output / f"eval-{TASK}-{name}.jsonl"
        results[name] = evaluate_opened(opened, data, recipe, TASK, "test", None, answers)
        write_record(answers.with_suffix(".json"), results[name])
    shown = _three_answers(Path(results["base"].answers or ""), Path(results["tuned"].answers or ""))
    return DemoOutcome(record, results["base"], results["tuned"], shown, time.perf_counter() - started)


def _clear_earlier_demo(output: Path) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not (output / "recipe.yaml").is_file():
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
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _shortened(text: str, longest: int = 220) -> str:
    """One line without the template's marks."""
    flat = " ".join(re.sub(r"<\|\w+\|>", " ", text).split())
    return flat if len(flat) <= longest else flat[: longest - 3] + "..."
