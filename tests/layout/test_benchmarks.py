"""The line-up of benchmarks for a rented machine: every script that it starts is there and knows the options given."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STAGES = {"beside": 1, "crowd": 2, "plan": 1, "all": 4, "rank": 1, "sizes": 2}  # scripts of ours that each starts


def lines_of(stage: str, folder: Path) -> list[str]:
    environment = {**os.environ, "DRY": "1", "PYTHON": sys.executable}
    command = [str(BENCHMARKS / "on_gpus.sh"), stage, str(folder), str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return [line.removeprefix("+ ") for line in done.stdout.splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_starts_scripts_that_take_its_words(stage: str, tmp_path: Path) -> None:
    found = [line.split() for line in lines_of(stage, tmp_path) if "/benchmarks/" in line]
    assert len(found) == STAGES[stage]
    for _, script, *words in found:
        text = Path(script).read_text(encoding="utf-8")
        for word in words:
            assert not word.startswith("--") or re.search(rf'add_argument\(\s*"{word}"', text), (script, word)


def test_what_is_done_is_taken_along(tmp_path: Path) -> None:
    lines_of("rank", tmp_path)
    kept = BENCHMARKS / "results"
    assert {path.name for path in (tmp_path / "out" / "results").iterdir()} == {path.name for path in kept.iterdir()}


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    command = [str(BENCHMARKS / "on_gpus.sh"), "everything", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no stage everything" in done.stderr
