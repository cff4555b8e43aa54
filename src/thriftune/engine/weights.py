"""Frozen linears with their LoRA inside: one buffer a stack, so that base and adapter are one matrix product.

For linears W_1 .. W_n of one input, stacked to W (out x in), with adapters s_i B_i A_i of rank r_i, the buffer is

    Z = [ W    sB ]      A  = the A_i below each other       (rank x in)
        [ A     0 ]      sB = the s_i B_i block by block     (out x rank)

and with a row x written as [x | x A^T] the product [x | x A^T] [W | sB]^T is the output; with a gradient written as
[dy | dy sB] the product [dy | dy sB] [W ; A] is the gradient of x. Neither reads or writes the output a second time.
Exact up to the rounding of x A^T and dy sB, which plain LoRA in 16 bits rounds too. The rank is padded with zeros to a
multiple: rows then start at addresses that matrix products like.

With dropout each adapter has a mask of its own on x, so x A^T becomes the (mask_i x) A_i^T side by side, and the
gradient of x is dy W plus mask_i (dy sB_i) A_i for each: products and passes of their own.

With products in 8-bit floats (fp8.py) W is held in two layouts of its own and the buffer does not exist.

Shape legend: T tokens, I in, O out, R padded rank, Y = O + R, X = I + R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from thriftune.engine.fp8 import Fp8, Fp8Values
from thriftune.engine.part import Part
from thriftune.engine.sizes import StackSizes, gradient_rows, padded
from thriftune.kernels.copies import Copies, Copy
from thriftune.kernels.dropout import Draw, add_dropped, drop
from thriftune.kernels.four_bit import FourBit, unpack_four_bit
from thriftune.kernels.fp8 import Sides


@dataclass(frozen=True)
class Outgoing:
    """The gradient of a stack's output, and its product with sB. They are columns of `whole_TY` where the product that
    reads them wants them side by side."""

    gradient_TO: Tensor  # noqa: N815
    side_TR: Tensor  # noqa: N815
    whole_TY: Tensor | None  # noqa: N815


@dataclass
class Stack:
    """Linears of one input. `buffer_YX` holds the frozen weights and 16-bit copies of the adapters' masters; with
    products in 8-bit floats `fp8` has both, and there is no buffer.

    A stack of 4-bit weights has them `packed` and shares its buffer with the same stack of every other layer, until
    `hold` gives it one of its own.
    """

    parts: list[Part]
    size_in: int
    size_out: int
    rank: int
    buffer_YX: Tensor | None  # noqa: N815
    bias_O: Tensor | None  # noqa: N815
    packed: list[FourBit] = field(default_factory=list)
    shared: bool = False
    fp8: Fp8 | None = None
    leaves_traces: bool = False  # other layers' adapters have other places in the shared buffer
    _common: Tensor | Fp8 | None = None  # what was shared while this stack has its own
    _to_shared: Copies | Sides | None = None

    @property
    def sizes(self) -> StackSizes:
        return StackSizes(self.size_in, self.size_out, self.rank)

    @property
    def drops(self) -> bool:
        """Whether dropout comes before an adapter."""
        return any(part.dropout > 0 for part in self.parts)

    @property
    def weight_OX(self) -> Tensor:  # noqa: N802
        assert self.buffer_YX is not None
        return self.buffer_YX[: self.size_out]

    @property
    def a_RI(self) -> Tensor:  # noqa: N802
        if self.fp8 is not None:
            return self.fp8.a_RI
        assert self.buffer_YX is not None
        return self.buffer_YX[self.size_out :, : self.size_in]

    @property
    def b_OR(self) -> Tensor:  # noqa: N802
        if self.fp8 is not None:
            return self.fp8.b_OR
        return self.weight_OX[:, self.size_in :]

    @property
    def copies_bytes(self) -> int:
        """Of the adapters' 16-bit copies, with the padding of their rank; not with products in 8-bit floats."""
        assert self.buffer_YX is not None
        return self.buffer_YX.nbytes - self.size_out * self.size_in * self.buffer_YX.element_size()

    @property
    def memory(self) -> Tensor:
        """Where the weights are, for a product forward."""
        if self.fp8 is not None:
            return self.fp8.forward.values_NK
        assert self.buffer_YX is not None
        return self.buffer_YX

    @property
    def home(self) -> Tensor:
        """What `memory` is when nothing is held."""
        return self._common if isinstance(self._common, Tensor) else self.memory

    @property
    def held(self) -> bool:
        """Whether unpacked 4-bit weights stay in memory of this stack's own."""
        return self._common is not None

    def acquire(self, forward: bool, backward: bool) -> None:
        """Have this stack's weights and adapters there, for its product forward, backward or both; where nothing is
        shared they are."""
        if not self.shared:
            return
        self._fill(forward, backward)
        if self.leaves_traces:
            for place in (self.a_RI, self.b_OR) if self.fp8 is None else self.fp8.side_places:
                place.zero_()
        if self._to_shared is None:
            self._to_shared = Copies(self.copies()) if self.fp8 is None else Sides(self.fp8.sides(self.parts))
        self._to_shared()

    def hold(self) -> None:
        """Unpack the weights once, into memory that stays until `let_go`."""
        if not self.shared:
            return
        if self.fp8 is not None:
            rank, device = self.fp8.forward.rank, self.fp8.a_RI.device
            own = Fp8Values.empty(self.size_out, self.size_in, rank, device)
            self._common, self.fp8 = self.fp8, self.fp8.with_values(own)
        else:
            assert self.buffer_YX is not None
            self._common, self.buffer_YX = self.buffer_YX, torch.zeros_like(self.buffer_YX)
        self.shared = False  # not before there is memory: what has none of its own must go on sharing
        self._fill(forward=True, backward=True)

    def let_go(self) -> None:
        if isinstance(self._common, Fp8):
            self.fp8, self._common, self.shared = self._common, None, True
        elif self._common is not None:
            self.buffer_YX, self._common, self.shared = self._common, None, True

    def _fill(self, forward: bool, backward: bool) -> None:
        if self.fp8 is not None:
            self.fp8.fill(self.parts, self.packed, forward, backward)
            return
        for part, weight in zip(self.parts, self.packed, strict=True):
            unpack_four_bit(weight, self.weight_OX[part.rows, : self.size_in])

    def take_up(self, parts: list[Part], rank: int, common_YX: Tensor | None) -> None:
        """Have these adapters, of this padded rank, instead; not with products in 8-bit floats. `common_YX` is the
        buffer that a stack of 4-bit weights shares from here on; one of its own is made anew where the size changes,
        and 16-bit linears become its views."""
        assert self.buffer_YX is not None
        if rank != self.rank and not self.shared:
            before_OI = self.buffer_YX[: self.size_out, : self.size_in]
            self.buffer_YX = before_OI.new_zeros(self.size_out + rank, self.size_in + rank)
            self.buffer_YX[: self.size_out, : self.size_in].copy_(before_OI)
            for part in parts if common_YX is None else []:
                part.linear.weight = nn.Parameter(self.buffer_YX[part.rows, : self.size_in], requires_grad=False)
        if common_YX is not None and self.shared:
            self.buffer_YX = common_YX
        elif common_YX is not None:
            self._common = common_YX
        self.parts, self.rank, self._to_shared = parts, rank, None
        for buffer_YX in (self.buffer_YX, self.home):  # no copy of what was there may stay
            buffer_YX[self.size_out :, : self.size_in].zero_()
            buffer_YX[: self.size_out, self.size_in :].zero_()

    def copies(self) -> list[Copy]:
        """The adapters' present values into their 16-bit places, rounded to the base's type."""
        found = []
        for part in self.parts:
            if part.a is not None and part.b is not None:
                found.append(Copy(part.a.detach(), self.a_RI[part.ranks], 1.0))
                found.append(Copy(part.b.detach(), self.b_OR[part.rows, part.ranks], part.scale))
        return found

    def input_buffer(self, like: Tensor) -> Tensor:
        """An uninitialised T x (in + rank) buffer, its first columns for the input; with fp8 there are no others."""
        columns = self.size_in + (self.rank if self.fp8 is None else 0)
        return torch.empty(like.shape[0], columns, dtype=like.dtype, device=like.device)

    def output_buffer(self, like: Tensor) -> Outgoing:
        """Uninitialised places for the output's gradient and its side."""
        tokens = like.shape[0]
        if self.fp8 is not None:  # its products write whole rows only
            gradient_TO = torch.empty(tokens, self.size_out, dtype=like.dtype, device=like.device)
            return Outgoing(gradient_TO, gradient_TO.new_empty(tokens, self.rank), None)
        whole_TY = torch.empty(tokens, self.size_out + self.rank, dtype=like.dtype, device=like.device)
        return Outgoing(whole_TY[:, : self.size_out], whole_TY[:, self.size_out :], whole_TY)

    def side(self, x_TI: Tensor, draw: Draw | None) -> Tensor | None:
        """x A^T, of what the masks leave of x where there is a `draw`; None without adapters."""
        if not self.rank:
            return None
        if draw is None:
            return x_TI @ self.a_RI.T
        side_TR = x_TI.new_zeros(x_TI.shape[0], self.rank)
        dropped_TI = torch.empty(x_TI.shape, dtype=x_TI.dtype, device=x_TI.device)
        for part in self.parts:
            if part.a is not None:
                drop(x_TI, draw, part.number, part.dropout, dropped_TI)
                side_TR[:, part.ranks] = dropped_TI @ self.a_RI[part.ranks].T
        return side_TR

    def forward(
        self, x_TX: Tensor, residual_TO: Tensor | None, draw: Draw | None, out_TO: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x_TX has the input in its first columns; the others are overwritten. Returns the output (plus the residual),
        in `out_TO` where that is given, and `side`, which the backward pass needs. `draw` is that of the batch's masks,
        None without dropout."""
        side_TR = self.side(x_TX[:, : self.size_in], draw)
        if self.fp8 is not None:
            found_TO = self.fp8.forward.product(x_TX[:, : self.size_in], side_TR, out_TO)
            for beside in (residual_TO, self.bias_O):
                if beside is not None:
                    found_TO.add_(beside)
            return found_TO, side_TR
        if side_TR is not None:
            x_TX[:, self.size_in :] = side_TR
        if residual_TO is not None:
            found_TO = torch.addmm(residual_TO, x_TX, self.weight_OX.T, out=out_TO)
        elif self.bias_O is not None:
            return torch.addmm(self.bias_O, x_TX, self.weight_OX.T, out=out_TO), side_TR
        else:
            found_TO = torch.mm(x_TX, self.weight_OX.T, out=out_TO)
        return (found_TO if self.bias_O is None else found_TO.add_(self.bias_O)), side_TR

    def backward(self, dy: Outgoing, wants_dx: bool, draw: Draw | None) -> Tensor | None:
        """Fill the side of `dy`, and return the gradient of the input, where it is wanted."""
        if self.rank:
            torch.mm(dy.gradient_TO, self.b_OR, out=dy.side_TR)
        if not wants_dx:
            return None
        if self.rank and draw is not None:
            return self._backward_through_masks(dy, draw)
        if self.fp8 is not None:
            return self.fp8.backward.product(dy.gradient_TO, dy.side_TR if self.rank else None, None)
        assert dy.whole_TY is not None and self.buffer_YX is not None
        return dy.whole_TY @ self.buffer_YX[:, : self.size_in]

    def _backward_through_masks(self, dy: Outgoing, draw: Draw) -> Tensor:
        if self.fp8 is not None:
            dx_TI = self.fp8.backward.product(dy.gradient_TO, torch.zeros_like(dy.side_TR), None)
        else:
            dx_TI = dy.gradient_TO @ self.weight_OX[:, : self.size_in]
        for part in self.parts:
            if part.a is not None:
                add_dropped(dy.side_TR[:, part.ranks] @ self.a_RI[part.ranks], draw, part.number, part.dropout, dx_TI)
        return dx_TI

    def add_gradients(self, dy: Outgoing, x_TI: Tensor | None, side_TR: Tensor | None, draw: Draw | None) -> None:
        """Add to the adapters' gradients; `dy` as `backward` left it, x_TI the input, side_TR as `forward` gave it."""
        if not self.rank:
            return
        assert x_TI is not None and side_TR is not None
        adapters = [(part, part.a, part.b) for part in self.parts if part.a is not None and part.b is not None]
        if draw is None:
            rows = gradient_rows(max(part.ranks.stop for part in self.parts))
            da_RI = product_in_full(dy.side_TR[:, :rows].T, x_TI)
            for part, a, _ in adapters:
                add_gradient(a, da_RI[part.ranks])
        else:
            dropped_TI = torch.empty(x_TI.shape, dtype=x_TI.dtype, device=x_TI.device)
            for part, a, _ in adapters:
                drop(x_TI, draw, part.number, part.dropout, dropped_TI)
                add_gradient(a, product_in_full(dy.side_TR[:, part.ranks].T, dropped_TI))
        for part, _, b in adapters:
            db_OR = product_in_full(dy.gradient_TO[:, part.rows].T, side_TR[:, part.ranks])
            add_gradient(b, db_OR.mul_(part.scale))


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
