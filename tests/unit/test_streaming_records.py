"""Streamed layers as measured (benchmarks/results/streaming): the least that was asked, the plan, and the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "claims"))
from streamed import planned_streamed, recorded

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "streaming"
MODELS = {"70B": "Llama-3.1-70B", "123B": "Mistral-Large-Instruct-2407"}


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def test_speeds_reach_what_was_asked() -> None:
    resident = recorded("70B", "2x2048", None, resident_engine=True)["tokens_per_s"]
    assert recorded("70B", "2x2048", 24)["tokens_per_s"] >= 0.85 * resident
    assert recorded("70B", "gsm8k", 24)["tokens_per_s"] >= 800
    assert recorded("123B", "2x2048", 24)["tokens_per_s"] >= 720
    assert recorded("8B", "2x2048", 6)["tokens_per_s"] >= 8000


def test_memory_stays_below_the_cap() -> None:
    capped = [row for row in lines("steps.jsonl") if row["stage"] == "steps" and row["cap_gib"] and row["peak_gib"] > 1]
    assert len(capped) >= 10
    assert all(row["peak_gib"] <= row["cap_gib"] - 0.5 for row in capped)


def test_speed_rises_with_the_cap_where_copies_are_not_hidden() -> None:
    """1,024 tokens a step: too few to hide a layer's copy, so every resident layer counts."""
    rows = [row for row in lines("steps.jsonl") if (row["stage"], row.get("batch")) == ("steps", "1x1024")]
    speeds = {row["cap_gib"]: row["tokens_per_s"] for row in rows}
    assert list(speeds) == [12, 16, 24, 40] and list(speeds.values()) == sorted(speeds.values())
    waited = [row["waited_s"] for row in rows]
    assert waited == sorted(waited, reverse=True) and waited[0] > 0.5 and waited[-1] < 0.001
    assert all(row["copy_s"] < row["step_s"] and row["compute_s"] <= row["step_s"] for row in rows)


def test_host_memory_is_that_of_the_slabs() -> None:
    hosts = [row for row in lines("steps.jsonl") if row["stage"] == "host" and row["model"] != "tiny"]
    assert {row["model"] for row in hosts} >= {"8B", "70B", "123B"}
    assert all(row["resident_set_over_slabs"] <= 0.04 for row in hosts)


def test_gradients_were_equal_and_planted_bugs_found() -> None:
    found = lines("equality.jsonl")
    assert {row["model"] for row in found} >= {"8B", "70B", "123B"}
    assert all(row["as_it_must_be"] for row in found)


@pytest.mark.parametrize("cap_gib", [12, 16, 24, 40])
def test_the_plan_of_a_70b_is_near_and_never_under(cap_gib: int) -> None:
    ran = recorded("70B", "2x2048", cap_gib)
    plan, time = planned_streamed(MODELS["70B"], "h100-sxm", [f"max_memory={cap_gib}GiB"])
    assert time.step_s == pytest.approx(ran["step_s"], rel=0.15)
    assert ran["peak_gib"] <= plan.memory.peak_bytes / 2**30 <= cap_gib
    assert plan.offload.inputs_on_host == ran["inputs_on_host"]
    assert abs(plan.offload.resident - ran["resident"]) <= 3


def test_the_pages_numbers_are_the_records() -> None:
    table = (ROOT / "docs" / "streaming.md").read_text(encoding="utf-8").partition("## Measured")[2]
    for row in lines("steps.jsonl"):
        if row["stage"] == "steps" and row["model"] != "tiny":
            assert f"| {row['tokens_per_s']:,} |" in table, row
