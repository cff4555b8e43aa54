"""Bytes at a run's peak, part by part, for the generic path: transformers' model under bfloat16 autocast with autograd.

Each term is a tensor that PyTorch's allocator holds at that moment; they were read off the allocator's own trace (layer
by layer, on an H200) and are held to measurement by benchmarks/plan_points. Sizes are bytes unless the name says
otherwise. Notation in comments: T tokens at once (padding included), N positions with logits, d hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from thriftune.catalog.rows import Gpu
from thriftune.plan.adapter import Adapter
from thriftune.plan.values import PARTS, Memory, Work
from thriftune.recipe import Recipe
from thriftune.shapes import Layer, Linear, ModelShape
from thriftune.units import MIB

WIDE, HALF = 4, 2  # bytes of float32 and of bfloat16
NF4_BYTES = {True: 0.5 + 1 / 64 + 4 / 16384, False: 0.5 + 4 / 64}  # a weight, with its scales quantised too, or not
LOSS_CHUNK = 64 * MIB  # train/loss.py: float32 copies of the logits are made for so many bytes at a time
# Linears that do not read the residual stream, so they share their input with no other.
OUTPUT_SIDE = {"o_proj", "out_proj", "c_proj", "dense", "down_proj", "w2", "dense_4h_to_h", "fc2", "output_linear"}
# AdamW's two moments, bytes a trained parameter: (of the moments, of the 8-bit ones' scales, whether they are paged).
# Paged moments lie in managed memory beside PyTorch's allocator.
OPTIMIZERS = {
    "adamw_torch": (8.0, 0.0, False),
    "adamw_8bit": (2.0, 8 / 256, False),
    "paged_adamw_8bit": (2.0, 8 / 256, True),
    "paged_adamw_32bit": (8.0, 0.0, True),
}
FRAGMENTS_FIXED = 24 * MIB
# A process that trains on a CPU, beside its tensors: Python, torch, transformers, peft. The largest resident size of
# `thriftune train pocket` less the other parts (torch 2.13 for CPUs, one thread, 20 steps, three data sets) was 461 to
# 469 MiB with full, 476 to 481 with lora and 482 to 486 with qlora.
CPU_RUNTIME = 486 * MIB
# cuBLAS workspaces in PyTorch's allocator: 32 MiB a thread that multiplies (two do) from Hopper on, 8 before.
CUBLAS_HOPPER, CUBLAS = 64 * MIB, 17 * MIB


@dataclass(frozen=True, slots=True)
class Setup:
    """What decides the bytes beside the model and the work. `value_bytes` is the type that products are computed in."""

    method: str
    checkpointing: bool
    optimizer: str
    value_bytes: int
    double_quant: bool
    dropout: float
    eager_attention: bool
    fp8: bool


def optimizers_of(recipe: Recipe, method: str, on_gpu: bool) -> tuple[str, ...]:
    """What `train.optim=auto` may become, the one that takes least memory last. Paged 8-bit states save memory and cost
    time, for bitsandbytes steps each tensor by itself."""
    if recipe.train.optim != "auto":
        return (recipe.train.optim,)
    return ("adamw_torch", "paged_adamw_8bit") if method == "qlora" and on_gpu else ("adamw_torch",)


def setup_of(recipe: Recipe, method: str, checkpointing: bool, on_gpu: bool, optimizer: str | None = None) -> Setup:
    """With the `optimizer` of this name; without one, that of `optimizers_of` which takes least memory."""
    wide = recipe.model.dtype == "float32" or (recipe.model.dtype == "auto" and not on_gpu)
    return Setup(
        method=method,
        checkpointing=checkpointing,
        optimizer=optimizer or optimizers_of(recipe, method, on_gpu)[-1],
        value_bytes=WIDE if wide else HALF,
        double_quant=recipe.quant.bnb_4bit_use_double_quant,
        dropout=recipe.lora.dropout if method != "full" else 0.0,
        eager_attention=recipe.model.attn_implementation == "eager",
        fp8=recipe.precision == "fp8",
    )


def memory_of(shape: ModelShape, adapter: Adapter, setup: Setup, work: Work, gpu: Gpu | None) -> Memory:
    """The parts at the moment of the step that needs most, on each GPU; without a GPU, in a process on a CPU."""
    runtime, cublas_workspace = outside(gpu)
    resident = _resident(shape, adapter, setup)
    states, paged = optimizer_states(adapter, setup)
    gradients = adapter.trained * float(WIDE)
    moments = _moments(shape, adapter, setup, work, gradients)
    peak = max(moments, key=lambda moment: sum(moment.values()))
    parts = dict.fromkeys(PARTS, 0.0) | resident
    parts["optimizer"] = states
    for part, size in peak.items():
        parts[part] += size
    parts["workspace"] += cublas_workspace
    return in_all(parts, _fragmentation(shape, adapter, setup, work), paged, runtime)


def in_all(parts: dict[str, float], fragments: float, paged: float, runtime: int) -> Memory:
    """Of the `parts` that tensors hold at the peak: with what the allocator cannot use beside them, the optimizer's
    paged states and what lies outside the allocator. Bytes."""
    allocated = sum(parts.values())
    whole = parts | {
        "workspace": parts["workspace"] + fragments,
        "optimizer": parts["optimizer"] + paged,
        "runtime": float(runtime),
    }
    return Memory(
        parts={name: round(size) for name, size in whole.items()},
        allocated_bytes=round(allocated),
        reserved_bytes=round(allocated + fragments),
    )


def outside(gpu: Gpu | None) -> tuple[int, int]:
    """What the driver and libraries hold outside PyTorch's allocator, and cuBLAS inside it."""
    if gpu is None:
        return CPU_RUNTIME, 0
    if gpu.unified_memory:
        return CPU_RUNTIME, 0
    modern = gpu.gpu_class in ("hopper", "blackwell", "blackwell-consumer")
    return (600 * MIB if modern else 450 * MIB), (CUBLAS_HOPPER if modern else CUBLAS)


def optimizer_states(adapter: Adapter, setup: Setup) -> tuple[float, float]:
    """Bytes in PyTorch's allocator, and in managed memory."""
    moments, scales, paged = OPTIMIZERS[setup.optimizer]
    in_managed = (adapter.trained - adapter.small) * moments if paged else 0.0
    return adapter.trained * (moments + scales) - in_managed, in_managed


def weight_bytes(shape: ModelShape, setup: Setup) -> float:
    """The frozen or trained weights as they lie on the GPU. Full fine-tuning holds them in float32."""
    if setup.method == "full":
        return shape.total_parameters * WIDE
    if setup.method == "qlora":
        quantised = shape.quantised_weights
        others = shape.total_parameters - quantised
        return quantised * NF4_BYTES[setup.double_quant] + others * setup.value_bytes
    return shape.total_parameters * setup.value_bytes


def _resident(shape: ModelShape, adapter: Adapter, setup: Setup) -> dict[str, float]:
    if setup.method == "full":
        return {"weights": weight_bytes(shape, setup)}
    return {"weights": weight_bytes(shape, setup), "adapter": adapter.trained * WIDE}


def _moments(shape: ModelShape, adapter: Adapter, setup: Setup, work: Work, gradients: float) -> list[dict[str, float]]:
    """What is held beside weights, adapter and optimizer state at each moment of a step that can be its peak.

    The first micro-batch is the longest and finds no gradients; later ones find those of the ones before.
    """
    first = _of_micro_batch(shape, adapter, setup, work.rows, work.length, work.target_positions)
    moments = first
    if work.micro_batches > 1:
        later = _of_micro_batch(shape, adapter, setup, work.rows, work.later_length, work.later_positions)
        moments = moments + [_with_gradients(moment, gradients) for moment in later]
    return [*moments, {"gradients": gradients, "workspace": _embedding_gradient(shape, setup)}]


def _with_gradients(moment: dict[str, float], gradients: float) -> dict[str, float]:
    """The moment when all gradients of earlier micro-batches are there; its own head's is then a copy to be added."""
    new = moment.get("gradients", 0.0)
    return {**moment, "gradients": gradients, "workspace": moment.get("workspace", 0.0) + new}


def _of_micro_batch(
    shape: ModelShape, adapter: Adapter, setup: Setup, rows: int, length: int, target_positions: int
) -> list[dict[str, float]]:
    """At the loss; leaving the head and the last norm; in the last layer's backward pass."""
    tokens, hidden, full = rows * length, shape.hidden_size, setup.method == "full"
    stream = WIDE if full else setup.value_bytes  # bytes of the residual stream's values
    casts = _cast_weights(shape, adapter, setup)
    saved = [(layer_saved(layer, hidden, adapter, setup, length) * tokens, len(at)) for layer, at in shape.layers]
    if setup.checkpointing:
        held, held_casts = float(stream * hidden * tokens * shape.num_layers), casts.head
    else:
        held, held_casts = sum(size * count for size, count in saved), casts.all
    positions = rows * target_positions
    logits = float(positions * shape.vocab_size * setup.value_bytes)
    chunks = 2.0 * min(LOSS_CHUNK, WIDE * positions * shape.vocab_size)
    held_at_head = held + WIDE * hidden * tokens * (2 if full else 1) + positions * hidden * setup.value_bytes
    head_gradient = float(shape.head.weights * WIDE) if full else 0.0
    transient = max(layer_transient(layer, hidden, setup, tokens, _largest(shape, setup)) for layer, _ in shape.layers)
    return [
        {"activations": held_at_head, "logits": 2 * logits + chunks, "workspace": held_casts},
        {  # the head's gradient in bfloat16, with the logits' own beside it, then as float32
            "activations": held_at_head,
            "logits": logits if full and logits > head_gradient else 0.0,
            "workspace": held_casts + (head_gradient * HALF / WIDE if full else 0.0),
            "gradients": head_gradient,
        },
        {
            "activations": held_at_head + 5 * WIDE * hidden * tokens,  # a norm's backward pass, in float32
            "workspace": held_casts,
            "gradients": head_gradient,
        },
        {
            "activations": held + (max(size for size, _ in saved) if setup.checkpointing else 0.0) + transient,
            "workspace": casts.layer if setup.checkpointing else held_casts,
            "gradients": head_gradient,
        },
    ]


def _largest(shape: ModelShape, setup: Setup) -> float:
    """Bytes of the largest 4-bit matrix while it is dequantised for a product."""
    if setup.method != "qlora":
        return 0.0
    sizes = [linear.in_features * linear.out_features for _, linear, _ in shape.linears() if linear.is_module]
    return float(max(sizes, default=0) * setup.value_bytes)


@dataclass(frozen=True, slots=True)
class Casts:
    """bfloat16 copies of float32 weights that products need: of the whole model, of one layer, of the head."""

    all: float
    layer: float
    head: float


def _cast_weights(shape: ModelShape, adapter: Adapter, setup: Setup) -> Casts:
    if setup.value_bytes == WIDE:
        return Casts(0.0, 0.0, 0.0)
    layers = max(1, shape.num_layers)
    if setup.method == "full":
        inside = shape.sum_over_linears(lambda linear: linear.weights) * HALF
        head = shape.head.weights * HALF
        return Casts(inside + head, inside / layers, head)
    return Casts(adapter.trained * HALF, adapter.trained * HALF / layers, 0.0)


def layer_saved(layer: Layer, hidden: int, adapter: Adapter, setup: Setup, length: int) -> float:
    """Bytes a token that one layer keeps for its backward pass when nothing is recomputed.

    Llama with LoRA on all linears: two float32 norm inputs and their outputs, q, k, v and the attention's output, and
    the MLP's gate, its activation, up and their product.
    """
    full, value = setup.method == "full", setup.value_bytes
    attention, mlp = _split(layer)
    wide_norms = layer.norms // hidden
    kept = float(WIDE * hidden * wide_norms * (2 if full else 1))
    kept += _attention_saved(layer, attention, hidden, setup, length)
    kept += _inputs_saved(attention, adapter, setup) + _inputs_saved(mlp, adapter, setup)
    readers = sum(linear.out_features * linear.active for linear in mlp if linear.name not in OUTPUT_SIDE)
    inner = sum(linear.in_features * linear.active for linear in mlp if linear.name in OUTPUT_SIDE)
    kept += value * (readers + (inner if layer.gated else 0))
    product_kept = full or any(adapter.has(linear) for linear in mlp if linear.name in OUTPUT_SIDE)
    kept += value * inner if product_kept else 0
    kept += sum(setup.value_bytes * adapter.rank_of(linear) for linear in layer.linears)
    if setup.dropout:
        kept += sum((value + 1) * linear.in_features for linear in layer.linears if adapter.has(linear))
    if adapter.dora:
        kept += sum(2 * value * linear.out_features for linear in layer.linears if adapter.has(linear))
    return kept


def _split(layer: Layer) -> tuple[list[Linear], list[Linear]]:
    """The linears of the token mixer and of the MLP."""
    mixer = [linear for linear in layer.linears if _is_mixer(linear)]
    return mixer, [linear for linear in layer.linears if not _is_mixer(linear)]


def _is_mixer(linear: Linear) -> bool:
    return any(part in linear.path for part in ("attn", "attention", "mixer", "mamba"))


def _attention_saved(layer: Layer, linears: list[Linear], hidden: int, setup: Setup, length: int) -> float:
    attention, value = layer.attention, setup.value_bytes
    if attention.kind in ("linear", "none"):  # what goes through its products, read and written once each
        return 2 * value * sum(linear.out_features for linear in linears)
    query = attention.heads * attention.head_dim
    key = attention.kv_heads * attention.head_dim
    result = attention.heads * attention.value_dim
    kept = float(value * (query + key + attention.kv_heads * attention.value_dim + result))
    kept += WIDE * attention.heads  # log of the softmax's sum
    if layer.norms % hidden >= attention.head_dim > 0:  # norms of each head's query and key
        kept += (WIDE + (value if setup.method == "full" else 0)) * (query + key)
    if setup.eager_attention:
        kept += attention.heads * length * (WIDE + 2 * value)
    return kept


def _inputs_saved(linears: list[Linear], adapter: Adapter, setup: Setup) -> float:
    """Inputs of products kept for the weights' gradients. Those that read the same norm share one copy, unless weights
    are float32 and every product makes a bfloat16 copy of its own."""
    readers = [linear for linear in linears if linear.name not in OUTPUT_SIDE]
    if setup.method == "full":
        wide = setup.value_bytes == WIDE
        return sum(setup.value_bytes * linear.in_features * linear.active for linear in readers[: 1 if wide else None])
    shared = [linear.in_features for linear in readers if adapter.has(linear)]
    return setup.value_bytes * max(shared, default=0)


def layer_transient(layer: Layer, hidden: int, setup: Setup, tokens: int, dequantised: float) -> float:
    """Bytes beside what is saved, at the fullest moment of one layer's backward pass: a product's gradient, one more of
    the MLP's width or the weight dequantised for it, and the gradient of the residual stream."""
    _, mlp = _split(layer)
    inner = max((linear.in_features * linear.active for linear in mlp if linear.name in OUTPUT_SIDE), default=0)
    stream = WIDE if setup.method == "full" else setup.value_bytes
    width = float(setup.value_bytes * inner * tokens)
    return width + max(width, dequantised) + stream * hidden * tokens


def _embedding_gradient(shape: ModelShape, setup: Setup) -> float:
    """A tied embedding's own gradient exists beside the head's until they are added."""
    return float(WIDE * shape.embedding) if setup.method == "full" and shape.tied else 0.0


def _fragmentation(shape: ModelShape, adapter: Adapter, setup: Setup, work: Work) -> float:
    """What the allocator has taken from the driver and cannot use at the peak, with expandable segments.

    The only fitted constants of this file; half of the points of benchmarks/plan_points gave them.
    Full fine-tuning loses up to one float32 matrix of the vocabulary's size.
    """
    if setup.method == "full":
        return float(FRAGMENTS_FIXED + WIDE * shape.embedding)
    tokens = work.rows * work.length
    gradients = adapter.trained * WIDE
    width = max((linear.out_features * linear.active for _, linear, _ in shape.linears()), default=0)
    largest = max((linear.in_features * linear.out_features for _, linear, _ in shape.linears()), default=0)
    lost = FRAGMENTS_FIXED + 2.2 * setup.value_bytes * shape.hidden_size * tokens + 0.11 * gradients
    if setup.checkpointing:
        lost += 1.3 * setup.value_bytes * width * tokens + 0.9 * gradients
    if work.micro_batches > 1 and work.later_length < work.length:  # micro-batches of many lengths
        lost += 1.3 * HALF * largest
    return lost
