"""How a run's base is loaded and what computes its gradients: whole, or as a shell whose layers are streamed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from thriftune.data import largest_step
from thriftune.engine.choose import engine_path, streaming_path, why_not_here
from thriftune.engine.offload import Demand
from thriftune.engine.sizes import later_bytes
from thriftune.engine.streamed_path import StreamedPath
from thriftune.engine.takes import refuse_fp8, why_not_adapter, why_not_method, why_not_model
from thriftune.errors import InputError, ModelError
from thriftune.methods import trainable_parameters
from thriftune.model_files import read_config
from thriftune.models import LoadedModel, load_model
from thriftune.models.load import ModelDescription
from thriftune.models.shell import load_shell
from thriftune.models.store import Store
from thriftune.recipe import Recipe
from thriftune.records import OffloadRecord, StepMetrics
from thriftune.train import TrainJob
from thriftune.train.observe import read_metrics
from thriftune.train.recover import fits_or_ends
from thriftune.units import format_bytes

OUTSIDE_BYTES = 600 * 1024**2  # the driver's context and libraries, as the planner counts them for the newest GPUs

Say = Callable[[str], None]


@dataclass(frozen=True)
class Base:
    """`store` holds the layers' slabs where they are streamed."""

    loaded: LoadedModel
    store: Store | None


def load_base(
    recipe: Recipe,
    description: ModelDescription,
    *,
    device: torch.device,
    dtype: torch.dtype,
    four_bit: bool,
    streams: bool,
    world: int,
    say: Say,
) -> Base:
    """The model, or, where its layers are streamed, its shell and the store, which is made when it is not there.

    Raises InputError where streaming cannot be, DoesNotFitError where the device holds too little even for it, besides
    what loading raises.
    """
    if not streams:
        quant = recipe.quant if four_bit else None
        return Base(load_model(recipe.model, device=device, dtype=dtype, quant=quant), None)
    if world > 1:
        raise InputError(
            given=f"streamed layers and {world} processes",
            allowed="one process; several would each stream the whole model over the same memory",
            do="run it on one GPU, or with offload=off on GPUs that hold the model",
        )
    config = read_config(description.folder)
    reason = (
        why_not_method(recipe, recipe.method)
        or why_not_model(config["model_type"], config.get("hidden_act", "silu"), "default")
        or why_not_adapter(recipe.lora, biases=False)
    )
    if reason is not None:  # what only the loaded model can tell is asked by `with_path`
        raise _not_taken(reason)
    store = Store.of(description.folder, description.num_layers, recipe.quant, dtype, device)
    with fits_or_ends(
        "the head, the norms and a matrix that is quantised, which lie on the device where layers are streamed",
        allowed="a device, and a max_memory, that hold these",
        do="close other programs on this device, raise max_memory, or take a smaller model",
    ):
        store.make(say)
        return Base(load_shell(recipe.model, device=device, dtype=dtype, quant=recipe.quant), store)


def hold_memory(device: torch.device, recipe: Recipe, beside_bytes: int) -> None:
    """Hold PyTorch's allocator to what `max_memory` leaves beside the driver's context and `beside_bytes`, which lie
    outside it. Without effect on a CPU: training refuses it there, and what was trained on a GPU may be used. Raises
    InputError when nothing is left."""
    cap = recipe.max_memory_bytes
    if cap is None or device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = min(total, cap - OUTSIDE_BYTES - beside_bytes)
    if allowed <= 0:
        raise InputError(
            given=f"max_memory={recipe.max_memory}, of which {format_bytes(OUTSIDE_BYTES + beside_bytes)} go to the "
            "driver's context and paged optimizer states",
            allowed="more than these take",
            do="raise max_memory",
        )
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)


def paged_bytes(recipe: Recipe, trained: int) -> int:
    """States of a paged optimizer, which lie in managed memory beside PyTorch's allocator."""
    in_managed = {"auto": 2, "paged_adamw_8bit": 2, "paged_adamw_32bit": 8}
    return in_managed.get(recipe.train.optim, 0) * trained if recipe.method == "qlora" else 0


def with_path(job: TrainJob, store: Store | None, say: Say) -> tuple[TrainJob, str]:
    """The job with the engine as its path, or as it is; and why. Raises ModelError where layers are to be streamed and
    the engine does not take the model: nothing else can."""
    device, recipe = job.processes.device, job.recipe
    reason = why_not_here(job.model, recipe, device)
    if reason is not None and store is not None:
        raise _not_taken(reason)
    if reason is not None:
        refuse_fp8(recipe, reason)
        return job, f"autograd through transformers' model: {reason}"
    lengths = [*job.lengths, *map(len, job.eval_examples)]
    step_tokens = largest_step(job.order, job.lengths, job.processes.world)
    later = later_bytes(recipe.train.optim, trainable_parameters(job.model))
    fp8 = recipe.precision == "fp8"
    how = "; frozen products in fp8" if fp8 else ""
    if store is None:
        switch = recipe.train.gradient_checkpointing
        path: Any = engine_path(job.model, device, lengths, step_tokens, later, switch, fp8)
    else:
        largest = max(layout.bytes for layout in store.layouts)
        varied = len(set(job.lengths)) > 1
        demand = Demand(step_tokens, max(lengths), varied, later, largest, recipe.resident_layers)
        with fits_or_ends("the layers that are to stay on the GPU"):
            path = streaming_path(job.model, store, device, demand, fp8, say)
        how += f"; {path.offload.words}"
    return (
        replace(job, path=path),
        f"explicit forward and backward pass; attention: {path.attention.name}{how}",
    )


def offload_record(path: Any, metrics: Path) -> OffloadRecord | None:
    """What a record says of a run whose layers were streamed, from its steps but the first; None of another."""
    if not isinstance(path, StreamedPath):
        return None
    steps = read_metrics(metrics)
    steps = steps[1:] or steps

    def middle(value: Callable[[StepMetrics], float]) -> float:
        return statistics.median(map(value, steps)) if steps else 0.0

    return OffloadRecord(
        resident_layers=len(path.streaming.resident),
        layers=path.offload.layers,
        inputs_on_host=path.offload.inputs_on_host,
        host_bytes=path.host_bytes,
        copied_bytes_per_step=path.spent.bytes,
        copy_s=middle(lambda step: step.copy_s or 0.0),
        waited_s=middle(lambda step: step.waited_s or 0.0),
        compute_s=middle(lambda step: step.step_s - (step.waited_s or 0.0)),
        step_s=middle(lambda step: step.step_s),
    )


@contextmanager
def let_go_after(path: Any) -> Iterator[None]:
    """Around a run, however it ends: what it pinned of the host's memory is free for what comes after it."""
    try:
        yield
    finally:
        if isinstance(path, StreamedPath):
            path.close()


def _not_taken(reason: str) -> ModelError:
    return ModelError(
        given=f"layers are to be streamed, and the engine does not take this run: {reason}",
        allowed="models and options that the engine takes",
        do="change that option, or use offload=off on a GPU that holds the model",
    )
