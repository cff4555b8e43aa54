"""A step layer by layer: every part of it goes through a layer before the next layer begins.

So a layer's weights are brought to the device twice a step, once forward and once backward, however long the step is.
Layers keep their input alone; the rest is computed again. Sums are taken part after part, as when one part after
another goes through the whole program, so gradients are equal to those bit for bit.

Shape legend: T tokens of a part, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thriftune.engine.attention import Attention
from thriftune.engine.layer import Saved, Step, backward, forward
from thriftune.engine.packing import PackedBatch
from thriftune.engine.program import Program
from thriftune.engine.residency import Streaming
from thriftune.engine.shelf import Shelf
from thriftune.engine.sizes import Keep


def add_gradients(
    program: Program,
    streaming: Streaming,
    shelf: Shelf,
    parts: Sequence[PackedBatch],
    scale: float,
    attention: Attention,
) -> Tensor:
    """As `Program.add_gradients`, for all parts of a step; returns the sum of all their losses."""
    layers, last = program.layers, len(program.layers) - 1
    with torch.no_grad():
        steps = [Step(part, program.angles.cos_PC, program.angles.sin_PC, attention) for part in parts]
        streaming.begin([*range(len(layers)), *reversed(range(len(layers)))])
        shelf.begin([part.segments.tokens for part in parts])
        x_TD = [_embed(program, part) for part in parts]
        sides: list[list[Tensor | None]] = []
        for index, layer in enumerate(layers):
            _bring(streaming, program, index)
            sides.append([])
            for number, step in enumerate(steps):
                shelf.put(index, number, x_TD[number])
                x_TD[number], saved = forward(layer, x_TD[number], step, Keep.INPUT)
                sides[-1].append(saved.down_side_TR)
                del saved  # or the last layer's input would stay to the end
        shelf.fetch(last)
        top = layers[-1].down
        loss = torch.zeros((), dtype=torch.float64, device=x_TD[0].device)
        dx_TY: list[Tensor | None] = []
        for part in parts:
            out_TD = x_TD.pop(0)
            dx_TY.append(top.output_buffer(out_TD))
            gradient_TD = dx_TY[-1][:, : top.size_out]  # type: ignore[index]
            loss += program.head.loss_and_gradient(out_TD, part, scale, gradient_TD)
        del out_TD, gradient_TD
        for index in reversed(range(len(layers))):
            _bring(streaming, program, index)
            if index:
                shelf.fetch(index - 1)
            below = layers[index - 1] if index else None
            of_layer = sides.pop()
            for number, step in enumerate(steps):
                found = Saved(shelf.take(index, number), down_side_TR=of_layer[number])
                gradient_TY = dx_TY[number]
                assert gradient_TY is not None
                dx_TY[number] = None
                dx_TY[number] = backward(layers[index], gradient_TY, found, step, below)
                del gradient_TY, found
        return loss


def losses(program: Program, streaming: Streaming, parts: Sequence[PackedBatch], attention: Attention) -> Tensor:
    """Sum of the targets' losses of all parts, a float64 scalar; nothing is kept."""
    with torch.no_grad():
        steps = [Step(part, program.angles.cos_PC, program.angles.sin_PC, attention) for part in parts]
        streaming.begin(range(len(program.layers)))
        x_TD = [_embed(program, part) for part in parts]
        for index, layer in enumerate(program.layers):
            _bring(streaming, program, index)
            for number, step in enumerate(steps):
                x_TD[number], _ = forward(layer, x_TD[number], step, Keep.INPUT)
        found = [program.head.loss(rows_TD, part) for rows_TD, part in zip(x_TD, parts, strict=True)]
        return torch.stack(found).sum()


def _bring(streaming: Streaming, program: Program, index: int) -> None:
    """The layer's weights unpacked; its slot is free for another from then on."""
    streaming.acquire(index)
    program.layers[index].acquire()
    streaming.release(index)


def _embed(program: Program, part: PackedBatch) -> Tensor:
    """The tokens' rows of the embedding, which may lie on the host: then only they cross over."""
    table_VD, tokens_T = program.embedding_VD, part.tokens_T
    if table_VD.device == tokens_T.device:
        return table_VD[tokens_T]
    rows_TD = table_VD[tokens_T.to(table_VD.device)]
    return rows_TD.pin_memory().to(tokens_T.device, non_blocking=True)
