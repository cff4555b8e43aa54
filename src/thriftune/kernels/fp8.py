"""Matrix products in 8-bit floats (e4m3: 4 bits of exponent, 3 of mantissa; Micikevicius et al. 2022), a scale a row.

Left and right factors have a float32 scale for each row, so that the largest magnitude of a row becomes 448, the
largest e4m3 number; a product is the sum over 8-bit values times both scales.

A factor may have side columns: an adapter's. They keep about 8 bits of mantissa, as in bfloat16, by being there three
times: [high | low | high] on the left meets [high | high | low] on the right, where high is the value rounded and low
what the rounding left. They share the row's scale, so the right ones are brought near `WANTED` by a power of two, which
the left ones are multiplied with.

Shape legend: T tokens, N rows of a weight, I inner size, R rank of the side, K = I + 3 R.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thriftune.kernels.four_bit import FourBit, unpack_four_bit
from thriftune.kernels.launch import next_power_of_two, runs_triton

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
WANTED = 16.0  # room above for the row's own values, and below for small ones
LONGEST_BLOCK = 8192
ROWS_AT_ONCE = 128


def quantise_rows(x_TI: Tensor, side_TR: Tensor | None, side_scales_R: Tensor, out_TK: Tensor) -> Tensor:
    """Write [x | high | low | high] of each row over the row's scale into `out_TK`; returns the scales as scales_T1.
    Rows of `x_TI` and `side_TR` may lie apart. A row of zeros has scale 1."""
    if not runs_triton(x_TI):
        return quantise_rows_reference(x_TI, side_TR, side_scales_R, out_TK)
    rows, size = x_TI.shape
    scales_T1 = torch.empty(rows, 1, dtype=torch.float32, device=x_TI.device)
    side, rank = (x_TI, 0) if side_TR is None else (side_TR, side_TR.shape[1])
    block = min(LONGEST_BLOCK, next_power_of_two(size))
    _kernels().quantise[(rows,)](
        x_TI, side, side_scales_R, out_TK, scales_T1,
        x_TI.stride(0), side.stride(0), out_TK.stride(0), size, rank, LARGEST,
        HAS_SIDE=rank > 0, BLOCK=block, SIDE=next_power_of_two(rank), num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    return scales_T1


def quantise_rows_reference(x_TI: Tensor, side_TR: Tensor | None, side_scales_R: Tensor, out_TK: Tensor) -> Tensor:
    wide_TI = x_TI.float()
    whole = wide_TI
    if side_TR is not None:
        wide_TR = side_TR.float() * side_scales_R
        whole = torch.cat((wide_TI, wide_TR), dim=1)
    most_T1 = whole.abs().amax(1, keepdim=True)
    scales_T1 = torch.where(most_T1 > 0, most_T1 / LARGEST, 1.0)
    size = x_TI.shape[1]
    out_TK[:, :size] = (wide_TI / scales_T1).to(out_TK.dtype)
    if side_TR is not None:
        _write_side(wide_TR / scales_T1, out_TK[:, size:], side_TR.shape[1], low_at=1)
    return scales_T1


def _write_side(value_NR: Tensor, out_NX: Tensor, rank: int, low_at: int) -> None:
    """High and low parts into three places that lie `rank` columns apart, the low one in the place `low_at`."""
    high_NR = value_NR.to(out_NX.dtype)
    low_NR = (value_NR - high_NR.float()).to(out_NX.dtype)
    for place in range(3):
        columns = slice(place * rank, place * rank + value_NR.shape[1])
        out_NX[:, columns] = low_NR if place == low_at else high_NR


def product(
    left_TK: Tensor, scales_T1: Tensor, right_NK: Tensor, scales_N1: Tensor, dtype: torch.dtype, out_TN: Tensor | None
) -> Tensor:
    """left right^T times both scales, T x N in `dtype`, in `out_TN` where that is given (whole rows). Sums are rounded
    to about 14 bits on the way on Hopper ("fast accumulation")."""
    if not left_TK.is_cuda:
        found_TN = product_reference(left_TK, scales_T1, right_NK, scales_N1, dtype)
        return found_TN if out_TN is None else out_TN.copy_(found_TN)
    options = {"scale_a": scales_T1, "scale_b": scales_N1.T, "out_dtype": dtype, "use_fast_accum": True}
    if out_TN is None:
        return torch._scaled_mm(left_TK, right_NK.T, **options)
    return torch._scaled_mm(left_TK, right_NK.T, **options, out=out_TN)


def product_reference(
    left_TK: Tensor, scales_T1: Tensor, right_NK: Tensor, scales_N1: Tensor, dtype: torch.dtype
) -> Tensor:
    return ((left_TK.float() @ right_NK.float().T) * scales_T1 * scales_N1.T).to(dtype)


def row_scales(weight_NI: Tensor) -> Tensor:
    """The scale of each row of a weight alone, as N x 1, float32."""
    most_N1 = weight_NI.abs().amax(1, keepdim=True).float()
    return torch.where(most_N1 > 0, most_N1 / LARGEST, 1.0)


def write_weight(weight_NI: Tensor, scales_N1: Tensor, out_NI: Tensor) -> None:
    """Write a weight over its rows' scales into `out_NI`, some rows at a time."""
    for first in range(0, weight_NI.shape[0], 1024):
        rows = slice(first, first + 1024)
        out_NI[rows] = (weight_NI[rows].float() / scales_N1[rows]).clamp_(-LARGEST, LARGEST).to(out_NI.dtype)


def unpack_to_rows(weight: FourBit, scales_N1: Tensor, out_NI: Tensor) -> None:
    """Write a 4-bit matrix over its rows' scales into `out_NI`."""
    unpack_four_bit(weight, out_NI, scales_N1)


def unpack_to_columns(weight: FourBit, scales_I1: Tensor, out_IN: Tensor) -> None:
    """Write the transpose of a 4-bit matrix over the transpose's rows' scales into `out_IN`."""
    if not runs_triton(out_IN) or weight.columns % weight.block:
        whole = torch.empty(weight.rows, weight.columns, dtype=torch.float32, device=out_IN.device)
        unpack_four_bit(weight, whole)
        write_weight(whole.T, scales_I1, out_IN)
        return
    nested = weight.scale_values is not None
    scales = weight.scales
    _kernels().unpack_transposed[(-(-weight.rows // ROWS_AT_ONCE), weight.columns // weight.block)](
        weight.packed, weight.values, scales,
        weight.scale_values if nested else scales,
        weight.scale_scales if nested else scales,
        weight.scale_offset if nested else scales,
        scales_I1, out_IN, out_IN.stride(0), weight.rows, weight.columns, weight.scale_block,
        NESTED=nested, WEIGHTS=weight.block, ROWS=ROWS_AT_ONCE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One adapter matrix beside a weight: `source_NR` (any strides) times `factor`, into the three places of each row
    of `place_NR` that lie `whole_rank` columns apart; the power of two goes to `side_scales_R`."""

    source_NR: Tensor  # noqa: N815
    factor: float
    scales_N1: Tensor  # noqa: N815
    place_NR: Tensor  # noqa: N815
    whole_rank: int
    side_scales_R: Tensor  # noqa: N815


class Sides:
    """A list of adapters' matrices to be written beside their weights again and again, in two launches."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self._sides = list(sides)
        self._table: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self) -> None:
        if not self._sides:
            return
        first = self._sides[0]
        if not runs_triton(first.source_NR):
            for side in self._sides:
                write_side_reference(side)
            return
        if self._table is None:
            self._table = self._make_table(first.source_NR.device)
        numbers, factors, found = self._table
        ranks = next_power_of_two(max(side.source_NR.shape[1] for side in self._sides))
        rows = max(1, 4096 // ranks)
        grid = (len(self._sides), -(-max(side.source_NR.shape[0] for side in self._sides) // rows))
        found.zero_()
        _kernels().largest_over_scales[grid](numbers, factors, found, first.source_NR, N=rows, R=ranks)
        _kernels().place[grid](numbers, factors, found, first.source_NR, first.place_NR, WANTED, N=rows, R=ranks)

    def _make_table(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        rows = [
            [side.source_NR.data_ptr(), side.place_NR.data_ptr(), side.scales_N1.data_ptr(),
             side.side_scales_R.data_ptr(), *side.source_NR.shape, *side.source_NR.stride(),
             side.place_NR.stride(0), side.whole_rank]
            for side in self._sides
        ]  # fmt: skip
        factors = torch.tensor([side.factor for side in self._sides], dtype=torch.float32)
        found = torch.zeros(len(self._sides), dtype=torch.float32, device=device)
        return torch.tensor(rows, dtype=torch.int64).to(device), factors.to(device), found


def write_side_reference(side: Side) -> None:
    value_NR = side.source_NR.detach().float() * side.factor / side.scales_N1
    most = value_NR.abs().max()
    power = torch.exp2(torch.ceil(torch.log2(most / WANTED))) if most > 0 else torch.ones(())
    ranks, width = value_NR.shape[1], side.whole_rank
    # `place_NR` is a view of the first of the three places; the row goes on behind it.
    whole_NX = side.place_NR.as_strided((value_NR.shape[0], 2 * width + ranks), (side.place_NR.stride(0), 1))
    _write_side(value_NR / power, whole_NX, width, low_at=2)
    side.side_scales_R.fill_(float(power))


@functools.cache
def _kernels() -> Any:
    from thriftune.kernels import fp8_triton

    return fp8_triton
