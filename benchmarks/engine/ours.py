"""One row of the engine's table: steps of thriftune's own loop on random weights at a model's real sizes.

    python benchmarks/engine/ours.py --model Llama-3-8B --method lora --batch 4x2048 [--engine off] [--limit-gib 17.7]
        [--lengths ../shared/bench/gsm8k_lengths.txt] [--steps 8] [--layers 2]

`--batch` is ROWSxTOKENS, every token a target, or gsm8k: 16 rows of that set's lengths a step. Prints one JSON object:
tokens/s without padding (median of the steps after the second), peaks, seconds of the first step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from thriftune.data import Example, largest_step
from thriftune.engine.choose import engine_path, warm_up, why_not_here
from thriftune.machine import quiet_libraries
from thriftune.measure import random_model
from thriftune.methods import METHODS
from thriftune.methods.base import trainable_parameters
from thriftune.models.surgery import enable_checkpointing
from thriftune.recipe import QuantRecipe, read_recipe
from thriftune.records import StepMetrics
from thriftune.train import Observers, StopRequest, TrainJob, train
from thriftune.train.distributed import Processes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plan_points"))
from shapes_measured import SHAPES


class Collector:
    """An observer that keeps the steps' numbers and what happened beside."""

    def __init__(self) -> None:
        self.metrics: list[StepMetrics] = []
        self.events: list[str] = []

    def start(self, first_step: int, num_steps: int) -> None: ...

    def step(self, metrics: StepMetrics) -> None:
        self.metrics.append(metrics)

    def event(self, text: str) -> None:
        self.events.append(text)

    def saved(self, folder: Path) -> None: ...

    def end(self) -> None: ...


def examples_of(batch: str, steps: int, vocabulary: int, lengths_file: Path | None) -> list[Example]:
    """The examples of all steps. Of a GSM8K row the question's 45 % are no targets, as in the data."""
    generator = np.random.default_rng(0)
    if batch == "gsm8k":
        known = [int(line) for line in (lengths_file or Path()).read_text().split()]
        rows, share = 16, 0.45
        sizes = random.Random(0).sample(known, rows * steps)
    else:
        rows, length = (int(part) for part in batch.split("x"))
        sizes, share = [length] * rows * steps, 0.0
    found = []
    for index, size in enumerate(sizes):
        trained = np.arange(size) >= int(size * share)
        found.append(Example(generator.integers(4, vocabulary, size, dtype=np.int32), trained, index))
    return found


def job_of(arguments: argparse.Namespace, device: torch.device) -> tuple[TrainJob, float]:
    """The job with its path, and seconds until the weights were there."""
    started = time.perf_counter()
    method = METHODS[arguments.method]
    rows_at_once, accumulation = (4, 4) if arguments.batch == "gsm8k" else (int(arguments.batch.split("x")[0]), 1)
    options = [
        f"method={arguments.method}",
        f"engine={arguments.engine}",
        f"per_device_train_batch_size={rows_at_once}",
        f"gradient_accumulation_steps={accumulation}",
        f"gradient_checkpointing={arguments.recompute}",
        f"max_steps={arguments.steps}",
        *["save_strategy=no", "eval_strategy=no", "learning_rate=1e-5", "shuffle=false", *arguments.extra],
    ]
    recipe = read_recipe(None, options, {})
    warming = warm_up(SHAPES[arguments.model], recipe, device, method.four_bit)
    loaded = random_model(
        SHAPES[arguments.model],
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        attention="sdpa",
        quant=QuantRecipe() if method.four_bit else None,
        layers=arguments.layers,
    )
    vocabulary = loaded.description.vocab_size
    examples = examples_of(arguments.batch, arguments.steps, vocabulary, arguments.lengths)
    model = method.attach(loaded, recipe)
    warming.wait()
    job = TrainJob(
        model=model,
        method=method,
        recipe=recipe,
        train_examples=examples,
        place_of=lambda index: f"row {index + 1}",
        eval_examples=[],
        processes=Processes(0, 1, device),
        output=Path(tempfile.mkdtemp()),
        autocast_dtype=torch.bfloat16 if loaded.base_dtype == torch.bfloat16 else None,
        enable_checkpointing=lambda: enable_checkpointing(loaded.model),
        checkpointing=arguments.recompute == "on",
        identity={},
        resume_command="",
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    built_s = time.perf_counter() - started
    reason = why_not_here(model, recipe, device)
    if reason is None:
        a_parameter = 6 if arguments.method == "qlora" else 12
        step_tokens = largest_step(job.order, job.lengths, 1)
        later_bytes = a_parameter * trainable_parameters(model)
        path = engine_path(
            model, device, job.lengths, step_tokens, later_bytes, arguments.recompute, recipe.precision == "fp8"
        )
        job = replace(job, path=path)
    return job, built_s


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="Llama-3-8B", choices=SHAPES)
    parser.add_argument("--method", default="lora", choices=("lora", "qlora"))
    parser.add_argument("--batch", default="4x2048")
    parser.add_argument("--engine", default="auto", choices=("auto", "off"))
    parser.add_argument("--recompute", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--limit-gib", type=float, help="hold PyTorch's allocator to this")
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, help="a model cut short, to try the script")
    parser.add_argument("--extra", nargs="*", default=[], help="further key=value words of the recipe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    arguments = parser.parse_args()
    quiet_libraries()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    cuda = device.type == "cuda"
    job, built_s = job_of(arguments, device)
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        if arguments.limit_gib:
            whole = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(arguments.limit_gib * 2**30 / whole, device)
        torch.cuda.reset_peak_memory_stats(device)
    collector = Collector()
    with job.product_types():
        train(job, Observers([collector]), StopRequest())
    timed = collector.metrics[2:] or collector.metrics
    step_s = statistics.median(metrics.step_s for metrics in timed)
    found = {
        "model": arguments.model,
        "layers": arguments.layers,
        "method": arguments.method,
        "batch": arguments.batch,
        "path": "generic" if job.path is None else job.path.name,
        "state": {} if job.path is None else job.path.state(),
        "tokens_per_s": round(sum(m.tokens for m in timed) / sum(m.step_s for m in timed)),
        "step_s": round(step_s, 4),
        "first_step_s": round(collector.metrics[0].step_s, 2),
        "built_s": round(built_s, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if cuda else None,
        "reserved_gib": round(torch.cuda.max_memory_reserved(device) / 2**30, 2) if cuda else None,
        "losses": [round(metrics.loss, 4) for metrics in collector.metrics],
        "events": collector.events,
    }
    print("RESULT", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
