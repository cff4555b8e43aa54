"""How a model whose 4-bit layers do not all fit is held: how many stay, and where layers' inputs wait. No torch.

Notation in comments: T tokens of a whole step, t tokens of one of its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from thriftune.engine.sizes import Keep, LayerSizes, ProgramSizes

SLOTS = 2  # one slab is unpacked from, the next arrives; a slot is free as soon as its layer has been unpacked
# Tokens of a part: enough for products at full speed. Longer steps gain nothing, for parts share a layer's transfer.
MOST_TOKENS, FEWEST_TOKENS = 8192, 2048
# What the allocator has taken and cannot use at the peak, as shares of what a layer's backward pass works with: always,
# and where steps differ in length; as measured without streaming (plan/engine_memory.py).
FRAGMENTS, FRAGMENTS_VARIED = 0.3, 1.0
# Left for what is not counted: the attention kernel's workspace, cuBLAS.
SPARE_SHARE, SPARE_BYTES = 0.03, 256 * 1024**2
GRADIENT_BYTES = 4
ON_THE_WAY = 4  # layers' inputs on the device when they wait on the host: two that leave, two that come back


@dataclass(frozen=True, slots=True)
class Offload:
    """`resident` of `layers` stay on the device, the others are streamed; `inputs_on_host` says where layers' inputs
    wait for the backward pass; a step goes through a layer in parts of `most_tokens`."""

    resident: int
    layers: int
    inputs_on_host: bool
    most_tokens: int

    @property
    def words(self) -> str:
        held = f"{self.resident} of {self.layers} layers stay on the GPU, {self.layers - self.resident} are streamed"
        return f"{held}; layers' inputs wait on the {'host' if self.inputs_on_host else 'GPU'}"


@dataclass(frozen=True, slots=True)
class Demand:
    """What a run asks for: tokens of its largest step and longest row, whether steps differ in length, bytes of
    gradients and optimizer, of one layer's slab, and the number of layers that the recipe wants to stay (None: as many
    as there is room for)."""

    step_tokens: int
    longest: int
    varied: bool
    later_bytes: int
    slab_bytes: int
    resident: int | None


def choose_offload(sizes: ProgramSizes, free: int | None, demand: Demand) -> Offload:
    """Inputs on the device while that leaves parts of a good size, else on the host; then as many layers stay as there
    is room for. Where nothing fits the least is returned, and running out of memory decides. `free` bytes can still be
    allocated, None where memory is not counted."""
    layers = sizes.number_of_layers
    wanted = min(demand.resident or 0, layers)
    if free is None:
        return Offload(wanted, layers, False, min(demand.step_tokens, max(demand.longest, MOST_TOKENS)))
    usable = int(free * (1 - SPARE_SHARE)) - SPARE_BYTES
    for on_host, tokens in _ways(demand):
        spare = usable - needed_bytes(sizes, demand, tokens, on_host) - wanted * demand.slab_bytes
        if spare >= 0:
            more = spare // demand.slab_bytes if demand.resident is None else 0
            return Offload(min(layers, wanted + more), layers, on_host, tokens)
    return Offload(wanted, layers, True, demand.longest)


def least_offload(sizes: ProgramSizes, demand: Demand) -> Offload:
    layers = sizes.number_of_layers
    return Offload(min(demand.resident or 0, layers), layers, True, demand.longest)


def needed_bytes(sizes: ProgramSizes, demand: Demand, tokens: int, inputs_on_host: bool) -> int:
    """Of a step in parts of so many tokens, on top of what lies on the device before the first step."""
    element, width, layers = sizes.element, sizes.width, sizes.number_of_layers
    rank = max(layer.down.rank for layer, _ in sizes.layers)
    # A layer's input or its gradient for all parts, the side products of `down`, and layers' inputs.
    rows = demand.step_tokens * element * (width + rank)
    sides = demand.step_tokens * element * rank * layers
    inputs = demand.step_tokens * element * width * (ON_THE_WAY if inputs_on_host else layers)
    at_the_head = sizes.rows_at_once(tokens) * sizes.vocabulary * element + rows + tokens * 2 * width * element
    working = max(tokens * sizes.working_bytes(Keep.INPUT), at_the_head)
    fragments = fragment_bytes(sizes, demand, tokens)
    return SLOTS * demand.slab_bytes + demand.later_bytes + rows + sides + inputs + working + fragments


def fragment_bytes(sizes: ProgramSizes, demand: Demand, tokens: int) -> int:
    share = FRAGMENTS + (FRAGMENTS_VARIED if demand.varied else 0.0)
    return round(share * tokens * sizes.working_bytes(Keep.ALL))


def padding_bytes(sizes: ProgramSizes, ranked: int) -> int:
    """Gradients of a stack's A factors are parts of one product, which has the padded rank: bytes of it that are no
    parameter's. `ranked` are the elements of all A factors."""
    padded = sum(stack.rank * stack.size_in * count for layer, count in sizes.layers for stack in layer.stacks)
    return GRADIENT_BYTES * (padded - ranked)


def host_bytes(sizes: ProgramSizes, demand: Demand, chosen: Offload) -> int:
    """Pinned memory of the host."""
    inputs = demand.step_tokens * sizes.element * sizes.width * chosen.layers if chosen.inputs_on_host else 0
    return (chosen.layers - chosen.resident) * demand.slab_bytes + inputs


def slab_bytes(layer: LayerSizes, weight_bytes: float) -> int:
    """Of one layer, at so many bytes a weight with its scales."""
    return round(sum(stack.size_in * stack.size_out for stack in layer.stacks) * weight_bytes)


def _ways(demand: Demand) -> Iterator[tuple[bool, int]]:
    """Where inputs wait, and tokens of a part, the most convenient first."""
    sizes = [max(demand.longest, min(MOST_TOKENS, demand.step_tokens))]
    while sizes[-1] > demand.longest:
        sizes.append(max(demand.longest, sizes[-1] // 2))
    good = [size for size in sizes if size >= FEWEST_TOKENS] or sizes[:1]
    yield from ((False, size) for size in good)
    yield from ((True, size) for size in sizes)
