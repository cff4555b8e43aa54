"""Frozen linears with their LoRA inside: one buffer a stack, so that base and adapter are one matrix product.

For linears W_1 .. W_n of one input, stacked to W (out x in), with adapters s_i B_i A_i of rank r_i, the buffer is

    Z = [ W    sB ]      A  = the A_i below each other       (rank x in)
        [ A     0 ]      sB = the s_i B_i block by block     (out x rank)

and with a row x written as [x | x A^T] the product [x | x A^T] [W | sB]^T is the output; with a gradient written as
[dy | dy sB] the product [dy | dy sB] [W ; A] is the gradient of x. Neither reads or writes the output a second time.
Exact up to the rounding of x A^T and dy sB, which plain LoRA in 16 bits rounds too. The rank is padded with zeros to a
multiple: rows then start at addresses that matrix products like.

Shape legend: T tokens, I in, O out, R padded rank, Y = O + R, X = I + R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thriftune.engine.sizes import StackSizes, padded
from thriftune.kernels.copies import Copies, Copy
from thriftune.kernels.four_bit import FourBit, unpack_four_bit


@dataclass
class Part:
    """One linear of a stack: its place in the output, and its adapter, if it has one."""

    rows: slice
    linear: Any
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scale: float = 1.0
    ranks: slice = field(default_factory=lambda: slice(0, 0))


@dataclass
class Stack:
    """Linears of one input. `buffer_YX` holds the frozen weights and 16-bit copies of the adapters' masters.

    A stack of 4-bit weights has them `packed` and shares its buffer with the same stack of every other layer, until
    `hold` gives it one of its own.
    """

    parts: list[Part]
    size_in: int
    size_out: int
    rank: int
    buffer_YX: Tensor  # noqa: N815
    bias_O: Tensor | None  # noqa: N815
    packed: list[FourBit] = field(default_factory=list)
    shared: bool = False
    common_YX: Tensor | None = None  # noqa: N815 # the shared buffer while this stack has its own
    leaves_traces: bool = False  # other layers' adapters have other places in the shared buffer
    _to_shared: Copies | None = None

    @property
    def sizes(self) -> StackSizes:
        return StackSizes(self.size_in, self.size_out, self.rank)

    @property
    def home_YX(self) -> Tensor:  # noqa: N802
        """The buffer of its own, or the one that it shares."""
        return self.buffer_YX if self.common_YX is None else self.common_YX

    @property
    def weight_OX(self) -> Tensor:  # noqa: N802
        return self.buffer_YX[: self.size_out]

    @property
    def a_RI(self) -> Tensor:  # noqa: N802
        return self.buffer_YX[self.size_out :, : self.size_in]

    @property
    def b_OR(self) -> Tensor:  # noqa: N802
        return self.buffer_YX[: self.size_out, self.size_in :]

    def acquire(self) -> None:
        """Have this stack's weights and adapters in the buffer; where it is its own they are there."""
        if not self.shared:
            return
        self._fill()
        if self.leaves_traces:
            self.a_RI.zero_()
            self.b_OR.zero_()
        if self._to_shared is None:
            self._to_shared = Copies(self.copies())
        self._to_shared()

    def hold(self) -> None:
        """Unpack the weights once, into a buffer that stays until `let_go`."""
        if self.shared:
            self.common_YX = self.buffer_YX
            self.buffer_YX, self.shared = torch.zeros_like(self.buffer_YX), False
            self._fill()

    def let_go(self) -> None:
        if self.common_YX is not None:
            self.buffer_YX, self.common_YX, self.shared = self.common_YX, None, True

    def _fill(self) -> None:
        for part, weight in zip(self.parts, self.packed, strict=True):
            unpack_four_bit(weight, self.buffer_YX[part.rows, : self.size_in])

    def take_up(self, parts: list[Part], rank: int, common_YX: Tensor | None) -> None:
        """Have these adapters, of this padded rank, instead. `common_YX` is the buffer that a stack of 4-bit weights
        shares from here on; one of its own is made anew where the size changes, and 16-bit linears become its views."""
        if rank != self.rank and not self.shared:
            before_OI = self.buffer_YX[: self.size_out, : self.size_in]
            self.buffer_YX = before_OI.new_zeros(self.size_out + rank, self.size_in + rank)
            self.buffer_YX[: self.size_out, : self.size_in].copy_(before_OI)
            for part in parts if common_YX is None else []:
                part.linear.weight = nn.Parameter(self.buffer_YX[part.rows, : self.size_in], requires_grad=False)
        if common_YX is not None and self.shared:
            self.buffer_YX = common_YX
        elif common_YX is not None:
            self.common_YX = common_YX
        self.parts, self.rank, self._to_shared = parts, rank, None
        for buffer_YX in (self.buffer_YX, self.home_YX):  # no copy of what was there may stay
            buffer_YX[self.size_out :, : self.size_in].zero_()
            buffer_YX[: self.size_out, self.size_in :].zero_()

    def copies(self) -> list[Copy]:
        """The adapters' present values into the buffer, rounded to the base's type."""
        found = []
        for part in self.parts:
            if part.a is not None and part.b is not None:
                found.append(Copy(part.a.detach(), self.a_RI[part.ranks], 1.0))
                found.append(Copy(part.b.detach(), self.b_OR[part.rows, part.ranks], part.scale))
        return found

    def input_buffer(self, like: Tensor) -> Tensor:
        """An uninitialised T x (in + rank) buffer: its first columns are for the input."""
        return torch.empty(like.shape[0], self.size_in + self.rank, dtype=like.dtype, device=like.device)

    def output_buffer(self, like: Tensor) -> Tensor:
        """An uninitialised T x (out + rank) buffer: its first columns are for the output's gradient."""
        return torch.empty(like.shape[0], self.size_out + self.rank, dtype=like.dtype, device=like.device)

    def forward(self, x_TX: Tensor, residual_TO: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x_TX has the input in its first columns; the others are overwritten. Returns the output (plus the residual),
        and x A^T, which the backward pass needs."""
        side_TR = None
        if self.rank:
            side_TR = x_TX[:, : self.size_in] @ self.a_RI.T
            x_TX[:, self.size_in :] = side_TR
        if residual_TO is not None:
            out_TO = torch.addmm(residual_TO, x_TX, self.weight_OX.T)
        elif self.bias_O is not None:
            return torch.addmm(self.bias_O, x_TX, self.weight_OX.T), side_TR
        else:
            out_TO = x_TX @ self.weight_OX.T
        return (out_TO if self.bias_O is None else out_TO.add_(self.bias_O)), side_TR

    def backward(self, dy_TY: Tensor, wants_dx: bool) -> Tensor | None:
        """dy_TY has the output's gradient in its first columns; the others become its product with sB. Returns the
        gradient of the input, where it is wanted."""
        if self.rank:
            torch.mm(dy_TY[:, : self.size_out], self.b_OR, out=dy_TY[:, self.size_out :])
        return dy_TY @ self.buffer_YX[:, : self.size_in] if wants_dx else None

    def add_gradients(self, dy_TY: Tensor, x_TI: Tensor | None, side_TR: Tensor | None) -> None:
        """Add to the adapters' gradients; dy_TY as `backward` left it, x_TI the input, side_TR as `forward` gave it."""
        if not self.rank:
            return
        assert x_TI is not None and side_TR is not None
        da_RI = product_in_full(dy_TY[:, self.size_out :].T, x_TI)
        for part in self.parts:
            if part.a is None or part.b is None:
                continue
            db_OR = product_in_full(dy_TY[:, part.rows].T, side_TR[:, part.ranks])
            add_gradient(part.a, da_RI[part.ranks])
            add_gradient(part.b, db_OR.mul_(part.scale))


def product_in_full(left: Tensor, right: Tensor) -> Tensor:
    """A product whose sum over tokens is not rounded to 16 bits."""
    if left.dtype.itemsize >= 4:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    gradient = gradient.to(parameter.dtype)
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def padded_rank(parts: Sequence[Part], multiple: int) -> int:
    rank = sum(part.a.shape[0] for part in parts if part.a is not None)
    return padded(rank, multiple)
