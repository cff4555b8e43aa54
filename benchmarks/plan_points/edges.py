"""At the edge of memory: recipes the planner puts within 8 % of a limit, each tried with the process held to it.

    python benchmarks/plan_points/edges.py --results benchmarks/results/plan-h200/edges.jsonl [--list] [--engine]

A recipe called fitting must run its 20 steps; one that is refused must run out. The limit counts the driver's context,
so PyTorch's allocator gets the rest. Through transformers' own model, or with --engine through the engine, one row a
step, where a step that does not fit cannot be cut. `--list` only prints the recipes, and needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from fit import packed_of
from shapes_measured import SHAPES

from thriftune.catalog.gpus import find_gpu
from thriftune.plan.adapter import adapter_of
from thriftune.plan.engine import engine_case, least_choice
from thriftune.plan.engine_memory import engine_memory
from thriftune.plan.memory import memory_of, setup_of
from thriftune.plan.values import Memory, Work
from thriftune.recipe import read_recipe
from thriftune.shapes import from_config

GIB = 2**30
GPU = find_gpu("h200", {})
STEPS = 20
# (limit in GiB, model, method, recompute, rows at once)
FAMILIES = [
    (24, "Llama-3-8B", "lora", True, 1),
    (24, "Llama-3.2-1B", "full", True, 4),
    (24, "Llama-3-8B", "qlora", False, 2),
    (16, "Llama-3-8B", "qlora", True, 2),
    (16, "Llama-3.2-1B", "lora", False, 2),
    (12, "Llama-3-8B", "qlora", False, 1),
    (12, "Llama-3.2-1B", "qlora", False, 4),
]
# The same for the engine: `recompute` False keeps everything, True as little as it must.
ENGINE_FAMILIES = [
    (24, "Llama-3-8B", "lora", False, 1),
    (24, "Llama-3-8B", "lora", True, 1),
    (16, "Llama-3.2-1B", "lora", False, 1),
    (16, "Llama-3-8B", "qlora", False, 1),
    (12, "Llama-3-8B", "qlora", False, 1),
    (12, "Llama-3-8B", "qlora", True, 1),
]
NEAR, FAR = (0.985, 1.03), (0.95, 1.06)  # predicted peak over the limit: wanted of a fitting and of a refused recipe


@dataclass(frozen=True)
class Edge:
    limit_gib: int
    model: str
    method: str
    recompute: bool
    rows: int
    length: int
    planned: int
    fits: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--deadline-s", type=float, default=1e9)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--engine", action="store_true")
    arguments = parser.parse_args()
    families = ENGINE_FAMILIES if arguments.engine else FAMILIES
    edges = [
        edge
        for number, family in enumerate(families)
        for edge in edges_of(family, FAR if number % 2 else NEAR, arguments.engine)
    ]
    for edge in edges:
        print(f"{edge} planned {edge.planned / GIB / edge.limit_gib:.3f} of the limit")
    if not arguments.list:
        run(edges, arguments.results, time.perf_counter() + arguments.deadline_s, arguments.engine)


def edges_of(family: tuple[int, str, str, bool, int], wanted: tuple[float, float], engine: bool) -> list[Edge]:
    """The longest rows (in steps of 16 tokens) planned below the first share of the limit, and the shortest above the
    second."""
    limit, model, method, recompute, rows = family

    def peak(length: int) -> int:
        return (planned_engine if engine else planned)(model, method, recompute, rows, length).peak_bytes

    lengths = range(64, 40_000, 16)
    below = [length for length in lengths if peak(length) <= wanted[0] * limit * GIB]
    above = next(length for length in lengths if peak(length) >= wanted[1] * limit * GIB)
    chosen = [(max(below), True)] if below else []
    return [
        Edge(limit, model, method, recompute, rows, length, peak(length), fits)
        for length, fits in [*chosen, (above, False)]
    ]


def planned(model: str, method: str, recompute: bool, rows: int, length: int) -> Memory:
    shape = from_config(SHAPES[model], model)
    recipe = read_recipe(None, [f"method={method}"], {})
    adapter = adapter_of(shape, recipe.lora, method)
    tokens = float(rows * length)
    packed = packed_of([[length] * rows], 0.0)
    work = Work(rows, length, length - 1, 0, 0, 1, tokens, tokens, tokens, STEPS, 0, "", packed)
    return memory_of(shape, adapter, setup_of(recipe, method, recompute, True), work, GPU)


def planned_engine(model: str, method: str, recompute: bool, rows: int, length: int) -> Memory:
    """With as little as the engine can do with."""
    shape = from_config(SHAPES[model], model)
    recipe = read_recipe(None, [f"method={method}", f"gradient_checkpointing={switch_of(recompute)}"], {})
    case = engine_case(shape, adapter_of(shape, recipe.lora, method), setup_of(recipe, method, False, True), GPU)
    packed = packed_of([[length] * rows], 0.0)
    return engine_memory(case, least_choice(case, recipe, packed), packed)


def switch_of(recompute: bool) -> str:
    return "auto" if recompute else "off"


def run(edges: list[Edge], results: Path, until: float, engine: bool) -> None:
    import torch
    from points import Point, RanOutError, examples_of, free_everything, job_of, load_random, measure
    from run_engine import with_engine

    from thriftune.machine import hardware, quiet_libraries, versions
    from thriftune.methods import METHODS

    quiet_libraries()
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    runtime = planned("Llama-3-8B", "lora", True, 1, 64).parts["runtime"]
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"hardware": hardware(device), "versions": versions()}) + "\n")
        for (model, method), group in groupby(edges, key=lambda edge: (edge.model, edge.method)):
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            free_everything(device)
            loaded, attached = load_random(SHAPES[model], method, device), None
            group = list(group)
            longest = max(edge.length for edge in group)
            program = None
            for edge in group:
                if time.perf_counter() > until:
                    print("out of time before", edge, flush=True)
                    continue
                point = Point(model, method, f"{edge.rows}x{edge.length}", edge.recompute, steps=STEPS)
                examples, rows, accumulation = examples_of(point.batch, STEPS, loaded.description.vocab_size, None)
                job = job_of(loaded, attached or loaded.model, point, examples, rows, accumulation)
                if attached is None:
                    attached = METHODS[method].attach(loaded, job.recipe)
                    attached.train()
                    job = replace(job, model=attached)
                free_everything(device)
                torch.cuda.set_per_process_memory_fraction((edge.limit_gib * GIB - runtime) / total, device)
                try:
                    if engine:
                        job, program = with_engine(job, program, longest, switch_of(edge.recompute), device)
                    row = measure(job, point, loaded, stop_when_out_of_memory=True)
                except RanOutError as error:
                    row = {"status": "ran out", "error": str(error)}
                right = (row["status"] == "done") == edge.fits
                file.write(json.dumps({**asdict(edge), **summary(row), "right": right}) + "\n")
                file.flush()
                print(edge, row["status"], "as planned" if right else "NOT AS PLANNED", flush=True)
                if program is not None:
                    program.let_go()
                del job
            del loaded, attached
            free_everything(device)


def summary(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row.get(key) for key in ("status", "error", "allocated_peak", "reserved_peak", "step_s", "retries")}


if __name__ == "__main__":
    main()
