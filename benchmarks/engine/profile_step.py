"""Where the time of one step goes: every kernel of a step of ours.py, with its milliseconds, FLOPs and bytes.

    python benchmarks/engine/profile_step.py --method lora --batch 4x2048 --write FILE [the options of ours.py]

A step after the first four is traced by torch.profiler. Matrix products are told apart by their shapes: `frozen` ones,
the `head`'s, and the adapters' `narrow` ones. FLOPs and bytes of products come from their shapes, of the other kernels
from the step's sizes; the share is of the rates that the script measures first (a large product, a large copy).
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ours import Collector, add_options, job_of

from thriftune.machine import hardware, quiet_libraries, versions
from thriftune.records import StepMetrics
from thriftune.train import Observers, StopRequest, train

STEP = 5
NARROW = 512  # products with a side below this are the adapters'
PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm")


class Tracer(Collector):
    """Traces the step after `STEP`, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self.trace = torch.profiler.profile(activities=kinds, record_shapes=True)

    def step(self, metrics: StepMetrics) -> None:
        super().step(metrics)
        if metrics.step == STEP:
            torch.cuda.synchronize()
            self.trace.start()
        elif metrics.step == STEP + 1:
            torch.cuda.synchronize()
            self.trace.stop()


@dataclass
class Row:
    kind: str
    name: str
    count: int = 0
    ms: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


def rows_of(trace: Any, vocabulary: int) -> list[Row]:
    """Kernels that belong to a matrix product by its shapes, all others by their names."""
    found: dict[tuple[str, str], Row] = {}
    of_products: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in trace.events():
        if event.name not in PRODUCTS or not event.kernels:
            continue
        m, k, n = product_of(event)
        kind = "head" if vocabulary in (m, k, n) else "narrow" if min(m, k, n) < NARROW else "frozen"
        row = found.setdefault((kind, f"{m} x {k} x {n}"), Row(kind, f"{m} x {k} x {n}"))
        size = 1 if event.name == "aten::_scaled_mm" else 2
        row.count += 1
        row.flops += 2.0 * m * n * k
        row.bytes += size * (m * k + k * n) + 2 * m * n
        for kernel in event.kernels:
            row.ms += kernel.duration / 1000
            of_products[kernel.name] += kernel.duration / 1000
            calls[kernel.name] += 1
    others: dict[str, Row] = {}
    for event in trace.events():
        if not is_kernel(event):
            continue
        row = others.setdefault(event.name, Row("", event.name[:90]))
        row.count += 1
        row.ms += event.device_time_total / 1000
    for name, row in others.items():
        row.ms -= of_products[name]
        row.count -= calls[name]
        if row.count > 0 and row.ms > 1e-3:
            row.kind = kind_of(name)
            found[row.kind, name] = row
    return sorted(found.values(), key=lambda row: -row.ms)


def idle_of(trace: Any, least_ms: float) -> list[tuple[float, str, str]]:
    """Times at which the GPU waited: milliseconds, the kernel before and the one after."""
    kernels = sorted((event for event in trace.events() if is_kernel(event)), key=lambda event: event.time_range.start)
    found, end, last = [], 0.0, ""
    for event in kernels:
        wait_ms = (event.time_range.start - end) / 1000
        if end and wait_ms > least_ms:
            found.append((wait_ms, last, event.name[:60]))
        if event.time_range.end > end:
            end, last = event.time_range.end, event.name[:60]
    return sorted(found, reverse=True)


def is_kernel(event: Any) -> bool:
    named = "ProfilerStep" in event.name or "Optimizer" in event.name  # ranges that hold kernels
    return event.device_type == torch.autograd.DeviceType.CUDA and not named


def product_of(event: Any) -> tuple[int, int, int]:
    """Rows, inner and columns of the product."""
    first = 1 if event.name == "aten::addmm" else 0
    left, right = event.input_shapes[first], event.input_shapes[first + 1]
    return left[0], left[1], right[1]


def kind_of(name: str) -> str:
    lowered = name.lower()
    if "sdpa" in lowered or "flash" in lowered or "cudnn" in lowered or "fmha" in lowered:
        return "attention"
    if "memcpy" in lowered or "memset" in lowered:
        return "copies"
    if "adam" in lowered or "multi_tensor" in lowered or "optimizer" in lowered:
        return "optimizer"
    if "unpack" in lowered:
        return "unpacking"
    return "elementwise"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    arguments.steps = STEP + 2
    quiet_libraries()
    device = torch.device("cuda", 0)
    job, _ = job_of(arguments, device)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    tracer = Tracer()
    with job.product_types():
        train(job, Observers([tracer]), StopRequest())
    rows = rows_of(tracer.trace, job.model.get_base_model().config.vocab_size)
    kinds: dict[str, float] = defaultdict(float)
    for row in rows:
        kinds[row.kind] += row.ms
    idle = idle_of(tracer.trace, 0.2)
    plain_s = tracer.metrics[STEP - 1].step_s
    found = {
        "command": vars(arguments) | {"write": str(arguments.write), "lengths": str(arguments.lengths)},
        "hardware": hardware(device),
        "versions": versions(),
        "step_s": plain_s,
        "traced_step_s": tracer.metrics[STEP].step_s,
        "kernels_ms": sum(kinds.values()),
        "kinds_ms": dict(sorted(kinds.items(), key=lambda pair: -pair[1])),
        "idle_ms": idle,
        "rows": [vars(row) for row in rows],
    }
    if arguments.write:
        arguments.write.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    for row in rows[:45]:
        rate = f"{row.flops / row.ms / 1e9:6.0f} TFLOP/s {row.bytes / row.ms / 1e6:6.0f} GB/s" if row.flops else ""
        print(f"{row.kind:12} {row.name[:70]:70} {row.count:5} {row.ms:8.2f} ms {rate}")
    for wait_ms, before, after in idle[:12]:
        print(f"idle {wait_ms:7.2f} ms after {before} before {after}")
    print("step", round(plain_s * 1e3, 1), "ms; traced", round(tracer.metrics[STEP].step_s * 1e3, 1), "kernels",
          round(found["kernels_ms"], 1), {kind: round(ms, 1) for kind, ms in found["kinds_ms"].items()})  # fmt: skip


if __name__ == "__main__":
    main()
