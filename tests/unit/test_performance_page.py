"""docs/performance.md is what benchmarks/engine/write_performance.py writes from the records."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "engine"))

from rows_compared import ROWS
from write_performance import PAGE, PROFILES, TABLE, TRACED, page


def test_the_page_is_that_of_the_records() -> None:
    again = "run `python benchmarks/engine/write_performance.py --write`"
    assert PAGE.read_text(encoding="utf-8") == page(), again


def test_all_rows_are_of_one_gpu_and_above_what_must_be_reached() -> None:
    for name, row in ROWS.items():
        files = ["thriftune", *(f"peer{index}" for index in range(len(row.peers)))]
        records = [json.loads((TABLE / f"{name}.{file}.json").read_text()) for file in files]
        assert {record["hardware"]["gpu"] for record in records} == {"NVIDIA H200"}, name
        assert records[0]["tokens_per_s"] >= row.must and not records[0]["events"], name
        assert records[0]["first_step_s"] <= 6


def test_what_was_traced_adds_up_to_its_step() -> None:
    for name in TRACED:
        found = json.loads((PROFILES / f"{name}.json").read_text())
        assert sum(found["kinds_ms"].values()) <= 1000 * found["step_s"]
        assert sum(row["ms"] for row in found["rows"]) > 0.98 * found["kernels_ms"]
