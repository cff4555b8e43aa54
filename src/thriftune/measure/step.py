"""Seconds of a step measured on this machine, by a few layers of the model at their real sizes.

Time does not depend on the weights' values, so random ones do. Two short models are timed through the loop's own step,
and the line through them is followed to the model's number of layers; a small model is timed whole. Of many
micro-batches a few are timed in the same way.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from thriftune.data import Example
from thriftune.engine.choose import engine_path, why_not_here
from thriftune.engine.path import EnginePath
from thriftune.engine.sizes import Choice
from thriftune.errors import DoesNotFitError, ModelError, ThriftuneError, first_line
from thriftune.measure.layers import WITHOUT, number_of_layers, random_model, text_config, two_cuts
from thriftune.methods import METHODS
from thriftune.methods.lora import is_out_of_memory
from thriftune.models import LoadedModel
from thriftune.models.load import choose_dtype
from thriftune.models.surgery import enable_checkpointing
from thriftune.plan.values import Work
from thriftune.recipe import Recipe
from thriftune.train import StopRequest, TrainJob
from thriftune.train.distributed import Processes
from thriftune.train.job import generic_path
from thriftune.train.loop import train_step
from thriftune.train.optim import build_optimizer
from thriftune.train.path import StepPath

# At least so many, and so many seconds of them: short steps took up to 1.4 times as long in the first tenths of a
# second (benchmarks/results/plan-h200). The time is their lower quartile: other programs only make a step slower.
STEPS, LEAST_S = 8, 2.0
LONG_S = 2.0  # a micro-batch this long is timed once, and the step is so many of it
SPENT_S = 15.0  # no step is timed that would end after that
MICRO_BATCHES = 4  # that are timed; of more, the rest by the line through one and four


@dataclass(frozen=True, slots=True)
class Step:
    """What is asked of one optimizer step. Of the recipe the adapter, the optimizer and the types of numbers count;
    rows at once and micro-batches are the work's. With a `choice` the step goes through the engine, as it chooses."""

    recipe: Recipe
    method: str
    checkpointing: bool
    work: Work
    device: torch.device
    choice: Choice | None


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimizer step of the whole model on one device, and in words which layers were timed."""

    step_s: float
    layers: str


def measure_step(config: Mapping[str, Any], step: Step) -> StepTime:
    """The time of a step of the whole model that this config.json describes.

    Raises ModelError when transformers cannot build it, DoesNotFitError when a few layers do not fit, and what
    attaching the adapter and building the optimizer raise.
    """
    text = text_config(config)
    layers = number_of_layers(text)
    short, longer = two_cuts(text)
    try:
        short_s = _step_s(text, short, step)
        _free(step.device)
        if short == layers:
            return StepTime(short_s, f"all {layers} layers")
        longer_s = _step_s(text, longer, step)
        _free(step.device)
    except ThriftuneError:
        raise
    except Exception as error:  # the model's class is transformers' own, and may stumble over anything
        raise _not_run(error, step) from None
    step_s = short_s + (layers - short) * max(0.0, longer_s - short_s) / (longer - short)
    return StepTime(step_s, f"{short} and {longer} of {layers} layers")


def _not_run(error: Exception, step: Step) -> ThriftuneError:
    said = first_line(error, 200)
    if is_out_of_memory(error):
        return DoesNotFitError(
            given=f"a few layers of this model do not fit on {step.device}: {said}",
            allowed="enough free memory for a few layers and a step's activations",
            do="plan without --measure, or with a smaller max_length or per_device_train_batch_size",
        )
    return ModelError(
        given=f"a step of {step.method} through a few layers of this model fails: {type(error).__name__}: {said}",
        allowed="architectures that the installed transformers and PEFT can train",
        do=WITHOUT,
    )


def _step_s(config: Mapping[str, Any], layers: int, step: Step) -> float:
    """Seconds of a step of the model cut to so many layers."""
    method, options = METHODS[step.method], step.recipe.model
    loaded = random_model(
        config,
        device=step.device,
        dtype=choose_dtype(options, step.device),
        attention=options.attn_implementation,
        quant=step.recipe.quant if method.four_bit else None,
        layers=layers,
    )
    model = method.attach(loaded, step.recipe)
    model.train()
    count = step.work.micro_batches
    if step.choice is not None:
        return _repeated_s(loaded, model, step, count)
    one_s = _repeated_s(loaded, model, step, 1)
    if count == 1 or one_s >= LONG_S:
        return count * one_s
    few = min(count, MICRO_BATCHES)
    return one_s + (count - 1) * max(0.0, _repeated_s(loaded, model, step, few) - one_s) / (few - 1)


def _repeated_s(loaded: LoadedModel, model: nn.Module, step: Step, micro_batches: int) -> float:
    """Seconds of an optimizer step with so many micro-batches, made again and again."""
    device, work = step.device, step.work
    sizes = {"per_device_train_batch_size": work.rows, "gradient_accumulation_steps": micro_batches}
    train = step.recipe.train.model_copy(update=sizes)
    recipe = step.recipe.model_copy(update={"method": step.method, "train": train})
    job = TrainJob(
        model=model,
        method=METHODS[step.method],
        recipe=recipe,
        train_examples=_examples(step, micro_batches, loaded.description.vocab_size),
        place_of=lambda index: f"row {index + 1}",
        eval_examples=[],
        processes=Processes(0, 1, device),
        output=Path(),
        autocast_dtype=torch.bfloat16 if loaded.base_dtype == torch.bfloat16 else None,
        enable_checkpointing=partial(enable_checkpointing, loaded.model),
        checkpointing=step.checkpointing,
        identity={},
        resume_command="",
    )
    optimizer, _, _ = build_optimizer(model, recipe, device)
    path: StepPath = generic_path(job) if step.choice is None else _engine(job, step.choice)
    taken: list[float] = []
    spent = 0.0
    while not taken or ((len(taken) < STEPS or spent < LEAST_S) and spent + taken[-1] < SPENT_S):
        started = time.perf_counter()
        with job.product_types():
            train_step(job, optimizer, path, 0, 1e-6, StopRequest(), _raise_instead)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
        spent += taken[-1]
    return sorted(taken)[len(taken) // 4]


def _engine(job: TrainJob, choice: Choice) -> EnginePath:
    """As planned, not as the memory beside a few layers would allow: of a share of the layers 4-bit weights stay
    unpacked. Raises ModelError where the engine does not take the model."""
    device = job.processes.device
    reason = why_not_here(job.model, job.recipe, device)
    if reason is not None:
        raise ModelError(
            given=f"the plan is of the engine, which does not take this model: {reason}",
            allowed="models and options that the engine takes, or engine=off",
            do=WITHOUT,
        )
    path = engine_path(job.model, device, job.lengths, sum(job.lengths), 0, "auto", job.recipe.precision == "fp8")
    layers = path.program.layers
    for layer in layers[: round(len(layers) * choice.held_share)]:
        layer.hold()
    return replace(path, keep=choice.keep, most_tokens=choice.most_tokens)


def _examples(step: Step, micro_batches: int, vocabulary: int) -> list[Example]:
    """Rows of the mean length, padded where the path pads, with the mean number of targets at their end."""
    work, packed = step.work, step.work.packed
    count = work.rows * work.micro_batches
    engine = step.choice is not None
    tokens, wanted = (packed.tokens, packed.targets) if engine else (work.padded_tokens_per_step, work.targets_per_step)
    length = max(2, round(tokens / count))
    targets = max(1, min(length - 1, round(wanted / count)))
    drawn = np.random.default_rng(0)
    trained = np.zeros(length, dtype=bool)
    trained[length - targets :] = True
    numbers = range(work.rows * micro_batches)
    return [Example(drawn.integers(4, vocabulary, length, dtype=np.int32), trained, index) for index in numbers]


def _raise_instead(text: str) -> None:
    """The step says that it had to be made smaller: then its time is not that of the settings asked about."""
    raise MemoryError(text)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
