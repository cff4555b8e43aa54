"""Bytes that the engine takes, counted from sizes alone: what layers keep, what a step works with, and how much of it
fits. No torch: `plan` counts with these functions before anything is loaded, `room` while a run goes on.

Sizes are elements unless the name says bytes; `element` is the bytes of one number that products are computed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

STATISTICS_BYTES = 4  # a float32 for each norm, and for each head's softmax
# Logits are made for so many positions at once that they take no more than a layer's backward pass does, and no more
# than are needed for the head's products to run at full speed. 4,096 rows of a 128k vocabulary take 1 GiB.
CHUNK_BYTES = 512 * 1024**2
FEWEST_ROWS = 128
# Left for what is not counted: the attention kernel's workspace, fragments, cuBLAS.
SPARE_SHARE = 0.04
SPARE_BYTES = 96 * 1024**2
# A stack's rank is padded to this: a GPU's products like rows of whole 128 bytes, a CPU's mind padding more. Products
# in 8-bit floats have the adapters' columns apart, and want whole 16 bytes.
RANK_MULTIPLE = {"cuda": 64, "cpu": 16}
FP8_MULTIPLE = 16
FP8_PLACES = 3  # of each of an adapter's numbers beside an 8-bit weight
# Bytes a trained parameter that a step's gradient and the optimizer's states take in PyTorch's allocator: gradients are
# float32; paged states lie elsewhere.
LATER_BYTES = {"adamw_torch": 12, "paged_adamw_32bit": 5, "adamw_8bit": 7, "paged_adamw_8bit": 5}


class Keep(IntEnum):
    """What a layer keeps for its backward pass, less and less; the rest is computed again, bit for bit the same.

    ALL: everything but what norms and the gate make in passing. NO_MLP: not the gate's and up's product, the largest.
    RESIDUALS: the layer's input and the residual between attention and MLP. INPUT: the input alone. The `down` product
    is never computed again: no gradient needs it.
    """

    ALL = 0
    NO_MLP = 1
    RESIDUALS = 2
    INPUT = 3

    @property
    def words(self) -> str:
        return ("everything", "all but the MLP's products", "their input and the residual after attention",
                "their input alone")[self]  # fmt: skip


# train.gradient_checkpointing -> the most and the least that layers keep
RECOMPUTING = {"auto": (Keep.ALL, Keep.INPUT), "on": (Keep.INPUT, Keep.INPUT), "off": (Keep.ALL, Keep.ALL)}


@dataclass(frozen=True, slots=True)
class StackSizes:
    """Linears of one input and their adapters' padded rank: a buffer of (out + rank) x (in + rank)."""

    size_in: int
    size_out: int
    rank: int

    @property
    def buffer(self) -> int:
        return (self.size_out + self.rank) * (self.size_in + self.rank)

    @property
    def fp8_bytes(self) -> int:
        """Of the weight in 8-bit floats in its two layouts, with the adapters' columns."""
        beside = FP8_PLACES * self.rank
        return self.size_out * (self.size_in + beside) + self.size_in * (self.size_out + beside)

    @property
    def copies(self) -> int:
        """Elements of the adapters' 16-bit copies alone."""
        return self.rank * (self.size_in + self.size_out)


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """`head_norms`: queries and keys have a norm for each head. `drops`: adapters have dropout before them."""

    qkv: StackSizes
    o: StackSizes
    gate_up: StackSizes
    down: StackSizes
    heads: int
    groups: int
    head_norms: bool
    drops: bool

    @property
    def stacks(self) -> tuple[StackSizes, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def buffers(self) -> int:
        """Elements of its stacks' buffers, where a layer has its own."""
        return sum(stack.buffer for stack in self.stacks)


@dataclass(frozen=True, slots=True)
class ProgramSizes:
    """`layers` has each kind of layer and how many there are of it."""

    layers: Sequence[tuple[LayerSizes, int]]
    width: int
    vocabulary: int
    element: int
    fp8: bool

    def kept_bytes(self, keep: Keep) -> int:
        """A token, all layers together."""
        return sum(count * kept_bytes(layer, keep, self.element) for layer, count in self.layers)

    def working_bytes(self, keep: Keep) -> int:
        """A token, in the layer that needs most."""
        return max(working_bytes(layer, keep, self.element, self.fp8) for layer, _ in self.layers)

    def rows_at_once(self, tokens: int) -> int:
        """Positions whose logits are made together in a batch of so many tokens."""
        return head_rows(self.vocabulary * self.element, tokens, self.working_bytes(Keep.ALL))

    def needed_bytes(self, keep: Keep, tokens: int) -> int:
        """Of a step of so many tokens, on top of weights, gradients and optimizer."""
        logits = self.rows_at_once(tokens) * self.vocabulary * self.element
        at_the_head = logits + tokens * 4 * self.width * self.element
        return tokens * self.kept_bytes(keep) + max(tokens * self.working_bytes(keep), at_the_head)

    @property
    def unpacked_bytes(self) -> int:
        """Of the largest layer of 4-bit weights, in the type of its products."""
        if self.fp8:
            return max(sum(stack.fp8_bytes for stack in layer.stacks) for layer, _ in self.layers)
        return max(layer.buffers for layer, _ in self.layers) * self.element

    @property
    def number_of_layers(self) -> int:
        return sum(count for _, count in self.layers)


def kept_bytes(layer: LayerSizes, keep: Keep, element: int) -> int:
    """Bytes a token that a layer keeps from its forward to its backward pass."""
    width, attended = layer.qkv.size_in, layer.o.size_in + layer.o.rank
    # The layer's input, and what the adapter of `down` made of its own.
    found = width * element + layer.down.rank * element
    if keep <= Keep.RESIDUALS:
        found += width * element
    if keep <= Keep.NO_MLP:
        twice = 2 if layer.head_norms else 1
        found += (twice * layer.qkv.size_out + attended + layer.qkv.rank + layer.o.rank) * element
        found += (1 + layer.heads) * STATISTICS_BYTES
        found += (layer.heads + layer.groups) * STATISTICS_BYTES if layer.head_norms else 0
    if keep == Keep.ALL:
        found += (_gate_up(layer) + layer.gate_up.rank) * element + STATISTICS_BYTES
    return found


def _gate_up(layer: LayerSizes) -> int:
    """Of a token: the gate's and up's product with its side columns, over which their gradient is written."""
    return layer.gate_up.size_out + layer.gate_up.rank


def working_bytes(layer: LayerSizes, keep: Keep, element: int, fp8: bool) -> int:
    """Bytes a token that live at once, besides what is kept, while a layer runs backward: the largest moment of it."""
    missing = kept_bytes(layer, Keep.ALL, element) - kept_bytes(layer, keep, element)
    width, mlp, queries = layer.qkv.size_in, layer.down.size_in, layer.o.size_in
    dy, dmiddle = width + layer.down.rank, width + layer.o.rank  # with their side columns
    in_mlp = dy + mlp  # the gradient of the MLP's input, over which that input is written
    in_norm = dy + 2 * width + dmiddle
    # The gradient of attention's result and of queries, keys and values, and cuDNN's float32 sums of three of them; the
    # gate's and up's product is gone.
    in_attention = dmiddle + queries + layer.qkv.size_out + 6 * queries - _gate_up(layer)
    if layer.drops:
        # Beside an input or its gradient lies a second one, of what a mask has left of it or is to be left.
        in_mlp += mlp if layer.down.rank else 0
        at_qkv = dmiddle + layer.qkv.size_out + layer.qkv.rank + 2 * width - _gate_up(layer)
        in_norm = max(in_norm, dy + 2 * width + (width if layer.gate_up.rank else 0))
        in_attention = max(in_attention, at_qkv + (width if layer.qkv.rank else 0))
    found = missing + (max(in_mlp, in_norm, in_attention) + width) * element
    if fp8:  # the largest product's factor in 8 bits, beside what is there then
        factor = layer.gate_up.size_out + FP8_PLACES * layer.gate_up.rank
        found = max(found, missing + (dy + 2 * width) * element + factor)
    return found


def head_rows(row_bytes: int, tokens: int, spare_bytes: int) -> int:
    """Positions whose logits, of `row_bytes` each, are made together: `spare_bytes` a token are free for them."""
    return max(FEWEST_ROWS, min(CHUNK_BYTES, tokens * spare_bytes) // row_bytes)


def rank_multiple(device: str, fp8: bool) -> int:
    """What ranks are padded to on a device of this type ("cuda", "cpu")."""
    return FP8_MULTIPLE if fp8 else RANK_MULTIPLE[device]


def padded(rank: int, multiple: int) -> int:
    return -(-rank // multiple) * multiple


def gradient_rows(ranks: int) -> int:
    """Rows of the one product that has the gradients of a stack's A factors; `ranks` is the sum of theirs. Not the
    padded rank: of adapters whose rank was cut more than half of that may be padding."""
    return padded(ranks, 8)


@dataclass(frozen=True, slots=True)
class Choice:
    """How steps run: what layers keep, tokens at once, and how many of the layers, where they are in 4 bits, stay
    unpacked."""

    keep: Keep
    most_tokens: int
    held: int
    layers: int

    @property
    def held_share(self) -> float:
        return self.held / self.layers


def choose(
    sizes: ProgramSizes, free: int | None, step_tokens: int, longest: int, later_bytes: int, most: Keep, least: Keep
) -> Choice:
    """What layers keep, from `most` to `least`, and how many tokens run at once: all of a step while anything fits,
    with as much kept as possible; then as many 4-bit layers stay unpacked as there is room for. Where nothing fits
    the least is returned, and running out of memory decides. `free` bytes are there for it, None where memory is not
    counted; `later_bytes` of them are for gradients and optimizer."""
    layers = sizes.number_of_layers
    if free is None:
        return Choice(most, step_tokens, layers, layers)
    parts = 1
    while True:
        tokens = max(longest, -(-step_tokens // parts))
        for keep in Keep:
            spare = free - sizes.needed_bytes(keep, tokens) - later_bytes
            if most <= keep <= least and spare >= 0:
                return Choice(keep, tokens, min(layers, spare // sizes.unpacked_bytes), layers)
        if tokens <= longest:
            return Choice(least, tokens, 0, layers)
        parts *= 2


def later_bytes(optimizer: str, trained: int) -> int:
    """What gradients and the states of the optimizer of this name in a recipe take; of `auto` the most."""
    return LATER_BYTES.get(optimizer, max(LATER_BYTES.values())) * trained


def without_spare(allowed: int) -> int:
    """Of bytes that may be allocated, those that the counting may use."""
    return int(allowed * (1 - SPARE_SHARE)) - SPARE_BYTES
