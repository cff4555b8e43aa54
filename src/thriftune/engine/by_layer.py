"""A step layer by layer: every part of it goes through a layer before the next layer begins.

So a layer's weights are brought to the device twice a step, once forward and once backward, however long the step is.
Layers keep their input alone; the rest is computed again. Sums are taken part after part, as when one part after
another goes through the whole program, so gradients are equal to those bit for bit.

Shape legend: T tokens of a part, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from thriftune.engine.attention import Attention
from thriftune.engine.layer import Saved, Step, backward, forward
from thriftune.engine.packing import PackedBatch
from thriftune.engine.program import Program
from thriftune.engine.residency import Streaming
from thriftune.engine.shelf import Shelf
from thriftune.engine.sizes import Keep
from thriftune.engine.weights import Outgoing
from thriftune.kernels.dropout import Key


def add_gradients(
    program: Program,
    streaming: Streaming,
    shelf: Shelf,
    parts: Sequence[PackedBatch],
    scale: float,
    attention: Attention,
    key: Key | None = None,
) -> Tensor:
    """As `Program.add_gradients`, for all parts of a step; returns the sum of all their losses."""
    layers, last = program.layers, len(program.layers) - 1
    with torch.no_grad():
        steps = [program.step_of(part, attention, key) for part in parts]
        streaming.begin([*range(len(layers)), *reversed(range(len(layers)))])
        shelf.begin([part.segments.tokens for part in parts])
        x_TD = [program.embed(part.tokens_T) for part in parts]
        sides: list[list[Tensor | None]] = []
        for index, layer in enumerate(layers):
            with _brought(streaming, index):
                layer.acquire_forward()
            sides.append([])
            for number, step in enumerate(steps):
                shelf.put(index, number, x_TD[number])
                x_TD[number], saved = forward(layer, x_TD[number], step, Keep.INPUT)
                sides[-1].append(saved.down_side_TR)
                del saved  # or the last layer's input would stay to the end
        shelf.fetch(last)
        top = layers[-1].down
        loss = torch.zeros((), dtype=torch.float64, device=x_TD[0].device)
        dys: list[Outgoing | None] = []
        for part in parts:
            out_TD = x_TD.pop(0)
            dy = top.output_buffer(out_TD)
            loss += program.head.loss_and_gradient(out_TD, part, scale, dy.gradient_TO)
            dys.append(dy)
        del out_TD, dy
        for index in reversed(range(len(layers))):
            with _brought(streaming, index):
                layers[index].acquire_backward(Keep.INPUT)
            if index:
                shelf.fetch(index - 1)
            below = layers[index - 1] if index else None
            of_layer = sides.pop()
            for number, step in enumerate(steps):
                found = Saved(shelf.take(index, number), down_side_TR=of_layer[number])
                given, dys[number] = dys[number], None
                assert given is not None
                dys[number] = backward(layers[index], given, found, step, below)
                del given, found
        return loss


def losses(program: Program, streaming: Streaming, parts: Sequence[PackedBatch], attention: Attention) -> Tensor:
    """Sum of the targets' losses of all parts without dropout, a float64 scalar; nothing is kept."""
    with torch.no_grad():
        steps = [Step(part, program.angles.cos_PC, program.angles.sin_PC, attention) for part in parts]
        streaming.begin(range(len(program.layers)))
        x_TD = [program.embed(part.tokens_T) for part in parts]
        for index, layer in enumerate(program.layers):
            with _brought(streaming, index):
                layer.acquire_forward()
            for number, step in enumerate(steps):
                x_TD[number], _ = forward(layer, x_TD[number], step, Keep.INPUT)
        found = [program.head.loss(rows_TD, part) for rows_TD, part in zip(x_TD, parts, strict=True)]
        return torch.stack(found).sum()


@contextmanager
def _brought(streaming: Streaming, index: int) -> Iterator[None]:
    """The layer's packed weights are on the device inside, to be unpacked; its slot is free for another after that."""
    streaming.acquire(index)
    yield
    streaming.release(index)
