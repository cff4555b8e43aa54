"""Peak memory and seconds a step through the engine, for the planner's constants and for its proof.

    python benchmarks/plan_points/run_engine.py --results benchmarks/results/plan-h200/engine-points.jsonl \
        --lengths ../shared/bench/gsm8k_lengths.txt [--groups 0,1,2] [--deadline-s 560] [--by-layers]

Each batch runs with all memory free, and held to limits at which layers keep less and at which the step is cut in two.
With expandable segments, as a run has them: export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.
The engine decides by itself; a line of the results says what it chose. `--by-layers` also asks, of batches with all
memory free, what `thriftune plan --measure` would say of the same step; that takes seconds a point. `--free-only`
leaves out what is held to a limit. `--tiny` tries the script on any machine, where a CPU's memory is not counted and
every layer keeps everything.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fit import work_of_point
from points import Point, examples_of, free_everything, job_of, load_random, measure
from shapes_measured import SHAPES

from thriftune.data import largest_step
from thriftune.engine.choose import choose_attention
from thriftune.engine.path import EnginePath
from thriftune.engine.program import Program
from thriftune.engine.read import read_program
from thriftune.engine.room import Room
from thriftune.engine.sizes import RANK_MULTIPLE, RECOMPUTING, SPARE_BYTES, SPARE_SHARE, Choice, Keep, later_bytes
from thriftune.errors import ThriftuneError
from thriftune.machine import hardware, quiet_libraries, versions
from thriftune.measure import Step, measure_step
from thriftune.methods import METHODS
from thriftune.methods.base import trainable_parameters
from thriftune.recipe import read_recipe
from thriftune.train import TrainJob

BATCHES = ("1x512", "4x2048", "1x8192", "gsm8k")
VARIED_STEPS = 20  # of rows that differ: most attention plans are made in the first few
FREE, LESS, LEAST, CUT = "free", "room for the residuals", "room for the inputs", "room for half a step"
# A group shares one model and method: (shape, method, [(batch, room)], steps)
ALL = [(batch, room) for batch in BATCHES for room in (FREE, LESS)] + [("4x2048", LEAST), ("4x2048", CUT)]
GROUPS: list[tuple[str, str, list[tuple[str, str]], int]] = [
    ("Llama-3-8B", "lora", ALL, 6),
    ("Llama-3-8B", "qlora", ALL, 6),
    ("Llama-3.2-1B", "lora", ALL, 6),
    ("Llama-3.2-1B", "qlora", ALL, 6),
    ("Qwen3-8B", "lora", ALL, 6),
    ("Qwen3-8B", "qlora", ALL, 6),
    ("Llama-3-70B", "qlora", ALL[:-1], 4),
]
TINY = [("tiny", method, [("2x32", FREE), ("2x32", LESS), ("2x32", CUT)], 3) for method in ("lora", "qlora")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--groups", default=",".join(map(str, range(len(GROUPS)))))
    parser.add_argument("--deadline-s", type=float, default=1e9)
    parser.add_argument("--by-layers", action="store_true", help="time a few layers too, as plan --measure does")
    parser.add_argument("--free-only", action="store_true", help="with all memory free only")
    parser.add_argument("--tiny", action="store_true", help="try the script itself, anywhere")
    arguments = parser.parse_args()
    started = time.perf_counter()
    quiet_libraries()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"hardware": hardware(device), "versions": versions()}) + "\n")
        groups = TINY if arguments.tiny else [GROUPS[int(number)] for number in arguments.groups.split(",")]
        for shape, method, cases, steps in groups:
            asked = [case for case in cases if case[1] == FREE or not arguments.free_only]
            group = (shape, method, asked, steps)
            if time.perf_counter() - started > arguments.deadline_s:
                print("out of time before", group[:2], flush=True)
                break
            try:
                run_group(
                    group,
                    device,
                    arguments.lengths,
                    file,
                    started + arguments.deadline_s,
                    by_layers=arguments.by_layers,
                )
            except Exception:  # the other groups are worth having
                traceback.print_exc()


def run_group(
    group: tuple[str, str, Any, int], device: torch.device, lengths: Path | None, file, until, *, by_layers
) -> None:
    shape, method, cases, steps = group
    free_everything(device)
    loaded = load_random(SHAPES[shape], method, device)
    model, program, attention = None, None, None
    for batch, room_for in cases:
        if time.perf_counter() > until:
            print("out of time before", shape, method, batch, room_for, flush=True)
            break
        point = Point(shape, method, batch, False, steps=max(steps, VARIED_STEPS) if batch == "gsm8k" else steps)
        examples, rows, accumulation = examples_of(batch, point.steps, loaded.description.vocab_size, lengths)
        if model is None:
            first = job_of(loaded, loaded.model, point, examples, rows, accumulation)
            model = METHODS[method].attach(loaded, first.recipe)
            model.train()
            program = read_program(model, longest_of(cases, lengths), RANK_MULTIPLE[device.type], fp8=False)
            attention = choose_attention(device, program.layers)
            free_everything(device)
        job = job_of(loaded, model, point, examples, rows, accumulation)
        step_tokens = largest_step(job.order, job.lengths, 1)
        later = later_bytes(job.recipe.train.optim, trainable_parameters(model))
        room = Room(program, device, step_tokens, max(job.lengths), later)
        path = EnginePath(program, device, attention, room, Keep.ALL, Keep.INPUT)
        limit = hold(room, room_for, device)
        row = measure(replace(job, path=path), point, loaded)
        row |= {"path": "engine", "room": room_for, "limit_bytes": limit, "load_s": loaded.load_s}
        row |= {"keep": int(path.keep or 0), "most_tokens": path.most_tokens, "step_tokens": step_tokens}
        row["held"] = sum(layer.qkv.held for layer in program.layers)
        row["lengths"] = [len(example) for example in examples] if batch == "gsm8k" else None
        row["later_bytes"], row["attention"] = later, attention.name
        program.let_go()
        del job, path, room
        if by_layers and room_for == FREE and row["status"] == "done":
            row["measured_by_layers_s"] = by_layers_s(row, device, len(program.layers))
        file.write(json.dumps(row) + "\n")
        file.flush()
        print(
            shape, method, batch, room_for, row["status"], f"keep {row['keep']} held {row['held']}",
            f"{row['most_tokens']} of {step_tokens} tokens",
            f"{row.get('allocated_peak', 0) / 2**30:.3f} GiB allocated",
            f"{row.get('reserved_peak', 0) / 2**30:.3f} reserved", f"{row.get('step_s', 0):.4f} s",
            f"by layers {row.get('measured_by_layers_s') or 0:.4f} s",
            row.get("error", ""), row["events"], flush=True,
        )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    del model, program, loaded
    gc.collect()
    free_everything(device)


def with_engine(
    job: TrainJob, program: Program | None, longest: int, switch: str, device: torch.device
) -> tuple[TrainJob, Program]:
    """The job through the engine, for whatever memory there is now; the program is read once for a model."""
    if program is None:
        program = read_program(job.model, longest, RANK_MULTIPLE[device.type], fp8=False)
    later = later_bytes(job.recipe.train.optim, trainable_parameters(job.model))
    room = Room(program, device, largest_step(job.order, job.lengths, 1), max(job.lengths), later)
    path = EnginePath(program, device, choose_attention(device, program.layers), room, *RECOMPUTING[switch])
    return replace(job, path=path), program


def by_layers_s(row: dict[str, Any], device: torch.device, layers: int) -> float | None:
    """What `thriftune plan --measure` says of a step as the engine has just made it, right after it on this machine."""
    recipe = read_recipe(None, [f"method={row['method']}", f"lora_r={row['r']}"], {})
    choice = Choice(Keep(row["keep"]), row["most_tokens"], row["held"], layers)
    free_everything(device)
    try:
        step = Step(recipe, row["method"], False, work_of_point(row), device, choice)
        return measure_step(SHAPES[row["model"]], step).step_s
    except ThriftuneError as error:
        print("not measured by layers:", error.given, flush=True)
        return None


def longest_of(cases: list[tuple[str, str]], lengths: Path | None) -> int:
    """Tokens of the longest row of all batches: the program's angles reach so far."""
    known = [int(batch.split("x")[1]) for batch, _ in cases if batch != "gsm8k"]
    return max([*known, *([int(line) for line in lengths.read_text().split()] if lengths else [])])


def hold(room: Room, room_for: str, device: torch.device) -> int | None:
    """Hold the process to a limit at which the engine has room for just this; the limit in bytes, None without one."""
    if room_for == FREE or device.type != "cuda":
        return None
    free_everything(device)
    keep = Keep.RESIDUALS if room_for == LESS else Keep.INPUT
    tokens = max(room.longest, -(-room.step_tokens // 2)) if room_for == CUT else room.step_tokens
    needed = room.program.sizes.needed_bytes(keep, tokens) + room.later_bytes
    wanted = (needed * 1.002 + SPARE_BYTES) / (1 - SPARE_SHARE)
    limit = int(torch.cuda.memory_allocated(device) + wanted)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory, device)
    return limit


if __name__ == "__main__":
    main()
