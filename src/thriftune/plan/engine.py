"""What the engine will do with a run: whether it takes it, the sizes it works with, and what it will choose.

The rule, the bytes and the choice are the engine's own (`engine.takes`, `engine.sizes`), fed from a model's shape and a
recipe instead of loaded weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from thriftune.catalog.rows import Gpu
from thriftune.engine.sizes import (
    RECOMPUTING,
    Choice,
    LayerSizes,
    ProgramSizes,
    StackSizes,
    choose,
    later_bytes,
    padded,
    rank_multiple,
    without_spare,
)
from thriftune.engine.takes import (
    DOWN,
    FP8_FROM,
    GATE_UP,
    LINEARS,
    OUT,
    QKV,
    why_not_adapter,
    why_not_fp8,
    why_not_heads,
    why_not_method,
    why_not_model,
)
from thriftune.plan.adapter import Adapter
from thriftune.plan.memory import WIDE, Setup, outside, weight_bytes
from thriftune.plan.values import Packed
from thriftune.recipe import Recipe
from thriftune.shapes import Layer, ModelShape

OLDEST = (8, 0)  # the compute capability from which on a GPU has bfloat16 products


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes that lie on the GPU before the first step. `unpacked` are the buffers that 4-bit layers share."""

    weights: float
    adapter: float
    unpacked: float

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.unpacked


def why_not_engine(shape: ModelShape, recipe: Recipe, method: str, adapter: Adapter, gpu: Gpu | None) -> str | None:
    """Why such a run goes through transformers' model with autograd, in words; None when the engine takes it."""
    return (
        why_not_method(recipe, method)
        or _why_not_gpu(gpu)
        or (
            "its attention kernels take 16-bit numbers" if gpu is not None and recipe.model.dtype == "float32" else None
        )
        or why_not_model(shape.part_of or shape.model_type, shape.activation, shape.rope)
        or (_why_not_heads(shape) if gpu is not None else None)
        or (_why_not_fp8(shape, gpu) if recipe.precision == "fp8" else None)
        or why_not_adapter(recipe.lora, any(linear.bias for _, linear, _ in shape.linears()))
        or next((f"an adapter on {path}" for path in adapter.ranks if path.rpartition(".")[2] not in LINEARS), None)
    )


def _why_not_gpu(gpu: Gpu | None) -> str | None:
    if gpu is None:
        return None
    if gpu.unified_memory:
        return "it runs on CUDA and on CPUs"
    capability = tuple(int(part) for part in (gpu.compute_capability or "").split(".") if part.isdigit())
    return "this GPU has no bfloat16 products" if gpu.flops_bf16 is None or (0,) < capability < OLDEST else None


def _why_not_heads(shape: ModelShape) -> str | None:
    return next((reason for layer, _ in shape.layers if (reason := why_not_heads(layer.attention.head_dim))), None)


def _why_not_fp8(shape: ModelShape, gpu: Gpu | None) -> str | None:
    sides = [size for _, linear, _ in shape.linears() for size in (linear.in_features, linear.out_features)]
    if gpu is None:
        return why_not_fp8(None, sides)
    return why_not_fp8((0, 0) if gpu.flops_fp8 is None else FP8_FROM, sides)


@dataclass(frozen=True, slots=True)
class EngineCase:
    """A model and its adapter as the engine would hold them; without a `gpu`, in a process on a CPU."""

    shape: ModelShape
    adapter: Adapter
    setup: Setup
    gpu: Gpu | None
    sizes: ProgramSizes
    resident: Resident


def engine_case(shape: ModelShape, adapter: Adapter, setup: Setup, gpu: Gpu | None) -> EngineCase:
    """Only where the engine takes the model. 16-bit weights lie in the stacks' buffers, whose further rows and columns
    hold the adapters' working copies; 4-bit ones are packed, and the layers share buffers."""
    multiple = rank_multiple("cpu" if gpu is None else "cuda", setup.fp8)
    layers = [
        (_layer(layer, shape.hidden_size, adapter, setup, multiple), len(indices)) for layer, indices in shape.layers
    ]
    sizes = ProgramSizes(layers, shape.hidden_size, shape.vocab_size, setup.value_bytes, setup.fp8)
    masters, weights = float(adapter.trained * WIDE), weight_bytes(shape, setup)
    if setup.fp8:
        return EngineCase(shape, adapter, setup, gpu, sizes, _resident_in_fp8(sizes, setup, masters, weights))
    if setup.method == "qlora":
        shared = float(sizes.element * sum(stack.buffer for stack in _that_share(sizes)))
        return EngineCase(shape, adapter, setup, gpu, sizes, Resident(weights, masters, shared))
    own = sum(layer.buffers * count for layer, count in sizes.layers)
    plain = sum(stack.size_in * stack.size_out * count for layer, count in sizes.layers for stack in layer.stacks)
    copies = float(sizes.element * (own - plain))
    return EngineCase(shape, adapter, setup, gpu, sizes, Resident(weights, masters + copies, 0.0))


def _that_share(sizes: ProgramSizes) -> list[StackSizes]:
    """Of stacks that are alike in all layers, one each; those of one layer are there at once, alike or not."""
    return [stack for _, stack in {found for layer, _ in sizes.layers for found in enumerate(layer.stacks)}]


def _resident_in_fp8(sizes: ProgramSizes, setup: Setup, masters: float, weights: float) -> Resident:
    """Adapters' 16-bit copies are every layer's own. 16-bit weights have both 8-bit layouts beside them; 4-bit ones are
    unpacked into such layouts, which the layers share."""
    stacks = [(stack, count) for layer, count in sizes.layers for stack in layer.stacks]
    copies = sizes.element * sum(count * stack.copies for stack, count in stacks)
    if setup.method == "qlora":
        shared = float(sum(stack.fp8_bytes for stack in _that_share(sizes)))
        return Resident(weights, masters + copies, shared)
    return Resident(weights + sum(count * stack.fp8_bytes for stack, count in stacks), masters + copies, 0.0)


def _layer(layer: Layer, hidden: int, adapter: Adapter, setup: Setup, multiple: int) -> LayerSizes:
    qkv, o, gate_up, down = (_stack(layer, names, adapter, multiple) for names in (QKV, OUT, GATE_UP, DOWN))
    attention = layer.attention
    drops = setup.dropout > 0 and any(adapter.has(linear) for linear in layer.linears)
    return LayerSizes(qkv, o, gate_up, down, attention.heads, attention.kv_heads, layer.norms > 2 * hidden, drops)


def _stack(layer: Layer, names: tuple[str, ...], adapter: Adapter, multiple: int) -> StackSizes:
    parts = [linear for linear in layer.linears if linear.name in names]
    rank = sum(adapter.rank_of(linear) for linear in parts)
    return StackSizes(parts[0].in_features, sum(linear.out_features for linear in parts), padded(rank, multiple))


def engine_choice(case: EngineCase, recipe: Recipe, packed: Packed, usable: int) -> Choice:
    """What the engine will choose at the first step of a run that has `usable` bytes of the GPU to itself."""
    most, least = RECOMPUTING[recipe.train.gradient_checkpointing]
    free = None
    if case.gpu is not None:
        free = without_spare(round(usable - outside(case.gpu)[0] - case.resident.total))
    later = later_bytes(case.setup.optimizer, case.adapter.trained)
    found = choose(case.sizes, free, packed.largest, packed.longest, later, most, least)
    return found if case.resident.unpacked else replace(found, held=0)  # of 16-bit layers nothing is unpacked


def least_choice(case: EngineCase, recipe: Recipe, packed: Packed) -> Choice:
    """The least that the engine can run with, when memory is short."""
    least = RECOMPUTING[recipe.train.gradient_checkpointing][1]
    return Choice(least, packed.longest, 0, case.sizes.number_of_layers)
