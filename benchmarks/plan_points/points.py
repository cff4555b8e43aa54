"""One measured point: a method on a shape and a batch, a few optimizer steps through thriftune's own loop."""

from __future__ import annotations

import gc
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from thriftune.data import Example
from thriftune.errors import ThriftuneError
from thriftune.measure import random_model
from thriftune.methods import METHODS
from thriftune.models import LoadedModel
from thriftune.models.surgery import enable_checkpointing
from thriftune.recipe import QuantRecipe, Recipe, read_recipe
from thriftune.records import StepMetrics
from thriftune.train import Observers, StopRequest, TrainJob, train
from thriftune.train.distributed import Processes


@dataclass(frozen=True)
class Point:
    """`batch` is 'ROWSxLENGTH', every token a target, or 'gsm8k': 4 rows x 4 accumulation of that set's lengths."""

    model: str
    method: str
    batch: str
    recompute: bool
    r: int = 16
    steps: int = 5


class RanOutError(Exception):
    """The step did not fit, and was not to be made smaller."""


class Collector:
    """An observer that keeps every step's numbers and what happened beside."""

    def __init__(self, stop_when_out_of_memory: bool) -> None:
        self.stop_when_out_of_memory = stop_when_out_of_memory
        self.metrics: list[StepMetrics] = []
        self.events: list[str] = []

    def start(self, first_step: int, num_steps: int) -> None: ...

    def step(self, metrics: StepMetrics) -> None:
        self.metrics.append(metrics)

    def event(self, text: str) -> None:
        self.events.append(text)
        if self.stop_when_out_of_memory and "out of memory" in text:
            raise RanOutError(text)

    def saved(self, folder: Path) -> None: ...

    def end(self) -> None: ...


def load_random(config: dict[str, Any], method: str, device: torch.device) -> LoadedModel:
    return random_model(
        config,
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        attention="sdpa",
        quant=QuantRecipe() if METHODS[method].four_bit else None,
    )


def examples_of(batch: str, steps: int, vocabulary: int, lengths_file: Path | None) -> tuple[list[Example], int, int]:
    """The examples, rows at once, accumulation. Of a GSM8K row the question's 45 % are no targets, as in the data."""
    generator = np.random.default_rng(0)
    if batch != "gsm8k":
        rows, length = (int(part) for part in batch.split("x"))
        sizes, accumulation, share = [length] * rows * steps, 1, 0.0
    else:
        assert lengths_file is not None
        known = [int(line) for line in lengths_file.read_text().split()]
        rows, accumulation, share = 4, 4, 0.45
        sizes = random.Random(0).sample(known, rows * accumulation * steps)
    examples = []
    for index, size in enumerate(sizes):
        trained = np.ones(size, dtype=bool)
        trained[: int(size * share)] = False
        examples.append(Example(generator.integers(4, vocabulary, size, dtype=np.int32), trained, index))
    return examples, rows, accumulation


def recipe_of(point: Point, rows: int, accumulation: int) -> Recipe:
    options = [
        f"method={point.method}",
        f"per_device_train_batch_size={rows}",
        f"gradient_accumulation_steps={accumulation}",
        f"max_steps={point.steps}",
        f"gradient_checkpointing={'on' if point.recompute else 'off'}",
        "save_strategy=no",
        "eval_strategy=no",
        "learning_rate=1e-5",
        "shuffle=false",
    ]
    if point.method != "full":
        options += [f"lora_r={point.r}", f"lora_alpha={2 * point.r}"]
    return read_recipe(None, options, {})


def job_of(
    loaded: LoadedModel, model: nn.Module, point: Point, examples: list[Example], rows: int, accumulation: int
) -> TrainJob:
    recipe = recipe_of(point, rows, accumulation)
    return TrainJob(
        model=model,
        method=METHODS[point.method],
        recipe=recipe,
        train_examples=examples,
        place_of=lambda index: f"row {index + 1}",
        eval_examples=[],
        processes=Processes(0, 1, loaded.device),
        output=Path(tempfile.mkdtemp()),
        autocast_dtype=torch.bfloat16 if loaded.base_dtype == torch.bfloat16 else None,
        enable_checkpointing=lambda: enable_checkpointing(loaded.model),
        checkpointing=point.recompute,
        identity={},
        resume_command="",
    )


def interpreter_s() -> float:
    """The best of five times of a fixed loop: how fast this machine's cores run what launches kernels, just now."""
    found = []
    for _ in range(5):
        started, total = time.perf_counter(), 0
        for number in range(100_000):
            total += number & 7
        found.append(time.perf_counter() - started)
    return min(found)


def free_everything(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measure(
    job: TrainJob, point: Point, loaded: LoadedModel, *, stop_when_out_of_memory: bool = False
) -> dict[str, Any]:
    """Train `point.steps` steps. Speeds are of the steps after the second; sizes are bytes, as PyTorch reports them."""
    device = loaded.device
    if not point.recompute:
        _checkpointing_off(loaded.model)
    free_everything(device)
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    free_before = torch.cuda.mem_get_info(device)[0] if cuda else 0
    collector, started = Collector(stop_when_out_of_memory), time.perf_counter()
    row: dict[str, Any] = {**asdict(point), "allocated_before": before}
    try:
        with job.product_types():
            outcome = train(job, Observers([collector]), StopRequest())
        row |= {"status": "done", "optimizer": outcome.optimizer}
    except ThriftuneError as error:
        row |= {"status": type(error).__name__, "error": error.given[:300]}
    if cuda:
        row |= {
            "allocated_peak": torch.cuda.max_memory_allocated(device),
            "reserved_peak": torch.cuda.max_memory_reserved(device),
            "outside_torch": (torch.cuda.mem_get_info(device)[0] - free_before)
            + (torch.cuda.memory_reserved(device) - before),
            "device_used": torch.cuda.mem_get_info(device)[1] - torch.cuda.mem_get_info(device)[0],
            "retries": torch.cuda.memory_stats(device).get("num_alloc_retries", 0),
        }
    timed = collector.metrics[2:]
    if timed:
        row |= {
            "step_s": sorted(metrics.step_s for metrics in timed)[len(timed) // 2],
            "steps_s": [metrics.step_s for metrics in collector.metrics],
            "tokens": [metrics.tokens for metrics in collector.metrics],
            "loss": collector.metrics[-1].loss,
        }
    row["events"] = collector.events
    row["interpreter_s"] = interpreter_s()
    row["wall_s"] = time.perf_counter() - started
    return row


def _checkpointing_off(model: nn.Module) -> None:
    for name in ("activation_checkpointing_disable", "gradient_checkpointing_disable"):
        if hasattr(model, name):
            getattr(model, name)()
            return
