"""A stack's weights as right factors of products in 8-bit floats, with the adapters beside them.

The forward pass multiplies by W, the backward pass by its transpose; the products want both with the inner size along
the rows, so there are two operands, each quantised by its own rows. 16-bit weights are quantised once, when the program
is read. 4-bit weights are unpacked into 8 bits, in the layout that a pass needs. The adapters' copies beside the
weights are split in two parts (see kernels/fp8.py), so that they count as in 16 bits.

Shape legend: T tokens, I in, O out, N rows of an operand, R padded rank, K = inner size + 3 R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thriftune.engine.part import Part
from thriftune.kernels.four_bit import FourBit, unpack_four_bit
from thriftune.kernels.fp8 import (
    E4M3,
    Side,
    product,
    quantise_rows,
    row_scales,
    unpack_to_columns,
    unpack_to_rows,
    write_weight,
)


@dataclass
class Operand:
    """`size` columns are the weight's. The side's columns are zero until an adapter is written there."""

    values_NK: Tensor  # noqa: N815
    scales_N1: Tensor  # noqa: N815
    side_scales_R: Tensor  # noqa: N815
    size: int

    @property
    def rank(self) -> int:
        return self.side_scales_R.shape[0]

    def product(self, x_TI: Tensor, side_TR: Tensor | None, out_TN: Tensor | None) -> Tensor:
        """[x | side] times this, T x N in the type of x, in `out_TN` where that is given."""
        left_TK = torch.empty(x_TI.shape[0], self.values_NK.shape[1], dtype=E4M3, device=x_TI.device)
        beside_TR = side_TR[:, : self.rank] if side_TR is not None else None
        scales_T1 = quantise_rows(x_TI, beside_TR, self.side_scales_R, left_TK)
        return product(left_TK, scales_T1, self.values_NK, self.scales_N1, x_TI.dtype, out_TN)


@dataclass
class Fp8:
    """Of one stack. `a_RI` and `b_OR` are 16-bit copies of the adapters, as narrow products use them."""

    a_RI: Tensor  # noqa: N815
    b_OR: Tensor  # noqa: N815
    forward: Operand
    backward: Operand

    @property
    def bytes(self) -> int:
        """Of the two layouts of the weight."""
        return self.forward.values_NK.nbytes + self.backward.values_NK.nbytes

    def sides(self, parts: Sequence[Part]) -> list[Side]:
        """What brings the adapters' present values beside the weights, in both operands."""
        found = []
        ahead, back = self.forward, self.backward
        for part in parts:
            if part.a is None or part.b is None:
                continue
            ranks, size_in, size_out = part.ranks, ahead.size, back.size
            behind = slice(size_in + ranks.start, size_in + ranks.stop)
            below = slice(size_out + ranks.start, size_out + ranks.stop)
            found.append(Side(part.b.detach(), part.scale, ahead.scales_N1[part.rows],
                              ahead.values_NK[part.rows, behind], ahead.rank, ahead.side_scales_R[ranks]))  # fmt: skip
            found.append(Side(part.a.detach().T, 1.0, back.scales_N1,
                              back.values_NK[:, below], back.rank, back.side_scales_R[ranks]))  # fmt: skip
        return found

    @property
    def side_places(self) -> list[Tensor]:
        return [operand.values_NK[:, operand.size :].view(torch.uint8) for operand in (self.forward, self.backward)]

    def fill(self, parts: Sequence[Part], packed: Sequence[FourBit], forward: bool, backward: bool) -> None:
        """Unpack 4-bit weights into the layouts that are wanted."""
        for part, weight in zip(parts, packed, strict=True):
            if forward:
                rows_NI = self.forward.values_NK[part.rows, : self.forward.size]
                unpack_to_rows(weight, self.forward.scales_N1[part.rows], rows_NI)
            if backward:
                unpack_to_columns(weight, self.backward.scales_N1, self.backward.values_NK[:, part.rows])

    def with_values(self, like: Fp8Values) -> Fp8:
        """The same adapters and scales with other memory for the weight."""
        return replace(
            self,
            forward=replace(self.forward, values_NK=like.forward_NK),
            backward=replace(self.backward, values_NK=like.backward_NK),
        )


@dataclass(frozen=True)
class Fp8Values:
    """Memory for both layouts of a weight with its side's columns."""

    forward_NK: Tensor  # noqa: N815
    backward_NK: Tensor  # noqa: N815

    @classmethod
    def empty(cls, size_out: int, size_in: int, rank: int, device: torch.device) -> Fp8Values:
        def zeros(rows: int, columns: int) -> Tensor:
            return torch.zeros(rows, columns, dtype=torch.uint8, device=device).view(E4M3)

        return cls(zeros(size_out, size_in + 3 * rank), zeros(size_in, size_out + 3 * rank))


def fp8_to_be_read(size_out: int, size_in: int, rank: int, values: Fp8Values, like: Tensor) -> Fp8:
    """Of 4-bit weights that are not there yet: `read_fp8` gives the rows' scales when they are."""
    ahead = Operand(values.forward_NK, like.new_empty(size_out, 1), torch.ones(rank, device=like.device), size_in)
    back = Operand(values.backward_NK, like.new_empty(size_in, 1), torch.ones(rank, device=like.device), size_out)
    return Fp8(like.new_zeros(rank, size_in), like.new_zeros(size_out, rank), ahead, back)


def read_fp8(
    parts: Sequence[Part], packed: Sequence[FourBit], size_in: int, rank: int, values: Fp8Values, like: Tensor
) -> Fp8:
    """Quantise the linears of a stack into `values`, or of 4-bit ones only their rows' scales. Products' inputs are of
    the type of `like`; `rank` is the stack's padded one."""
    size_out = parts[-1].rows.stop
    weight_OI = torch.empty(size_out, size_in, dtype=like.dtype, device=like.device)
    for index, part in enumerate(parts):
        if packed:
            unpack_four_bit(packed[index], weight_OI[part.rows])
        else:
            weight_OI[part.rows] = part.linear.weight
    operands = []
    for values_NK, weight_NI, size in (
        (values.forward_NK, weight_OI, size_in),
        (values.backward_NK, weight_OI.T, size_out),
    ):
        scales_N1 = row_scales(weight_NI)
        if not packed:
            write_weight(weight_NI, scales_N1, values_NK[:, :size])
        operands.append(Operand(values_NK, scales_N1, torch.ones(rank, device=like.device), size))
    return Fp8(like.new_zeros(rank, size_in), like.new_zeros(size_out, rank), *operands)
