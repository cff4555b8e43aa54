"""What cuts free, and what they cost, at the shapes of an 8B: random weights, 4 x 2048 tokens a step, one GPU.

    python benchmarks/dynamic_rank/sizes_8b.py --results benchmarks/results/dynamic-rank [--steps 36]

Trains LoRA r=64 and method dynamic from 64 to half through thriftune's own loop. After every optimizer step, while the
gradients are still there, it asks PyTorch's allocator how many bytes are handed out, less those of the base model
before an adapter was put on it: adapter, gradients, optimizer and the engine's 16-bit copies of the adapter. Prints a
table and writes sizes-8b.json. The time of a step is the median; what cuts cost beside the steps (the decompositions,
and the loss measured before and after) is given in seconds, with the length of a run from which on it is under 2 %.
`--model tiny --batch 2x32` tries the script on a CPU, whose allocator counts nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from thriftune.data import Example, largest_step
from thriftune.engine.choose import engine_path, warm_up, why_not_here
from thriftune.machine import hardware, quiet_libraries, versions
from thriftune.measure import random_model
from thriftune.methods import METHODS, trainable_parameters
from thriftune.models.surgery import enable_checkpointing
from thriftune.recipe import read_recipe
from thriftune.records import StepMetrics
from thriftune.train import Observers, StopRequest, TrainJob, train
from thriftune.train.distributed import Processes
from thriftune.units import format_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plan_points"))
from shapes_measured import SHAPES

WORDS = {"lora": ["lora.r=64"], "dynamic": ["dynamic.r_start=64", "dynamic.keep=0.5"]}
UNTIMED = 2  # first steps, which compile and allocate


class Collector:
    """An observer that keeps the steps' numbers."""

    def __init__(self) -> None:
        self.metrics: list[StepMetrics] = []

    def start(self, first_step: int, num_steps: int) -> None: ...

    def step(self, metrics: StepMetrics) -> None:
        self.metrics.append(metrics)

    def event(self, text: str) -> None:
        print(text, flush=True)

    def saved(self, folder: Path) -> None: ...

    def end(self) -> None: ...


def job_of(method: str, arguments: argparse.Namespace, device: torch.device) -> tuple[TrainJob, int]:
    """The job with its path, and the bytes that the base model alone takes."""
    rows, length = (int(part) for part in arguments.batch.split("x"))
    options = [
        *(f"method={method}", "lora.alpha=64", f"per_device_train_batch_size={rows}", f"max_steps={arguments.steps}"),
        *("gradient_accumulation_steps=1", "save_strategy=no", "eval_strategy=no", "learning_rate=2e-4"),
    ]
    recipe = read_recipe(None, [*options, *WORDS[method]], {})
    shape = SHAPES[arguments.model]
    warming = warm_up(shape, recipe, device, False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded = random_model(shape, device=device, dtype=dtype, attention="sdpa", quant=None)
    of_base = allocated(device)
    draw = np.random.default_rng(0)
    examples = [
        Example(draw.integers(4, shape["vocab_size"], length, dtype=np.int32), np.arange(length) > 0, index)
        for index in range(rows * arguments.steps)
    ]
    model = METHODS[method].attach(loaded, recipe)
    warming.wait()
    job = TrainJob(
        model=model,
        method=METHODS[method],
        recipe=recipe,
        train_examples=examples,
        place_of=lambda index: f"row {index + 1}",
        eval_examples=[],
        processes=Processes(0, 1, device),
        output=Path(tempfile.mkdtemp()),
        autocast_dtype=torch.bfloat16 if dtype == torch.bfloat16 else None,
        enable_checkpointing=partial(enable_checkpointing, loaded.model),
        checkpointing=False,
        identity={},
        resume_command="",
    )
    reason = why_not_here(model, recipe, device)
    if reason is not None:
        sys.exit(f"the engine does not take this model here: {reason}")
    step_tokens = largest_step(job.order, job.lengths, 1)
    path = engine_path(model, device, job.lengths, step_tokens, 12 * trainable_parameters(model), "auto", False)
    return replace(job, path=path), of_base


def allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def measure(method: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    job, of_base = job_of(method, arguments, device)
    held: list[tuple[int, int]] = []

    def after_step(*_: Any) -> None:
        held.append((allocated(device) - of_base, job.path.copies_bytes()))

    collector = Collector()
    hook = register_optimizer_step_post_hook(after_step)
    started = time.perf_counter()
    try:
        with job.product_types():
            outcome = train(job, Observers([collector]), StopRequest())
    finally:
        hook.remove()
    wall_s = time.perf_counter() - started
    steps_s = [metrics.step_s for metrics in collector.metrics]
    return {
        "method": method,
        "parameters": trainable_parameters(job.model),
        "steps_s": [round(seconds, 4) for seconds in steps_s],
        "wall_s": wall_s,
        "beside_steps_s": wall_s - sum(steps_s),
        "held_bytes": [total for total, _ in held],
        "copies_bytes": [copies for _, copies in held],
        "peak_bytes": outcome.peak_bytes,
        "cuts": [cut.model_dump() for cut in outcome.cuts],
        "losses": [round(metrics.loss, 4) for metrics in collector.metrics],
    }


def compare(lora: dict[str, Any], dynamic: dict[str, Any]) -> dict[str, Any]:
    """The falls and the times, with what a run of any length would take of the same cuts."""
    cuts = dynamic["cuts"]
    first, last = cuts[0]["step"] - 1, cuts[-1]["step"]  # places of the last step before, and the first one after
    step_s = statistics.median(lora["steps_s"][UNTIMED:])
    phases = [UNTIMED, *(cut["step"] for cut in cuts), len(dynamic["steps_s"])]
    spans = [(start, end) for start, end in pairwise(phases) if end > start]
    medians = [statistics.median(dynamic["steps_s"][start:end]) for start, end in spans]
    weights = [end - start for start, end in spans]
    mean_s = sum(median * weight for median, weight in zip(medians, weights, strict=True)) / sum(weights)
    of_cuts_s = dynamic["beside_steps_s"] - lora["beside_steps_s"]
    without = [total - copies for total, copies in zip(dynamic["held_bytes"], dynamic["copies_bytes"], strict=True)]
    fall = {
        "with_copies": 1 - dynamic["held_bytes"][last] / dynamic["held_bytes"][first] if without[first] > 0 else None,
        "without_copies": 1 - without[last] / without[first] if without[first] > 0 else None,
        "counted": 1 - cuts[-1]["held_bytes_after"] / cuts[0]["held_bytes_before"],
    }
    saved_s = 1.02 * step_s - mean_s
    return {
        "fall": fall,
        "parameters_kept": cuts[-1]["parameters_after"] / cuts[0]["parameters_before"],
        "lora_step_s": step_s,
        "dynamic_step_s": mean_s,
        "step_s_by_phase": medians,
        "cut_s": [cut["cut_s"] for cut in cuts],
        "of_cuts_s": of_cuts_s,
        "wall_ratio_of_these_steps": (mean_s * sum(weights) + of_cuts_s) / (step_s * sum(weights)),
        "wall_ratio_of_1000_steps": (mean_s * 1000 + of_cuts_s) / (step_s * 1000),
        "steps_from_which_under_1.02": of_cuts_s / saved_s if saved_s > 0 else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Llama-3-8B", choices=SHAPES)
    parser.add_argument("--batch", default="4x2048", help="ROWSxTOKENS")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    quiet_libraries()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    runs = {}
    for method in ("lora", "dynamic"):
        runs[method] = measure(method, arguments, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    found = compare(runs["lora"], runs["dynamic"])
    arguments.results.mkdir(parents=True, exist_ok=True)
    record = {
        "command": " ".join(sys.argv),
        "model": arguments.model,
        "batch": arguments.batch,
        "compared": found,
        "runs": runs,
        "hardware": hardware(device),
        "versions": versions(),
    }
    (arguments.results / "sizes-8b.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"{'step':>5} {'parameters':>26} {'held, allocator':>22} {'counted':>22} {'cut s':>6} {'loss':>18}")
    held = runs["dynamic"]["held_bytes"]
    for cut in runs["dynamic"]["cuts"]:
        here, there = cut["step"] - 1, min(cut["step"], len(held) - 1)
        print(
            f"{cut['step']:>5} {cut['parameters_before']:>12,}->{cut['parameters_after']:>12,} "
            f"{format_bytes(held[here]):>10}->{format_bytes(held[there]):>10} "
            f"{format_bytes(cut['held_bytes_before']):>10}->{format_bytes(cut['held_bytes_after']):>10} "
            f"{cut['cut_s']:>6.2f} {cut['loss_before']:>8.4f}->{cut['loss_after']:>8.4f}"
        )
    print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main()
