"""The planner's engine path beside measured points: what it says will be chosen, the peak, seconds a step.

    python benchmarks/plan_points/fit_engine.py benchmarks/results/plan-h200/engine-points.jsonl \
        --report benchmarks/results/plan-h200/engine-report.json [--refit]

Memory has no fitted constant but the shares of fragmentation; time has those of
thriftune.plan.engine_time.EngineEfficiency. The halves are drawn by a seed. A point after which the host ran Python at
less than 1 / SLOW of its usual speed (`interpreter_s`, a fixed loop) is in neither half of the seconds: how fast it
launched kernels then says nothing of the GPU. It is shown, and its bytes count. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fit import measured_s, show_halves, summary, work_of_point
from shapes_measured import SHAPES

from thriftune.catalog.gpus import find_gpu
from thriftune.engine.sizes import Choice, Keep
from thriftune.plan import engine_time as engine_time_module
from thriftune.plan.adapter import adapter_of
from thriftune.plan.engine import engine_case, engine_choice
from thriftune.plan.engine_memory import engine_memory
from thriftune.plan.engine_time import ENGINE, EngineEfficiency, engine_time
from thriftune.plan.memory import outside, setup_of
from thriftune.plan.values import Memory, Time
from thriftune.recipe import read_recipe
from thriftune.shapes import from_config

SLOW = 1.2
# Constants and their bounds; again_s by what is kept, where points keep that.
FITTED = {
    "matmul": (0.5, 0.85), "attention": (0.1, 0.6), "traffic": (0.2, 1.0), "dequantise": (0.1, 1.0),
    "layer_s": (3e-4, 6e-3), "step_s": (1e-4, 5e-2), "varied_s": (1e-4, 5e-2), "paged_s": (1e-6, 1e-3),
    "again_s.2": (1e-5, 6e-3), "again_s.3": (1e-5, 6e-3),
}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """What the planner says of one point: of what the engine was to choose, and of what it chose."""

    choice: Choice
    memory: Memory
    memory_of_choice: Memory
    time: Time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=Path, nargs="+")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--refit", action="store_true", help="search the constants anew on half of the points")
    arguments = parser.parse_args()
    points = [row for path in arguments.points for row in points_of(path)]
    if len(points) < 2:
        sys.exit(
            f"{len(points)} points of a GPU in these files: two halves need more; run_engine.py measures them there"
        )
    slow = slow_host(points)
    drawn = random.Random(0)
    order = sorted(set(range(len(points))) - slow, key=lambda _: drawn.random()) + sorted(slow)
    fitting = {index for place, index in enumerate(order) if place % 2 == 0}
    if arguments.refit:
        reached = search([points[index] for index in sorted(fitting - slow)])
        print({name: float(f"{value_of(reached, name):.3g}") for name in FITTED})
        engine_time_module.ENGINE = reached
    rows = []
    for index, row in enumerate(points):
        rows.append(compare(row) | {"half": "fitted" if index in fitting else "held out", "host_slow": index in slow})
    for row in rows:
        show(row)
    show_halves(rows)
    show_seconds(rows)
    show_by_layers([row["by_layers_error"] for row in rows if row["by_layers_error"] is not None])
    print("chosen as planned:", sum(row["as_planned"] for row in rows), "of", len(rows))
    if arguments.report:
        arguments.report.write_text(json.dumps({"points": rows, "summary": summary(rows)}, indent=1) + "\n")


def slow_host(points: list[dict[str, Any]]) -> set[int]:
    """Places of the points after which the host was slow."""
    usual = statistics.median(row["interpreter_s"] for row in points)
    return {place for place, row in enumerate(points) if row["interpreter_s"] > SLOW * usual}


def points_of(path: Path) -> list[dict[str, Any]]:
    """The points of a file that ran on a GPU, each with the name of its GPU, which the line before them has."""
    points, gpu = [], None
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if "hardware" in row:
            gpu = row["hardware"].get("gpu")
        elif row.get("path") == "engine" and row["status"] == "done" and row.get("allocated_peak") and gpu:
            points.append({**row, "gpu": gpu})
    return points


def planned(row: dict[str, Any]) -> Planned:
    shape = from_config(SHAPES[row["model"]], row["model"])
    recipe = read_recipe(None, [f"method={row['method']}", f"lora_r={row['r']}"], {})
    adapter, gpu = adapter_of(shape, recipe.lora, row["method"]), find_gpu(row["gpu"], {})
    work = work_of_point(row)
    case = engine_case(shape, adapter, setup_of(recipe, row["method"], False, True), gpu)
    usable = row["limit_bytes"] + outside(gpu)[0] if row["limit_bytes"] else gpu.usable_bytes
    choice = engine_choice(case, recipe, work.packed, usable)
    chosen = Choice(Keep(row["keep"]), row["most_tokens"], row["held"], case.sizes.number_of_layers)
    memory, of_choice = (engine_memory(case, each, work.packed) for each in (choice, chosen))
    return Planned(choice, memory, of_choice, engine_time(case, chosen, work, gpu, 1))


def compare(row: dict[str, Any]) -> dict[str, Any]:
    found = planned(row)
    choice, by_layers_s = found.choice, row.get("measured_by_layers_s")
    return {
        **{key: row[key] for key in ("gpu", "model", "method", "batch", "room", "keep", "most_tokens", "held")},
        "keep_planned": int(choice.keep),
        "most_tokens_planned": choice.most_tokens,
        "held_planned": choice.held,
        "as_planned": int(choice.keep) == row["keep"]
        and choice.most_tokens == row["most_tokens"]
        and abs(choice.held - row["held"]) <= 1,
        "allocated": row["allocated_peak"],
        "allocated_planned": found.memory.allocated_bytes,
        "allocated_error": found.memory.allocated_bytes / row["allocated_peak"] - 1,
        "allocated_error_of_choice": found.memory_of_choice.allocated_bytes / row["allocated_peak"] - 1,
        "reserved": row["reserved_peak"],
        "reserved_error": found.memory_of_choice.reserved_bytes / row["reserved_peak"] - 1,
        "step_s": measured_s(row),
        "step_s_planned": found.time.step_s,
        "step_error": found.time.step_s / measured_s(row) - 1,
        "limited_by": found.time.limited_by,
        "by_layers_error": by_layers_s / measured_s(row) - 1 if by_layers_s else None,
    }


def search(points: list[dict[str, Any]]) -> EngineEfficiency:
    """Coordinate search for the least sum of squared log errors, each constant within bounds that make sense."""
    best, score, step = ENGINE, math.inf, 1.3
    while step > 1.005:
        better = False
        for name, (low, high) in FITTED.items():
            for factor in (step, 1 / step):
                candidate = with_value(best, name, min(high, max(low, value_of(best, name) * factor)))
                found = loss(candidate, points)
                if found < score - 1e-9:
                    best, score, better = candidate, found, True
        if not better:
            step = step**0.5
    return best


def value_of(reached: EngineEfficiency, name: str) -> float:
    field, _, place = name.partition(".")
    value = getattr(reached, field)
    return float(value[int(place)] if place else value)


def with_value(reached: EngineEfficiency, name: str, value: float) -> EngineEfficiency:
    field, _, place = name.partition(".")
    if not place:
        return replace(reached, **{field: value})
    values = list(getattr(reached, field))
    values[int(place)] = value
    return replace(reached, **{field: tuple(values)})


def loss(reached: EngineEfficiency, points: list[dict[str, Any]]) -> float:
    engine_time_module.ENGINE = reached
    errors = [math.log(planned(row).time.step_s / measured_s(row)) for row in points]
    return sum(min(error**2, 0.09) for error in errors)


def show_seconds(rows: list[dict[str, Any]]) -> None:
    """The seconds again, by whether the host launched kernels as fast as it usually does."""
    groups = {
        "fitted": [row for row in rows if row["half"] == "fitted" and not row["host_slow"]],
        "held out": [row for row in rows if row["half"] == "held out" and not row["host_slow"]],
        "slow host": [row for row in rows if row["host_slow"]],
    }
    for name, group in groups.items():
        if errors := [row["step_error"] for row in group]:
            near = sum(abs(error) <= 0.15 for error in errors)
            print(
                f"seconds, {name}: {len(errors)} points, {min(errors):+.1%} to {max(errors):+.1%}, {near} within 15 %"
            )


def show_by_layers(errors: list[float]) -> None:
    """How far `plan --measure` was from the whole model's step, where run_engine.py asked it."""
    if not errors:
        print("by layers: not asked (run_engine.py --by-layers)")
        return
    near = sum(abs(error) <= 0.07 for error in errors)
    extremes = f"{min(errors):+.1%} to {max(errors):+.1%}"
    print(f"by layers: {len(errors)} points, {extremes}, {near} within 7 %")


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['half']:8} {row['gpu']} {row['model']:13} {row['method']:5} {row['batch']:7} {row['room']:22}",
        f"keep {row['keep']}/{row['keep_planned']} tokens {row['most_tokens']}/{row['most_tokens_planned']}",
        f"held {row['held']}/{row['held_planned']}",
        f"allocated {row['allocated'] / 2**30:7.2f} {row['allocated_error']:+6.1%}",
        f"(of the choice {row['allocated_error_of_choice']:+6.1%})",
        f"reserved {row['reserved'] / 2**30:7.2f} {row['reserved_error']:+6.1%}",
        f"step {row['step_s']:6.3f} s {row['step_error']:+6.1%} {row['limited_by']}",
    )


if __name__ == "__main__":
    main()
