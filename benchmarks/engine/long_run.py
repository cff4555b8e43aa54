"""Thousands of steps over rows of random lengths: does memory drift, does anything compile again, does it slow down?

    python benchmarks/engine/long_run.py --write benchmarks/results/engine-long-run.json [--model Llama-3.2-1B] \
        [--method lora] [--steps 2000] [the options of ours.py]

Each step has four rows of 1 to 4,096 tokens, half of them of at most 300. Every 100 steps the allocator's bytes in use,
its peak since the last look and what it has reserved are kept, with Triton's compiled variants and cuDNN's plans. Exits
with 1 where the bytes in use at the end are not those at the first look, or Triton compiled after it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ours import Collector, add_options, job_of

from thriftune.data import Example
from thriftune.machine import hardware, quiet_libraries, versions
from thriftune.records import StepMetrics
from thriftune.train import Observers, StopRequest, TrainJob, train

ROWS, LOOK = 4, 100


class Watch(Collector):
    def __init__(self, job: TrainJob, device: torch.device) -> None:
        super().__init__()
        self.job, self.device, self.seen = job, device, []

    def step(self, metrics: StepMetrics) -> None:
        super().step(metrics)
        if metrics.step % LOOK:
            return
        self.seen.append({"step": metrics.step, **look(self.job, self.device)})
        print(self.seen[-1], flush=True)


def look(job: TrainJob, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"variants": triton_variants()}
    found["plans"] = len(getattr(getattr(job.path, "attention", None), "_plans", {}))
    if device.type == "cuda":
        found["allocated"] = torch.cuda.memory_allocated(device)
        found["peak"] = torch.cuda.max_memory_allocated(device)
        found["reserved"] = torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
    return found


def triton_variants() -> int:
    """Compiled kernels in this process, all modules of thriftune.kernels together."""
    functions = {
        id(value): value
        for name, module in list(sys.modules.items())
        if name.startswith("thriftune.kernels.") and name.endswith("_triton")
        for value in vars(module).values()
        if hasattr(value, "device_caches")
    }
    return sum(len(cache[0]) for function in functions.values() for cache in function.device_caches.values())


def random_rows(steps: int, vocabulary: int, longest: int) -> list[Example]:
    drawn, chosen = np.random.default_rng(0), random.Random(0)
    found = []
    for index in range(steps * ROWS):
        size = chosen.randint(1, longest) if chosen.random() < 0.5 else chosen.randint(1, min(300, longest))
        trained = np.arange(size) >= size // 3
        found.append(Example(drawn.integers(4, vocabulary, size, dtype=np.int32), trained, index))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--longest", type=int, default=4096)
    parser.set_defaults(model="Llama-3.2-1B", steps=2000)
    arguments = parser.parse_args()
    arguments.batch = f"{ROWS}x{arguments.longest}"
    quiet_libraries()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    job, _ = job_of(arguments, device)
    vocabulary = job.model.get_base_model().config.vocab_size
    job = replace(job, train_examples=random_rows(arguments.steps, vocabulary, arguments.longest))
    watch = Watch(job, device)
    with job.product_types():
        train(job, Observers([watch]), StopRequest())
    rates = [metrics.tokens / metrics.step_s for metrics in watch.metrics]
    half = len(rates) // 2
    first, last = watch.seen[0], watch.seen[-1]
    found = {
        "command": sys.argv,
        "hardware": hardware(device),
        "versions": versions(),
        "steps": len(rates),
        "tokens": sum(metrics.tokens for metrics in watch.metrics),
        "tokens_per_s_of_halves": [statistics.median(rates[:half]), statistics.median(rates[half:])],
        "events": watch.events,
        "seen": watch.seen,
    }
    if arguments.write:
        arguments.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in found.items() if key not in ("seen", "versions", "hardware")}))
    same = first.get("allocated") == last.get("allocated") and first["variants"] == last["variants"]
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
