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
from thriftune.engine.weights import Outgoing
from thriftune.kernels.copies import Copies
from thriftune.kernels.dropout import KEYS, Draw, Key
from thriftune.kernels.fp8 import Sides


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
    _copies: dict[int, tuple[Copies, Sides]] = field(default_factory=dict)  # by how many stacks have their own memory

    @property
    def fp8(self) -> bool:
        """Whether the layers' frozen products are in 8-bit floats."""
        return self.layers[0].qkv.fp8 is not None

    @property
    def sizes(self) -> ProgramSizes:
        vocabulary, width = self.embedding_VD.shape
        kinds = Counter(layer.sizes for layer in self.layers)
        return ProgramSizes(list(kinds.items()), width, vocabulary, self.embedding_VD.element_size(), self.fp8)

    @property
    def drops(self) -> bool:
        """Whether an adapter has dropout before it."""
        return any(stack.drops for layer in self.layers for stack in layer.stacks)

    def key_of_step(self) -> Key | None:
        """What the masks of a step's dropout are drawn by, from torch's generator, which the loop seeds at every step's
        start; None, and nothing is drawn, without dropout."""
        if not self.drops:
            return None
        first, second = torch.randint(KEYS, (2,)).tolist()
        return first, second

    def step_of(self, batch: PackedBatch, attention: Attention, key: Key | None) -> Step:
        """What layers share in a pass over a part of the step of this key. Raises ValueError where there is dropout and
        no key."""
        draw = None
        if self.drops:
            if key is None:
                raise ValueError("a step with dropout needs the key that its masks are drawn by")
            draw = Draw(key, batch.rows_T, batch.positions_T)
        return Step(batch, self.angles.cos_PC, self.angles.sin_PC, attention, draw)

    def embed(self, tokens_T: Tensor) -> Tensor:
        """The tokens' rows of the embedding, which may lie on the host: then only they cross over."""
        table_VD = self.embedding_VD
        if table_VD.device == tokens_T.device:
            return table_VD[tokens_T]
        rows_TD = table_VD[tokens_T.to(table_VD.device)]
        return rows_TD.pin_memory().to(tokens_T.device, non_blocking=True)

    def copy_masters(self) -> None:
        """Take over the adapters' present values. To be called after each change of them."""
        stacks = [stack for layer in self.layers for stack in layer.stacks]
        own = [stack for stack in stacks if not stack.shared]
        if len(own) not in self._copies:
            # The 16-bit copies of a stack with products in 8 bits are always its own.
            places = [copy for stack in stacks if not stack.shared or stack.fp8 for copy in stack.copies()]
            sides = [side for stack in own if stack.fp8 is not None for side in stack.fp8.sides(stack.parts)]
            self._copies[len(own)] = Copies(places), Sides(sides)
        for copying in self._copies[len(own)]:
            copying()

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

    def add_gradients(
        self, batch: PackedBatch, scale: float, keep: Sequence[Keep], attention: Attention, key: Key | None = None
    ) -> Tensor:
        """Add the gradient of scale * (sum of the targets' losses) to the adapters' `grad`; returns the sum itself, a
        float64 scalar. `keep` says for each layer what it keeps, `key` is the step's (`key_of_step`)."""
        with torch.no_grad():
            step = self.step_of(batch, attention, key)
            x_TD = self.embed(batch.tokens_T)
            saved: list[Saved] = []
            for layer, kept in zip(self.layers, keep, strict=True):
                layer.acquire_forward()
                x_TD, of_layer = forward(layer, x_TD, step, kept)
                saved.append(of_layer)
                del of_layer  # or what the last layer kept would stay to the end
            dy: Outgoing | None = self.layers[-1].down.output_buffer(x_TD)
            assert dy is not None
            loss = self.head.loss_and_gradient(x_TD, batch, scale, dy.gradient_TO)
            del x_TD
            downwards = zip(reversed(self.layers), reversed(keep), [*reversed(self.layers[:-1]), None], strict=True)
            for layer, kept, below in downwards:
                layer.acquire_backward(kept)
                assert dy is not None
                dy = backward(layer, dy, saved.pop(), step, below)
            return loss

    def loss(self, batch: PackedBatch, attention: Attention) -> Tensor:
        """Sum of the targets' losses without dropout, a float64 scalar; nothing is kept."""
        with torch.no_grad():
            step = Step(batch, self.angles.cos_PC, self.angles.sin_PC, attention)
            x_TD = self.embed(batch.tokens_T)
            for layer in self.layers:
                layer.acquire_forward()
                x_TD, _ = forward(layer, x_TD, step, Keep.INPUT)
            return self.head.loss(x_TD, batch)
