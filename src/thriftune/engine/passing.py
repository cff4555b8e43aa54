"""transformers' own decoder layers over streamed weights, for inference: nothing is kept for a backward pass.

Before a layer runs its slab is on the device and its matrices are unpacked into buffers that all layers share; they are
its linears' weights until it has run. So generating, its cache and the adapter that PEFT put on stay the library's.

A pass over the layers is announced twice in a row: what comes after it is the next one (the next token), so the first
layers are fetched again while the last ones and the head compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from thriftune.engine.hosted import Hosted, Say, Slabs, refuse_another_size, stream_layers
from thriftune.engine.offload import SLOTS, SPARE_BYTES, SPARE_SHARE
from thriftune.engine.residency import Streaming, spread
from thriftune.engine.room import free_bytes
from thriftune.kernels.four_bit import FourBit, unpack_four_bit
from thriftune.kernels.slab import SlabLayout

SHARE_OF_ROWS = 0.5  # of what is free, for caches of the rows that are answered at once; layers have the rest


@dataclass
class Linears:
    """A layer's linears in the order of its slab's matrices. To `Streaming` it is a layer of one stack."""

    parts: list[nn.Linear]
    packed: list[FourBit] = field(default_factory=list)

    @property
    def stacks(self) -> list[Linears]:
        return [self]


@dataclass
class Passing:
    """`row_bytes` is what one token of one row takes beside the weights."""

    streaming: Streaming
    hosted: Hosted
    layers: list[Linears]
    buffers: dict[tuple[int, int, int], nn.Parameter]
    row_bytes: int
    rows_have: int | None
    _without: dict[int, list[nn.Parameter]] = field(default_factory=dict)

    def rows_at_once(self, tokens: int) -> int | None:
        """How many rows of so many tokens have room; None where memory is not counted."""
        return None if self.rows_have is None else max(1, self.rows_have // (self.row_bytes * tokens))

    def begin(self) -> None:
        self.streaming.lane.times()  # which forgets the last pass's: nobody else asks for them
        self.streaming.begin([*range(len(self.layers)), *range(len(self.layers))])

    def bring(self, index: int) -> None:
        """Have the layer's weights in its linears."""
        layer = self.layers[index]
        self.streaming.acquire(index)
        self._without.setdefault(index, [linear.weight for linear in layer.parts])
        for place, (linear, packed) in enumerate(zip(layer.parts, layer.packed, strict=True)):
            buffer = self.buffers[place, packed.rows, packed.columns]
            unpack_four_bit(packed, buffer.data)
            linear.weight = buffer
        self.streaming.release(index)

    def take_away(self, index: int) -> None:
        """Its linears are without weights again: what is read too late is no other layer's."""
        for linear, nothing in zip(self.layers[index].parts, self._without.pop(index, []), strict=False):
            linear.weight = nothing

    def close(self) -> None:
        """Let go of the host's pinned memory, which what follows in this process may need; nothing runs after it."""
        self.streaming.streamed.clear()  # views of the blocks that follow
        self.hosted.close()


@dataclass(frozen=True, slots=True)
class Shares:
    """How many layers stay, and the bytes that are for rows (None where memory is not counted)."""

    resident: int
    rows_have: int | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """`resident` layers are to stay on the device, None: as many as have room. `row_bytes` are those of a token of a
    row; `row_tokens` is given where there will be one row at once, of up to so many tokens."""

    resident: int | None
    row_bytes: int
    row_tokens: int | None

    @property
    def one_row(self) -> int | None:
        return None if self.row_tokens is None else self.row_bytes * self.row_tokens


def pass_over(base: Any, slabs: Slabs, device: torch.device, wanted: Wanted, say: Say) -> Passing:
    """Have `base`, a transformers model whose layers' linears have no weights, compute with those of `slabs`, until
    what is returned is closed.

    Raises DoesNotFitError when host memory does not hold what is streamed, ModelError when a slab's matrices are not
    those of the model.
    """
    modules, layouts = base.model.layers, slabs.layouts
    pairs = enumerate(zip(modules, layouts, strict=True))
    layers = [_linears(module, layout, index) for index, (module, layout) in pairs]
    like = base.get_output_embeddings().weight
    buffers: dict[tuple[int, int, int], nn.Parameter] = {}
    with torch.inference_mode(False):
        for layer in layers:
            for place, linear in enumerate(layer.parts):
                key = (place, linear.out_features, linear.in_features)
                if key not in buffers:
                    buffers[key] = nn.Parameter(like.new_empty(key[1:]), requires_grad=False)
    slab = max(layout.bytes for layout in layouts)
    shares = share_out(free_bytes(device), slab, len(layers), wanted.resident, wanted.one_row)
    hosted = Hosted(slabs, device, say)
    streaming = stream_layers(layers, hosted, spread(shares.resident, len(layers)), SLOTS)
    passing = Passing(streaming, hosted, layers, buffers, wanted.row_bytes, shares.rows_have)
    base.model.register_forward_pre_hook(_calling(passing.begin))
    for index, module in enumerate(modules):
        module.register_forward_pre_hook(_calling(partial(passing.bring, index)))
        module.register_forward_hook(_calling(partial(passing.take_away, index)), always_call=True)
    return passing


def share_out(free: int | None, slab_bytes: int, layers: int, resident: int | None, one_row: int | None) -> Shares:
    """`one_row` are the bytes of a row where there will be only one at once."""
    if free is None:
        return Shares(min(resident or 0, layers), None)
    usable = max(0, int(free * (1 - SPARE_SHARE)) - SPARE_BYTES - SLOTS * slab_bytes)
    for_rows = min(usable, one_row) if one_row is not None else int(usable * SHARE_OF_ROWS)
    fitting = (usable - for_rows) // slab_bytes
    stay = min(layers, fitting if resident is None else resident)
    return Shares(stay, max(for_rows, usable - stay * slab_bytes))


def bytes_of_token(config: Any, element: int) -> int:
    """What a token of a row takes: keys and values of all layers, and what one layer works with while it is read."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    cache = 2 * config.num_hidden_layers * groups * size
    working = 3 * config.intermediate_size + 4 * config.hidden_size + 2 * heads * size
    return int(element * (cache + working))


def _linears(module: nn.Module, layout: SlabLayout, index: int) -> Linears:
    found = {name.rpartition(".")[2]: part for name, part in module.named_modules()}
    parts = []
    for matrix in layout.matrices:
        part: Any = found[matrix.name]
        linear = getattr(part, "base_layer", part)
        refuse_another_size(linear, matrix, index)
        parts.append(linear)
    return Linears(parts)


def _calling(work: Callable[[], None]) -> Callable[..., None]:
    """A hook that does this and leaves arguments and output as they are."""

    def hook(*_: Any) -> None:
        work()

    return hook
