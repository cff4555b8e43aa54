"""Peak memory and seconds a step over models, methods and batches, for the planner's constants and for its proof.

    python benchmarks/plan_points/run.py --results benchmarks/results/plan-h200/points.jsonl \
        --lengths ../shared/bench/gsm8k_lengths.txt [--groups 1,2,3] [--deadline-s 560]

Each point trains a few steps through thriftune's own loop on random weights. A line of the results is one point.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from itertools import product
from pathlib import Path

import torch
from fit import work_of_point
from points import Point, examples_of, free_everything, job_of, load_random, measure
from shapes_measured import SHAPES

from thriftune.errors import ThriftuneError
from thriftune.machine import hardware, quiet_libraries, versions
from thriftune.measure import Step, measure_step
from thriftune.methods import METHODS
from thriftune.recipe import read_recipe

BATCHES = ("1x512", "4x2048", "1x8192", "gsm8k")
SMALL = ("1x512", "gsm8k")
# A group shares one model and method: (shape, method, [(batch, recompute)], steps)
GROUPS: list[tuple[str, str, list[tuple[str, bool]], int]] = [
    ("Llama-3-8B", "lora", list(product(BATCHES, (False, True))), 5),
    ("Llama-3-8B", "qlora", list(product(BATCHES, (False, True))), 5),
    ("Llama-3.2-1B", "full", list(product(BATCHES, (False, True))), 5),
    ("Llama-3.2-1B", "lora", list(product(BATCHES, (False, True))), 5),
    ("Llama-3.2-1B", "qlora", list(product(BATCHES, (False, True))), 5),
    ("Qwen3-8B", "lora", list(product(BATCHES, (False, True))), 5),
    ("Qwen3-8B", "qlora", list(product(BATCHES, (False, True))), 5),
    ("Llama-3-70B", "qlora", [*product(BATCHES, (True,)), *product(SMALL, (False,))], 4),
    ("Llama-3-8B", "full", list(product(SMALL, (True,))), 4),
]
TINY = [("tiny", method, [("2x32", False), ("2x32", True)], 3) for method in ("lora", "full")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--groups", default=",".join(map(str, range(len(GROUPS)))))
    parser.add_argument("--deadline-s", type=float, default=1e9)
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
            if time.perf_counter() - started > arguments.deadline_s:
                print("out of time before", shape, method, flush=True)
                break
            run_group(shape, method, cases, steps, device, arguments.lengths, file, started + arguments.deadline_s)


def run_group(shape, method, cases, steps, device, lengths, file, until) -> None:
    free_everything(device)
    loaded = load_random(SHAPES[shape], method, device)
    model = None
    for batch, recompute in cases:
        if time.perf_counter() > until:
            print("out of time before", shape, method, batch, recompute, flush=True)
            break
        point = Point(shape, method, batch, recompute, steps=steps)
        examples, rows, accumulation = examples_of(batch, steps, loaded.description.vocab_size, lengths)
        job = None
        if model is None:
            first = job_of(loaded, loaded.model, point, examples, rows, accumulation)
            model = METHODS[method].attach(loaded, first.recipe)
            model.train()
        job = job_of(loaded, model, point, examples, rows, accumulation)
        row = measure(job, point, loaded) | {"load_s": loaded.load_s}
        row["lengths"] = [len(example) for example in examples] if batch == "gsm8k" else None
        row["measured_by_layers_s"] = by_layers_s(row, device)
        file.write(json.dumps(row) + "\n")
        file.flush()
        print(
            shape, method, batch, "recompute" if recompute else "keep", row["status"],
            f"{row.get('allocated_peak', 0) / 2**30:.2f} GiB allocated",
            f"{row.get('reserved_peak', 0) / 2**30:.2f} reserved",
            f"{row.get('step_s', 0):.3f} s", f"by layers {row['measured_by_layers_s'] or 0:.3f} s",
            row.get("error", ""), row["events"], flush=True,
        )  # fmt: skip
    del model, loaded
    gc.collect()
    free_everything(device)


def by_layers_s(row, device) -> float | None:
    """What `thriftune plan --measure` says, right after the whole model was timed on the same machine."""
    if row["status"] != "done":
        return None
    options = [f"method={row['method']}"] + ([] if row["method"] == "full" else [f"lora_r={row['r']}"])
    recipe = read_recipe(None, options, {})
    try:
        step = Step(recipe, row["method"], row["recompute"], work_of_point(row), device, None)
        return measure_step(SHAPES[row["model"]], step).step_s
    except ThriftuneError as error:
        print("not measured by layers:", error.given, flush=True)
        return None


if __name__ == "__main__":
    main()
