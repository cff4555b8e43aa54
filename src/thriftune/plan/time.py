"""Seconds of a step: FLOPs and bytes at the rates a path reaches, and the launches it cannot beat.

A micro-batch takes the GPU's time or the time in which Python launches its kernels, whichever is longer; close to each
other they add up to a little more. The rates reached are shares of the catalogue's rates, fitted on half of the points
of benchmarks/plan_points and checked on the other half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from thriftune.catalog.rows import Gpu
from thriftune.plan.adapter import Adapter
from thriftune.plan.memory import Setup, layer_saved
from thriftune.plan.values import LimitedBy, Time, Work
from thriftune.shapes import ModelShape

NF4_READ = 0.516  # bytes of a packed weight and its scales
OPTIMIZER_TRAFFIC = 28  # bytes a trained parameter: weight, gradient and two moments read, all but the gradient written
LOSS_PASSES = 8  # float32 passes over the logits: made, widened, reduced, exponentiated, scaled
OVERLAP = 4.0  # how sharply the longer of two times wins where they are close


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What a path reaches.

    The first five are shares of the GPU's rates; `attention` of its matrix rate for rows of 2,048 tokens, growing with
    the row. The rest are seconds of one thread of Python: for a decoder layer, for each adapted linear in it, for each
    linear held in 4 bits, for an optimizer step; recomputing repeats `relaunched` of it.
    """

    matmul: float
    attention: float
    traffic: float
    adapter: float
    dequantise: float
    layer_s: float
    adapted_s: float
    four_bit_s: float
    relaunched: float
    step_s: float
    measured: bool


GENERIC = Efficiency(
    matmul=0.80,
    attention=0.163,
    traffic=0.12,
    adapter=0.389,
    dequantise=0.253,
    layer_s=0.00413,
    adapted_s=0.000327,
    four_bit_s=0.00057,
    relaunched=0.7,
    step_s=1e-5,
    measured=True,
)


@dataclass(frozen=True, slots=True)
class Amounts:
    """What one optimizer step asks of one GPU: FLOPs of products and of attention, bytes of what layers make and read,
    of the adapter's narrow products, of weights unpacked from 4 bits, of the loss and the optimizer; launching seconds
    are counted in layers, adapted linears and 4-bit linears passed, and steps."""

    products: float
    attention: float
    attention_reach: float
    traffic: float
    adapter: float
    dequantised: float
    loss_and_optimizer: float
    layers: float
    adapted: float
    four_bit: float


def time_of(shape: ModelShape, adapter: Adapter, setup: Setup, work: Work, gpu: Gpu, gpus: int) -> Time:
    """One optimizer step on `gpus` equal GPUs, each with its share of the rows."""
    return time_with(efficiency_of(gpu), shape, adapter, setup, work, gpu, gpus)


def efficiency_of(gpu: Gpu) -> Efficiency:
    """Measured on Hopper. Elsewhere the same shares are assumed, and `measured` says so."""
    return GENERIC if gpu.gpu_class == "hopper" else replace(GENERIC, measured=False)


def time_with(
    reached: Efficiency, shape: ModelShape, adapter: Adapter, setup: Setup, work: Work, gpu: Gpu, gpus: int
) -> Time:
    amounts = amounts_of(shape, adapter, setup, work)
    flops = matrix_rate(gpu, setup)
    bandwidth = gpu.bandwidth_bytes_per_s
    reach = min(1.0, reached.attention * (amounts.attention_reach / 2048) ** 0.5)
    compute_s = amounts.products / (flops * reached.matmul) + amounts.attention / (flops * reach)
    memory_s = (
        amounts.traffic / reached.traffic
        + amounts.adapter / reached.adapter
        + amounts.dequantised / reached.dequantise
        + amounts.loss_and_optimizer / 0.8
    ) / bandwidth
    again = 1 + (reached.relaunched if setup.checkpointing else 0.0)
    launch_s = again * (
        amounts.layers * reached.layer_s + amounts.adapted * reached.adapted_s + amounts.four_bit * reached.four_bit_s
    )
    link_s = gradient_exchange_s(adapter, gpu, gpus)
    gpu_s = compute_s + memory_s
    step_s = (gpu_s**OVERLAP + launch_s**OVERLAP) ** (1 / OVERLAP) + reached.step_s + link_s
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


def amounts_of(shape: ModelShape, adapter: Adapter, setup: Setup, work: Work) -> Amounts:
    full, again = setup.method == "full", setup.checkpointing
    tokens, positions = work.padded_tokens_per_step, work.targets_per_step
    mean_length = tokens / (work.rows * work.micro_batches)
    # Forward, gradient of the input, and for trained weights gradient of the weight: 2 FLOPs a weight each.
    passes = (6 if full else 4) + (2 if again else 0)
    products = passes * shape.active_weights * tokens + (6 if full else 4) * shape.head.weights * positions
    products += 0 if full else (6 + (2 if again else 0)) * adapter.trained * tokens
    attention = 0.0
    for layer, indices in shape.layers:
        reach = min(mean_length, 2 * (layer.attention.window or mean_length))
        width = layer.attention.heads * (layer.attention.head_dim + layer.attention.value_dim) / 2
        attention += 2 * width * reach * len(indices)
    attention *= tokens * (4.5 if again else 3.5)  # its backward pass computes the scores once more
    touched = 4.0 if again else 3.0  # written, read by the next operation, read in the backward pass
    saved = sum(
        layer_saved(layer, shape.hidden_size, adapter, setup, work.length) * len(at) for layer, at in shape.layers
    )
    sides = 0
    adapted = linears = 0
    for _, linear, repeats in shape.linears():
        linears += repeats * linear.is_module
        if adapter.has(linear):
            sides += repeats * linear.active * (linear.in_features + linear.out_features)
            adapted += repeats
    four_bit = setup.method == "qlora"
    return Amounts(
        products=float(products),
        attention=attention,
        attention_reach=mean_length,
        traffic=saved * tokens * touched,
        adapter=float(setup.value_bytes * sides * tokens * touched),
        dequantised=shape.linear_weights * (3 if again else 2) * (NF4_READ + 2) * work.micro_batches
        if four_bit
        else 0.0,
        loss_and_optimizer=positions * shape.vocab_size * 4.0 * LOSS_PASSES + adapter.trained * OPTIMIZER_TRAFFIC,
        layers=float(shape.num_layers * work.micro_batches),
        adapted=float(adapted * work.micro_batches),
        four_bit=float(linears * work.micro_batches if four_bit else 0),
    )


def matrix_rate(gpu: Gpu, setup: Setup) -> float:
    """FLOP/s of dense products in the type they are computed in. Without bfloat16 units products are in float32."""
    if setup.value_bytes == 4 or gpu.flops_bf16 is None:
        return gpu.flops_fp32
    return gpu.flops_bf16


def gradient_exchange_s(adapter: Adapter, gpu: Gpu, gpus: int) -> float:
    """Gradients summed over the GPUs once a step, in float32, each sent and received over the host link."""
    return 0.0 if gpus == 1 else 2 * 4 * adapter.trained * (gpus - 1) / gpus / gpu.link_bytes_per_s
