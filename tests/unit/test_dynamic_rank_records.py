"""The dynamic-rank comparison as measured (benchmarks/results/dynamic-rank): its table, and docs/dynamic_rank.md."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "dynamic-rank"
PAGE = (ROOT / "docs" / "dynamic_rank.md").read_text(encoding="utf-8").partition("## Measured")[2]
ARMS = {
    "lora": "LoRA r=64",
    "lora-half": "LoRA r=32",
    "dynamic": "**dynamic, 64 to half**",
    "random": "the same, directions by chance",
    "shrunk": "LoRA r=64, shrunk afterwards",
    "adalora": "AdaLoRA, 64 to 32",
}


def table() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / "table.json").read_text(encoding="utf-8"))
    return rows


def told(row: dict[str, Any], estimate: str, sign: str, between: str) -> str:
    """'91.04 | 90.31 to 91.77': accuracies in percent, losses as they are."""
    if f"{estimate}_mean" not in row:
        return " | "
    factor, digits = (100, 2) if row["task"] == "imdb" else (1, 4)
    mean, low, high = (f"{factor * row[f'{estimate}_{part}']:{sign}.{digits}f}" for part in ("mean", "low", "high"))
    return f"{mean}{between}{low} to {high}"


def test_the_table_is_what_the_records_give() -> None:
    script = ROOT / "benchmarks" / "dynamic_rank" / "run.py"
    command = [sys.executable, str(script), "--results", str(RESULTS), "--table"]
    before = (RESULTS / "table.json").read_bytes()
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    of_arms = [line.split() for line in printed if line.split()[:1] and line.split()[0] in ARMS and "- " not in line]
    rows = table()
    assert len(of_arms) == len(rows) == 12
    for words, row in zip(of_arms, rows, strict=True):
        assert words[:4] == [row["arm"], f"{row['rate']:g}", "3", f"{row['parameters']:,}"], "no mark of an edge"
        for estimate in ("score", "minus_lora", "minus_lora-half"):
            if f"{estimate}_mean" in row:
                assert f"{row[f'{estimate}_mean']:.4f}" in words and f"{row[f'{estimate}_low']:+.4f}" in words
    assert (RESULTS / "table.json").read_bytes() == before


def test_the_pages_scores_are_the_records() -> None:
    for row in table():
        cells = [
            *(ARMS[row["arm"]], f"{row['rate']:g}", f"{row['parameters']:,}"),
            *(told(row, "score", "", " | "), told(row, "minus_lora", "+", " | ")),
            told(row, "minus_lora-half", "+", " | "),
        ]
        line = "".join(f"| {cell} " for cell in cells) + "|"
        assert " ".join(line.split()) in PAGE, line
        for other in ("random", "shrunk", "adalora") if row["arm"] == "dynamic" else ():
            interval = told(row, f"minus_{other}", "+", "; ").partition("; ")[2]
            assert interval in " ".join(PAGE.split()), (row["task"], other)


def test_the_pages_bytes_and_times_are_the_records() -> None:
    record = json.loads((RESULTS / "sizes-8b.json").read_text(encoding="utf-8"))
    run, found = record["runs"]["dynamic"], record["compared"]
    held, copies = run["held_bytes"], run["copies_bytes"]
    for cut in run["cuts"]:
        here, there = cut["step"] - 1, cut["step"]
        cells = [
            f"{cut['step']}",
            f"{cut['parameters_before']:,} -> {cut['parameters_after']:,}",
            f"{held[here] / 1e9:.3f} -> {held[there] / 1e9:.3f}",
            f"{(held[here] - copies[here]) / 1e9:.3f} -> {(held[there] - copies[there]) / 1e9:.3f}",
            f"{cut['loss_before']:.3f} -> {cut['loss_after']:.3f}",
            f"{cut['cut_s']:.2f}",
        ]
        assert f"| {' | '.join(cells)} |" in PAGE
    text = " ".join(PAGE.split())
    assert found["fall"]["with_copies"] >= 0.45
    for words in (
        f"found {100 * found['fall']['with_copies']:.1f} %**",
        f"{100 * found['fall']['without_copies']:.1f} % without the copies",
        f"it is {found['wall_ratio_of_these_steps']:.2f}**",
        f"{found['dynamic_step_s']:.4f} s over all phases and {found['lora_step_s']:.4f} s",
        f"cost {found['of_cuts_s']:.1f} s in all: {sum(found['cut_s']):.1f} s",
        f"From {math.ceil(found['steps_from_which_under_1.02'])} steps on",
        f"at 1,000 steps it is {found['wall_ratio_of_1000_steps']:.2f}",
        f"from {math.ceil(found['of_cuts_s'] / 0.02 / found['lora_step_s'])} steps on",
    ):
        assert words in text, words
