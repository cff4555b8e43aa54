"""Streamed QLoRA on one GPU held to so much memory, with random 4-bit weights at real shapes.

    python benchmarks/streaming/run.py --results benchmarks/results/streaming --deadline-s 420 \
        [--lengths ../shared/bench/gsm8k_lengths.txt] [--stages equality,70B,123B,8B | 70B-more]

With expandable segments, as a run has them: export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True. Needs 70 GB of
host memory (40 GB without 123B), and a card of 80 GB for the resident 70B engine that the streamed one is held against.
Steps are those of thriftune's own loop: gradients, clipping and the paged 8-bit AdamW. The cap holds PyTorch's
allocator to what is left of it beside the driver's context, which is measured here, and the optimizer's paged states.
`--tiny` tries the script on any machine. Prints one line a measurement, a table last; one JSON line each in
steps.jsonl and equality.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from card import GIB, Card
from equality import check_all
from random_models import RandomModel, make_model, make_slabs
from table import table

from thriftune.data import largest_step
from thriftune.engine.attention import Attention
from thriftune.engine.choose import choose_attention
from thriftune.engine.host_memory import pinned_block
from thriftune.engine.hosted import Hosted
from thriftune.engine.lanes import lane_to
from thriftune.engine.offload import SLOTS, Demand, Offload, choose_offload, padding_bytes
from thriftune.engine.path import EnginePath
from thriftune.engine.residency import spread
from thriftune.engine.room import Room, free_bytes
from thriftune.engine.shelf import DeviceShelf, HostShelf
from thriftune.engine.sizes import Keep, later_bytes
from thriftune.engine.streamed_path import StreamedPath
from thriftune.machine import hardware, quiet_libraries, versions
from thriftune.methods import METHODS
from thriftune.methods.base import trainable_parameters
from thriftune.recipe import read_recipe
from thriftune.train import Observers, StopRequest, TrainJob, train
from thriftune.train.distributed import Processes
from thriftune.train.path import StepPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plan_points"))
from points import Collector, examples_of

STEPS = 5  # the first two warm up
BUILDING_S = 30.0  # about, of a large model's slabs


@dataclass(frozen=True)
class Case:
    """`cap_gib` None: all of the card. `resident`: every layer on the device, through the engine's ordinary program."""

    model: str
    batch: str
    cap_gib: float | None
    resident: bool = False
    optim: str = "paged_adamw_8bit"
    fp8: bool = False
    seconds: float = 20.0  # about; what would end after the deadline is left out


CASES = {
    "70B": [
        Case("70B", "2x2048", 24),
        Case("70B", "2x2048", None, resident=True),
        Case("70B", "gsm8k", 24),
        Case("70B", "2x2048", 40),
        Case("70B", "2x2048", 16),
        Case("70B", "2x2048", 12),
        Case("70B", "gsm8k", 12),
    ],
    "70B-more": [
        Case("70B", "2x2048", 24, optim="adamw_torch"),
        Case("70B", "2x2048", 24, fp8=True),
        Case("70B", "2x2048", None, resident=True, fp8=True),
        Case("70B", "4x2048", 24, fp8=True, seconds=30),
        Case("70B", "gsm8k", 24, optim="adamw_torch"),
        Case("70B", "8x2048", 24, seconds=60),
    ],
    # Steps that are too short to hide all transfers, so that memory is worth speed.
    "70B-caps": [Case("70B", "1x1024", cap, seconds=10) for cap in (12, 16, 24, 40)],
    "123B": [Case("123B", "2x2048", 24, seconds=35), Case("123B", "gsm8k", 24, seconds=25)],
    "8B": [
        Case("8B", "2x2048", 6, seconds=5),
        Case("8B", "4x2048", 6, seconds=8),
        Case("8B", "2x2048", None, resident=True, seconds=5),
    ],
    "tiny": [
        Case("tiny", "2x32", 1),
        Case("tiny", "2x32", 1, fp8=True, optim="adamw_torch"),
        Case("tiny", "2x32", None, resident=True),
        Case("tiny", "4x32", 1),
    ],
}


def job_of(model: RandomModel, case: Case, lengths: Path | None) -> TrainJob:
    vocabulary = model.program.embedding_VD.shape[0]
    examples, rows, accumulation = examples_of(case.batch, STEPS, vocabulary, lengths)
    words = [f"per_device_train_batch_size={rows}", f"gradient_accumulation_steps={accumulation}", "method=qlora"]
    if model.loaded.device.type == "cuda":  # bitsandbytes' optimizers are for GPUs
        words.append(f"optim={case.optim}")
    fixed = ["save_strategy=no", "eval_strategy=no", "learning_rate=1e-5", "shuffle=false", f"max_steps={STEPS}"]
    return TrainJob(
        model=model.model,
        method=METHODS["qlora"],
        recipe=read_recipe(None, [*words, *fixed], {}),
        train_examples=examples,
        place_of=lambda index: f"row {index + 1}",
        eval_examples=[],
        processes=Processes(0, 1, model.loaded.device),
        output=Path(tempfile.mkdtemp()),
        autocast_dtype=torch.bfloat16 if model.loaded.device.type == "cuda" else None,
        enable_checkpointing=lambda: None,
        checkpointing=True,
        identity={},
        resume_command="",
    )


def path_of(model: RandomModel, job: TrainJob, case: Case, attention: Attention) -> StepPath:
    """The streamed path, as `streamed_path` builds it, with slabs that are there; or the engine with all of them."""
    device, program, layers = model.loaded.device, model.program, len(model.program.layers)
    step_tokens, longest = largest_step(job.order, job.lengths, 1), max(job.lengths)
    later = later_bytes(case.optim, trainable_parameters(model.model))
    if case.resident:
        model.streaming(range(layers), SLOTS, lane_to(device))
        room = Room(program, device, step_tokens, longest, later)
        return EnginePath(program, device, attention, room, Keep.INPUT, Keep.INPUT, Keep.INPUT, step_tokens)
    ranked = sum(p.numel() for name, p in model.model.named_parameters() if ".lora_A." in name)
    later += padding_bytes(program.sizes, ranked)
    varied = len(set(job.lengths)) > 1
    demand = Demand(step_tokens, longest, varied, later, model.layout.bytes, 2 if device.type == "cpu" else None)
    chosen = choose_offload(program.sizes, free_bytes(device), demand)
    shelf: DeviceShelf | HostShelf = DeviceShelf()
    if chosen.inputs_on_host:
        # As HostShelf.of, which asks first how much host memory there is; some machines get theirs as they use it.
        dtype, sizes = model.loaded.base_dtype, (layers, step_tokens, program.sizes.width)
        block = pinned_block(math.prod(sizes) * dtype.itemsize, device, "layers' inputs")
        shelf = HostShelf(block, block.bytes.view(dtype).view(sizes), device, lane_to(device), lane_to(device))
    streaming = model.streaming(spread(chosen.resident, layers), SLOTS, lane_to(device))
    hosted = Hosted(_Given(model), device, print)
    return StreamedPath(program, streaming, hosted, shelf, device, attention, chosen, longest)


@dataclass
class _Given:
    """Slabs for a path that steps down."""

    model: RandomModel

    @property
    def layouts(self) -> list[Any]:
        return [self.model.layout] * len(self.model.program.layers)

    def tables(self, device: torch.device) -> Any:
        return self.model.tables

    def read(self, index: int, slab: torch.Tensor, say: Any) -> None:
        slab.copy_(self.model.slabs[index])

    def read_again(self, index: int, slab: torch.Tensor) -> None:
        slab.copy_(self.model.slabs[index])


def clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measure(model: RandomModel, case: Case, card: Card, attention: Attention, lengths: Path | None) -> dict[str, Any]:
    device, cuda = card.device, card.device.type == "cuda"
    job = job_of(model, case, lengths)
    paged = case.optim.startswith("paged")
    states = 2 * trainable_parameters(model.model) if paged else 0  # in managed memory beside the allocator
    model.products_in(case.fp8)
    for stack in (stack for layer in model.program.layers for stack in layer.stacks):
        stack.packed = []
    clear(device)
    card.hold_to(case.cap_gib, states)
    thread, collector = card.watch(), Collector(stop_when_out_of_memory=False)
    row: dict[str, Any] = {"stage": "steps", "model": case.model, "batch": case.batch, "cap_gib": case.cap_gib,
                           "resident_engine": case.resident, "optim": case.optim, "fp8": case.fp8}  # fmt: skip
    path = path_of(model, job, case, attention)
    offload = path.offload if isinstance(path, StreamedPath) else None
    job = replace(job, path=path)
    with job.product_types():
        train(job, Observers([collector]), StopRequest())
    row |= summary(collector, offload, path)
    row |= {
        "slab_bytes": model.layout.bytes,
        "trained": trainable_parameters(model.model),
        "driver_peak_gib": round(card.watched(thread) / GIB, 2),  # paged states of earlier cases are never given back
        "peak_gib": round((card.context + states + torch.cuda.max_memory_reserved(device)) / GIB, 2) if cuda else 0.0,
        "reserved_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 2) if cuda else None,
        "allocated_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 2) if cuda else None,
        "context_gib": round(card.context / GIB, 2),
        "states_gib": round(states / GIB, 2),
    }
    shelf = getattr(path, "shelf", None)
    if isinstance(shelf, HostShelf):
        shelf.close()
    return row


def summary(collector: Collector, offload: Offload | None, path: StepPath) -> dict[str, Any]:
    """Medians of the steps after the second; what the GPU computed is the step without its waits for copies."""
    timed = collector.metrics[2:]
    middle = sorted(timed, key=lambda metrics: metrics.step_s)[len(timed) // 2]
    now = path.offload if isinstance(path, StreamedPath) else None
    return {
        "tokens_per_s": round(sum(m.tokens for m in timed) / sum(m.step_s for m in timed)),
        "tokens": middle.tokens,
        "step_s": round(middle.step_s, 4),
        "steps_s": [round(metrics.step_s, 3) for metrics in collector.metrics],
        "copy_s": middle.copy_s,
        "waited_s": middle.waited_s,
        "compute_s": None if middle.waited_s is None else round(middle.step_s - middle.waited_s, 4),
        "losses": [round(metrics.loss, 4) for metrics in collector.metrics],
        "offload": None if offload is None else offload.words,
        "resident": None if offload is None else offload.resident,
        "most_tokens": None if offload is None else offload.most_tokens,
        "inputs_on_host": None if offload is None else offload.inputs_on_host,
        "stepped_down": offload != now,
        "events": collector.events,
    }


def run_stage(name: str, card: Card, lengths: Path | None, keep: Any, ends: float) -> list[dict[str, Any]]:
    """All cases of one model. Its slabs stay in host memory from the first to the last."""
    device, process = card.device, psutil.Process()
    started, cases = time.perf_counter(), CASES[name]
    if started + BUILDING_S + cases[0].seconds > ends:
        print(f"{name}: left out, no time", flush=True)
        return []
    before = process.memory_info().rss
    model = make_model(cases[0].model, device, 4096)
    shell_s, shell = time.perf_counter() - started, process.memory_info().rss
    make_slabs(model, print)
    attention = choose_attention(device, model.program.layers)
    clear(device)
    slabs = model.layout.bytes * len(model.program.layers)
    host = {
        "stage": "host",
        "model": name,
        "slabs_gib": round(slabs / GIB, 2),
        "resident_set_over_slabs": round((process.memory_info().rss - shell) / slabs - 1, 4),
        "with_embedding_and_shell_over_slabs": round((process.memory_info().rss - before) / slabs - 1, 4),
        "shell_s": round(shell_s, 1),
        "built_s": round(time.perf_counter() - started, 1),
    }
    keep(host)
    rows = [host]
    for case in cases:
        if time.perf_counter() + case.seconds > ends:
            rows.append({"stage": "steps", "model": name, "batch": case.batch, "cap_gib": case.cap_gib,
                         "status": "left out: no time"})  # fmt: skip
            continue
        try:
            row = measure(model, case, card, attention, lengths)
        except Exception as error:  # one that does not fit must not take the others with it
            traceback.print_exc()
            row = {"stage": "steps", "model": name, "batch": case.batch, "cap_gib": case.cap_gib,
                   "resident_engine": case.resident, "status": f"{type(error).__name__}: {error}"[:300]}  # fmt: skip
        keep(row)
        rows.append(row)
    card.hold_to(None, 0)
    model.release()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--deadline-s", type=float, default=1e9)
    parser.add_argument("--stages", default="equality,70B,123B,8B")
    parser.add_argument("--tiny", action="store_true", help="try the script itself, anywhere")
    arguments = parser.parse_args()
    ends = time.perf_counter() + arguments.deadline_s
    quiet_libraries()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    card = Card.untouched(device)
    arguments.results.mkdir(parents=True, exist_ok=True)
    facts = {"hardware": hardware(device), "versions": versions()}

    def keep(row: dict[str, Any]) -> None:
        with (arguments.results / "steps.jsonl").open("a") as file:
            file.write(json.dumps(row | facts) + "\n")
        shown = {key: value for key, value in row.items() if key not in ("events", "losses")}
        print(json.dumps(shown), flush=True)

    rows = run_stage("tiny", card, arguments.lengths, keep, ends)  # loads every library
    clear(device)
    card.measure_context()
    for stage in ["equality"] if arguments.tiny else arguments.stages.split(","):
        started = time.perf_counter()
        if stage == "equality":
            found = check_all(["tiny"] if arguments.tiny else ["8B", "70B", "123B"], device, print)
            (arguments.results / "equality.jsonl").write_text("".join(json.dumps(row | facts) + "\n" for row in found))
            rows += found
        else:
            rows += run_stage(stage, card, arguments.lengths, keep, ends)
        clear(device)
        print(f"{stage}: {time.perf_counter() - started:.0f} s", flush=True)
    print(table(rows), flush=True)


if __name__ == "__main__":
    main()
