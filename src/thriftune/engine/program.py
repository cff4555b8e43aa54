"""A frozen model with adapters as an explicit program: no autograd graph, no compile step, one loop over the layers.

Shape legend: T tokens of a packed batch, D width, P positions of the angle tables, C half a head's size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thriftune.engine.attention import Attention
from thriftune.engine.head import Head
from thriftune.engine.layer import Layer, Saved, Step, backward, forward
from thriftune.engine.packing import PackedBatch
from thriftune.engine.sizes import Keep, ProgramSizes
from thriftune.kernels.copies import Copies


@dataclass(frozen=True)
class Angles:
    """cos and sin of every position, as the model's own rotary embedding gives them."""

    cos_PC: Tensor  # noqa: N815
    sin_PC: Tensor  # noqa: N815


@dataclass(frozen=True)
class Program:
    embedding_VD: Tensor  # noqa: N815
    layers: Sequence[Layer]
    angles: Angles
    head: Head
    base: Any  # the model that it was read from
    rank_multiple: int
    _copies: dict[int, Copies] = field(default_factory=dict)  # by the number of stacks with a buffer of their own

    @property
    def sizes(self) -> ProgramSizes:
        vocabulary, width = self.embedding_VD.shape
        kinds = Counter(layer.sizes for layer in self.layers)
        return ProgramSizes(list(kinds.items()), width, vocabulary, self.embedding_VD.element_size())

    def copy_masters(self) -> None:
        """Take over the adapters' present values. To be called after each change of them."""
        held = [stack for layer in self.layers for stack in layer.stacks if not stack.shared]
        copies = self._copies.get(len(held))
        if copies is None:
            copies = self._copies[len(held)] = Copies([copy for stack in held for copy in stack.copies()])
        copies()

    def forget_copies(self) -> None:
        """To be called when stacks have other factors or buffers than before."""
        self._copies.clear()

    def let_go(self) -> bool:
        """Give up the unpacked copies of 4-bit layers; whether there were any."""
        held = [stack for layer in self.layers for stack in layer.stacks if stack.packed and not stack.shared]
        for stack in held:
            stack.let_go()
        self.forget_copies()
        return bool(held)

    def add_gradients(self, batch: PackedBatch, scale: float, keep: Sequence[Keep], attention: Attention) -> Tensor:
        """Add the gradient of scale * (sum of the targets' losses) to the adapters' `grad`; returns the sum itself, a
        float64 scalar. `keep` says for each layer what it keeps."""
        with torch.no_grad():
            step = Step(batch, self.angles.cos_PC, self.angles.sin_PC, attention)
            x_TD = self.embedding_VD[batch.tokens_T]
            saved: list[Saved] = []
            for layer, kept in zip(self.layers, keep, strict=True):
                layer.acquire()
                x_TD, of_layer = forward(layer, x_TD, step, kept)
                saved.append(of_layer)
                del of_layer  # or what the last layer kept would stay to the end
            top = self.layers[-1].down
            dx_TY = top.output_buffer(x_TD)
            loss = self.head.loss_and_gradient(x_TD, batch, scale, dx_TY[:, : top.size_out])
            del x_TD
            for layer, below in zip(reversed(self.layers), [*reversed(self.layers[:-1]), None], strict=True):
                layer.acquire()
                dx_TY = backward(layer, dx_TY, saved.pop(), step, below)
            return loss

    def loss(self, batch: PackedBatch, attention: Attention) -> Tensor:
        """Sum of the targets' losses, a float64 scalar; nothing is kept."""
        with torch.no_grad():
            step = Step(batch, self.angles.cos_PC, self.angles.sin_PC, attention)
            x_TD = self.embedding_VD[batch.tokens_T]
            for layer in self.layers:
                layer.acquire()
                x_TD, _ = forward(layer, x_TD, step, Keep.INPUT)
            return self.head.loss(x_TD, batch)
