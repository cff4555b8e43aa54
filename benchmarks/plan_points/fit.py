"""Fit the planner's time constants on one half of the measured points and report memory and time on the other half.

    python benchmarks/plan_points/fit.py benchmarks/results/plan-h200/points*.jsonl \
        --report benchmarks/results/plan-h200/report.json

Memory has no fitted constant but those of fragmentation; time has those of thriftune.plan.time.Efficiency. The halves
are drawn by a seed. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from shapes_measured import SHAPES

from thriftune.catalog.gpus import find_gpu
from thriftune.plan.adapter import adapter_of
from thriftune.plan.memory import memory_of, setup_of
from thriftune.plan.time import GENERIC, Efficiency, time_with
from thriftune.plan.values import Packed, Work
from thriftune.recipe import read_recipe
from thriftune.shapes import from_config

ROWS, ACCUMULATION, PROMPT_SHARE = 4, 4, 0.45
HALVES = ("fitted", "held out")
ERRORS = ("allocated_error", "reserved_error", "step_error")
FITTED = [field.name for field in fields(Efficiency) if field.name != "measured"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=Path, nargs="+")
    parser.add_argument("--report", type=Path)
    parser.add_argument(
        "--refit", action="store_true", help="search the constants anew instead of taking the package's"
    )
    arguments = parser.parse_args()
    points = [
        row for path in arguments.points for row in map(json.loads, path.read_text().splitlines()) if "model" in row
    ]
    points = [
        row for row in points if row["status"] == "done" and row["model"] in SHAPES and row.get("path") != "engine"
    ]
    drawn = random.Random(0)
    order = sorted(range(len(points)), key=lambda _: drawn.random())
    fitting = {index for place, index in enumerate(order) if place % 2 == 0}
    inputs = [planner_input(row) for row in points]
    reached = GENERIC
    if arguments.refit:
        reached = search([inputs[index] for index in sorted(fitting)], [points[index] for index in sorted(fitting)])
        print({name: float(f"{getattr(reached, name):.3g}") for name in FITTED})
    rows = [compare(row, given, reached) | {"half": "fitted" if index in fitting else "held out"}
            for index, (row, given) in enumerate(zip(points, inputs, strict=True))]  # fmt: skip
    show(rows)
    if arguments.report:
        arguments.report.write_text(json.dumps({"points": rows, "summary": summary(rows)}, indent=1) + "\n")


def work_of_point(row: dict[str, Any]) -> Work:
    """The very micro-batches that ran: rows of known lengths, each step's longest first."""
    if row["lengths"] is None:
        rows, length = (int(part) for part in row["batch"].split("x"))
        tokens = float(rows * length)
        packed = packed_of([[length] * rows], 0.0)
        return Work(rows, length, length - 1, 0, 0, 1, tokens, tokens, tokens, row["steps"], 0, row["batch"], packed)
    first, later = [0, 0], [0, 0]
    tokens = padded = positions = 0
    a_step = ROWS * ACCUMULATION
    for step in range(row["steps"]):
        lengths = sorted(row["lengths"][step * a_step : (step + 1) * a_step], reverse=True)
        tokens += sum(lengths)
        for start in range(0, a_step, ROWS):
            batch = lengths[start : start + ROWS]
            reach = batch[0] - 1 - min(max(int(length * PROMPT_SHARE) - 1, 0) for length in batch)
            extreme = later if start else first
            extreme[0], extreme[1] = max(extreme[0], batch[0]), max(extreme[1], reach)
            padded += batch[0] * ROWS
            positions += reach * ROWS
    steps = row["steps"]
    return Work(
        ROWS, *first, *later, ACCUMULATION, tokens / steps, padded / steps, positions / steps, steps, tokens, "",
        packed_of([row["lengths"][step * a_step : (step + 1) * a_step] for step in range(steps)], PROMPT_SHARE),
    )  # fmt: skip


def packed_of(steps: list[list[int]], prompt_share: float) -> Packed:
    """The same steps without padding, from the lengths of each step's rows."""
    every = [length for lengths in steps for length in lengths]
    return Packed(
        largest=max(map(sum, steps)),
        longest=max(every),
        tokens=sum(every) / len(steps),
        targets=sum(min(length - 1, length - int(length * prompt_share)) for length in every) / len(steps),
        squares=sum(length**2 for length in every) / len(steps),
    )


def planner_input(row: dict[str, Any]) -> tuple[Any, ...]:
    shape = from_config(SHAPES[row["model"]], row["model"])
    options = [f"method={row['method']}"] + ([] if row["method"] == "full" else [f"lora_r={row['r']}"])
    recipe = read_recipe(None, options, {})
    adapter = adapter_of(shape, recipe.lora, row["method"])
    return (
        shape,
        adapter,
        setup_of(recipe, row["method"], row["recompute"], True),
        work_of_point(row),
        find_gpu("h200", {}),
    )


def compare(row: dict[str, Any], given: tuple[Any, ...], reached: Efficiency) -> dict[str, Any]:
    shape, adapter, setup, work, gpu = given
    memory, time = memory_of(*given), time_with(reached, shape, adapter, setup, work, gpu, 1)
    return {
        **{key: row[key] for key in ("model", "method", "batch", "recompute")},
        "allocated": row["allocated_peak"],
        "allocated_planned": memory.allocated_bytes,
        "allocated_error": memory.allocated_bytes / row["allocated_peak"] - 1,
        "reserved": row["reserved_peak"],
        "reserved_planned": memory.reserved_bytes,
        "reserved_error": memory.reserved_bytes / row["reserved_peak"] - 1,
        "step_s": measured_s(row),
        "step_s_planned": time.step_s,
        "step_error": time.step_s / measured_s(row) - 1,
        "limited_by": time.limited_by,
    }


def measured_s(row: dict[str, Any]) -> float:
    """Seconds of the median step, the first two left out."""
    return float(row["step_s"])


def search(inputs: list[tuple[Any, ...]], points: list[dict[str, Any]]) -> Efficiency:
    """Coordinate search for the least sum of squared log errors, each constant within bounds that make sense."""
    bounds = {"matmul": (0.6, 0.8), "attention": (0.12, 0.6), "traffic": (0.05, 0.9), "adapter": (0.05, 0.9),
              "dequantise": (0.1, 0.9)}  # fmt: skip
    best, score = GENERIC, math.inf
    step = 1.3
    while step > 1.002:
        better = False
        for name in FITTED:
            low, high = bounds.get(name, (1e-5, 1.0))
            for factor in (step, 1 / step):
                value = min(high, max(low, getattr(best, name) * factor))
                candidate = replace(best, **{name: value})
                found = loss(candidate, inputs, points)
                if found < score - 1e-9:
                    best, score, better = candidate, found, True
        if not better:
            step = step**0.5
    return best


def loss(reached: Efficiency, inputs: list[tuple[Any, ...]], points: list[dict[str, Any]]) -> float:
    total = 0.0
    for (shape, adapter, setup, work, gpu), row in zip(inputs, points, strict=True):
        error = math.log(time_with(reached, shape, adapter, setup, work, gpu, 1).step_s / measured_s(row))
        total += min(error**2, 0.09)
    return total


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for half in HALVES:
        for name in ERRORS:
            errors = [row[name] for row in rows if row["half"] == half]
            found[f"{half}: {name}"] = {
                "points": len(errors),
                "lowest": min(errors),
                "highest": max(errors),
                "within": {
                    "5 %": sum(abs(error) <= 0.05 for error in errors),
                    "15 %": sum(abs(e) <= 0.15 for e in errors),
                },
            }
    return found


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        recompute = "recompute" if row["recompute"] else "keep"
        print(
            f"{row['half']:8} {row['model']:13} {row['method']:5} {row['batch']:7} {recompute:9}",
            f"allocated {row['allocated'] / 2**30:7.2f} {row['allocated_error']:+6.1%}",
            f"reserved {row['reserved'] / 2**30:7.2f} {row['reserved_error']:+6.1%}",
            f"step {row['step_s']:6.3f} s {row['step_error']:+6.1%} {row['limited_by']}",
        )
    show_halves(rows)


def show_halves(rows: list[dict[str, Any]]) -> None:
    """A line for each half and number: the extreme errors of the plan, and how many points are how near."""
    print(
        f"\n{'half':9} {'number':10} {'points':>6} {'lowest':>8} {'highest':>8} {'within 5 %':>11} {'within 15 %':>12}"
    )
    for title, found in summary(rows).items():
        half, number = title.removesuffix("_error").split(": ")
        near = found["within"]
        print(
            f"{half:9} {number:10} {found['points']:6} {found['lowest']:+8.1%} {found['highest']:+8.1%}",
            f"{near['5 %']:11} {near['15 %']:12}",
        )


if __name__ == "__main__":
    main()
