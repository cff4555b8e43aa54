"""Seconds of a step through the engine: FLOPs and bytes at the rates it reaches, and the launches it cannot beat.

A step is one row of packed examples, cut into parts only by memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from thriftune.catalog.rows import Gpu
from thriftune.engine.sizes import Choice, Keep, LayerSizes
from thriftune.engine.takes import GATE_UP, OUT, QKV
from thriftune.plan.engine import EngineCase
from thriftune.plan.time import NF4_READ, OPTIMIZER_TRAFFIC, OVERLAP, gradient_exchange_s, matrix_rate
from thriftune.plan.values import LimitedBy, Time, Work

LOGITS_PASSES = 3  # written by a product, turned into their gradient in place, read by the next product
# With dropout, times that an adapted linear's input or its gradient passes through memory: forward the mask's read and
# write and the product's read; backward the same, and the gradient's part written, read and added to the rest.
DROPPING_FORWARD, DROPPING_BACKWARD = 3, 7
PARTS_OF_A_LAYER = 7  # linears, each with a tensor of A and one of B


@dataclass(frozen=True, slots=True)
class EngineEfficiency:
    """What the engine reaches: shares of the GPU's rates (`matmul_fp8` of that of 8-bit floats), `attention` of that of
    matrices for rows of 2,048 tokens, growing with the row. The rest are seconds of the thread that launches kernels:
    for a layer's forward and backward pass, for what is computed again by what is kept, for a step, and for one whose
    rows have new lengths (attention is planned and memory mapped anew); `paged_s` for each linear's share of a paged
    optimizer's step."""

    matmul: float
    matmul_fp8: float
    attention: float
    traffic: float
    dequantise: float
    layer_s: float
    again_s: tuple[float, float, float, float]
    step_s: float
    varied_s: float
    paged_s: float
    measured: bool


ENGINE = EngineEfficiency(
    matmul=0.735,
    matmul_fp8=0.615,
    attention=0.29,
    traffic=0.675,
    dequantise=0.85,
    layer_s=0.0024,
    again_s=(0.0, 0.0005, 0.001, 0.0013),
    step_s=0.005,
    varied_s=0.0155,
    paged_s=0.00015,
    measured=True,
)


@dataclass(frozen=True, slots=True)
class EngineAmounts:
    """What one optimizer step asks of one GPU. FLOPs of layers' products, of the head's and of attention; bytes that
    pass through memory beside them, and those of weights unpacked from 4 bits; `parts` that the step is cut into."""

    products: float
    head: float
    attention: float
    mean_length: float
    traffic: float
    dequantised: float
    parts: int


def engine_time(case: EngineCase, choice: Choice, work: Work, gpu: Gpu, gpus: int) -> Time:
    """One optimizer step on `gpus` equal GPUs, each with its share of the rows."""
    amounts = engine_amounts(case, choice, work)
    reached = engine_efficiency_of(gpu)
    flops, bandwidth = matrix_rate(gpu, case.setup), gpu.bandwidth_bytes_per_s
    reach = min(1.0, reached.attention * (amounts.mean_length / 2048) ** 0.2)
    products_rate = flops * reached.matmul
    if case.setup.fp8 and gpu.flops_fp8 is not None:
        products_rate = gpu.flops_fp8 * reached.matmul_fp8
    compute_s = amounts.products / products_rate + amounts.head / (flops * reached.matmul)
    compute_s += amounts.attention / (flops * reach)
    memory_s = (amounts.traffic / reached.traffic + amounts.dequantised / reached.dequantise) / bandwidth
    layers = case.sizes.number_of_layers
    launch_s = amounts.parts * layers * (reached.layer_s + reached.again_s[choice.keep])
    link_s = gradient_exchange_s(case.adapter, gpu, gpus)
    gpu_s = compute_s + memory_s
    outside_s = reached.step_s + (reached.varied_s if work.packed.varied else 0.0)
    if case.setup.optimizer.startswith("paged"):
        outside_s += reached.paged_s * layers * PARTS_OF_A_LAYER
    step_s = (gpu_s**OVERLAP + launch_s**OVERLAP) ** (1 / OVERLAP) + outside_s + link_s
    shares: dict[LimitedBy, float] = {"compute": compute_s, "memory bandwidth": memory_s, "link": link_s}
    limited: LimitedBy = max(shares, key=lambda name: shares[name])
    if launch_s > gpu_s:
        limited = "launches"
    return Time(
        step_s=step_s,
        compute_s=compute_s,
        memory_s=memory_s,
        link_s=link_s,
        launch_s=launch_s,
        limited_by=limited,
        tokens_per_s=work.tokens_per_step / step_s,
    )


def engine_efficiency_of(gpu: Gpu) -> EngineEfficiency:
    """Measured on Hopper. Elsewhere the same shares are assumed, and `measured` says so."""
    return ENGINE if gpu.gpu_class == "hopper" else replace(ENGINE, measured=False)


def engine_amounts(case: EngineCase, choice: Choice, work: Work) -> EngineAmounts:
    shape, sizes, packed = case.shape, case.sizes, work.packed
    parts = max(1, math.ceil(packed.tokens / choice.most_tokens))
    products = sum(count * _products(layer, choice.keep) for layer, count in sizes.layers)
    traffic = sum(count * _traffic(layer, choice.keep) for layer, count in sizes.layers)
    if sizes.fp8:
        traffic += sum(count * _quantising(layer, choice.keep) for layer, count in sizes.layers)
    if case.setup.dropout:
        traffic += _dropping(case, choice.keep)
    attention = 0.0
    for layer, indices in shape.layers:
        heads = layer.attention.heads * layer.attention.head_dim
        # Each token meets half its row, or its window.
        reach = min(1.0, 2 * (layer.attention.window or math.inf) / max(packed.squares / packed.tokens, 1.0))
        attention += 2 * heads * packed.squares * reach * len(indices)
    attention *= 4.5 if choice.keep >= Keep.RESIDUALS else 3.5  # its backward pass computes the scores once more
    unpacked_layers = 0
    if case.setup.method == "qlora":
        unpacked_layers = sizes.number_of_layers - min(choice.held, sizes.number_of_layers)
    weights = shape.linear_weights / sizes.number_of_layers
    return EngineAmounts(
        products=products * packed.tokens,
        head=4.0 * shape.head.weights * packed.targets,
        attention=attention,
        mean_length=packed.squares / packed.tokens,
        traffic=traffic * sizes.element * packed.tokens
        + packed.targets * shape.vocab_size * sizes.element * LOGITS_PASSES
        + case.adapter.trained * OPTIMIZER_TRAFFIC,
        dequantised=2 * unpacked_layers * weights * (NF4_READ + (1 if sizes.fp8 else sizes.element)) * parts,
        parts=parts,
    )


def _products(layer: LayerSizes, keep: Keep) -> float:
    """FLOPs a token of a layer's frozen products: forward, the gradient of the input, and what is computed again. The
    adapters' narrow products are limited by the bytes that they read, and are counted there."""

    def weights(names: tuple[str, ...]) -> int:
        stacks = [getattr(layer, name) for name in names]
        return sum(stack.size_in * (stack.size_out + stack.rank) for stack in stacks)

    passes = 4 * weights(("qkv", "o", "gate_up", "down"))
    again = {Keep.ALL: (), Keep.NO_MLP: ("gate_up",), Keep.RESIDUALS: ("qkv", "gate_up"),
             Keep.INPUT: ("qkv", "o", "gate_up")}[keep]  # fmt: skip
    return float(passes + 2 * weights(again))


def _dropping(case: EngineCase, keep: Keep) -> float:
    """Elements a token, of all layers, beside what `_traffic` counts of the adapters. By counting: no record yet."""
    again = {Keep.ALL: (), Keep.NO_MLP: GATE_UP, Keep.RESIDUALS: (*QKV, *OUT, *GATE_UP),
             Keep.INPUT: (*QKV, *OUT, *GATE_UP)}[keep]  # fmt: skip
    found = 0
    for layer, indices in case.shape.layers:
        for linear in layer.linears:
            passes = DROPPING_FORWARD * (2 if linear.name in again else 1) + DROPPING_BACKWARD
            found += passes * linear.in_features * len(indices) * case.adapter.has(linear)
    return float(found)


def _quantising(layer: LayerSizes, keep: Keep) -> float:
    """Elements a token that pass through memory when products' inputs become 8-bit floats: one read, half of one
    written; and what is added to `o`'s and `down`'s output beside the product."""
    again = {Keep.ALL: (), Keep.NO_MLP: (layer.gate_up,), Keep.RESIDUALS: (layer.qkv, layer.gate_up),
             Keep.INPUT: (layer.qkv, layer.o, layer.gate_up)}[keep]  # fmt: skip
    inputs = sum(stack.size_in for stack in (*layer.stacks, *again)) + sum(stack.size_out for stack in layer.stacks)
    residuals = 2 + (keep == Keep.INPUT)
    return 1.5 * inputs + 3.0 * residuals * layer.qkv.size_in


def _traffic(layer: LayerSizes, keep: Keep) -> float:
    """Elements a token that are read and written outside the frozen products: norms, rotation, gate and residuals, and
    what the adapters' narrow products read."""
    width, inner, mixed = layer.qkv.size_in, layer.down.size_in, layer.qkv.size_out
    # forward: two norms, the rotation, the gate; backward: the gate's, two norms made anew, their own, the rotation
    forward = {"attention": 3 * width + 2 * mixed, "mlp": 3 * width, "gate": 3 * inner}
    backward = 6 * inner + 12 * width + 2 * mixed
    # x A^T reads its input; backward dy sB, and the gradients of A and B, read the input once and the gradient twice
    adapted = [stack for stack in layer.stacks if stack.rank]
    narrow = sum(2 * stack.size_in + 2 * stack.size_out + 6 * stack.rank for stack in adapted)
    again = {Keep.ALL: 0, Keep.NO_MLP: forward["mlp"] + layer.gate_up.size_in,
             Keep.RESIDUALS: forward["attention"] + forward["mlp"] + 3 * width,
             Keep.INPUT: forward["attention"] + forward["mlp"] + 4 * width}[keep]  # fmt: skip
    return float(sum(forward.values()) + backward + narrow + again)
