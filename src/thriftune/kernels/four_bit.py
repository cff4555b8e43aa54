"""bitsandbytes' 4-bit weights unpacked in one pass, their scales' own quantisation included, into a strided place.

The format (Dettmers et al. 2023): two weights a byte, the first in the high half, each an index into 16 values; a
scale for `block` weights; with double quantisation the scale itself is a byte, an index into 256 values, times the
scale of its own block, plus an offset. Arithmetic and rounding are bitsandbytes', so results are equal bit for bit.

Shape legend: O rows of the matrix, I columns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thriftune.kernels.launch import next_power_of_two, runs_triton

BLOCKS = 32  # of one scale each: what a program unpacks, side by side in a row


@dataclass(frozen=True)
class FourBit:
    """A packed matrix. `scales` are float32, or bytes that `scale_values` and `scale_scales` say the meaning of."""

    packed: Tensor
    values: Tensor
    block: int
    rows: int
    columns: int
    scales: Tensor
    scale_values: Tensor | None
    scale_scales: Tensor | None
    scale_block: int
    scale_offset: Tensor | None

    @classmethod
    def of(cls, weight: Any) -> FourBit:
        """Of a bitsandbytes.nn.Params4bit that has been quantised."""
        state = weight.quant_state
        nested = state.state2 if state.nested else None
        return cls(
            packed=weight.data,
            values=state.code.to(weight.device, torch.float32),
            block=state.blocksize,
            rows=int(state.shape[0]),
            columns=int(state.shape[1]),
            scales=state.absmax,
            scale_values=nested.code.to(weight.device) if nested else None,
            scale_scales=nested.absmax if nested else None,
            scale_block=nested.blocksize if nested else 1,
            scale_offset=state.offset if nested else None,
        )


def unpack_four_bit(weight: FourBit, out_OI: Tensor, over_O1: Tensor | None = None) -> None:
    """Write the matrix in `out_OI`'s type, each row over its number of `over_O1` where that is given (float32); rows of
    `out_OI` may lie apart."""
    if not runs_triton(out_OI) or weight.columns % weight.block:
        unpack_four_bit_reference(weight, out_OI, over_O1)
        return
    nested = weight.scale_values is not None
    scales = weight.scales
    in_a_row = weight.columns // weight.block
    blocks = min(BLOCKS, next_power_of_two(in_a_row))
    _kernels().unpack[(weight.rows, -(-in_a_row // blocks))](
        weight.packed, weight.values, scales,
        weight.scale_values if nested else scales,
        weight.scale_scales if nested else scales,
        weight.scale_offset if nested else scales,
        scales if over_O1 is None else over_O1,
        out_OI, out_OI.stride(0), weight.columns, weight.scale_block,
        NESTED=nested, OVER=over_O1 is not None, WEIGHTS=weight.block, BLOCKS=blocks,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def unpack_four_bit_reference(weight: FourBit, out_OI: Tensor, over_O1: Tensor | None = None) -> None:
    packed = weight.packed.flatten()
    indices = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[: weight.rows * weight.columns]
    scales = weight.scales
    if weight.scale_values is not None and weight.scale_scales is not None and weight.scale_offset is not None:
        of_scales = weight.scale_scales.repeat_interleave(weight.scale_block)[: scales.numel()]
        scales = weight.scale_values[scales.long()] * of_scales + weight.scale_offset
    each = scales.repeat_interleave(weight.block)[: indices.numel()]
    whole_OI = (weight.values[indices.long()] * each).unflatten(0, (weight.rows, weight.columns))
    out_OI.copy_(whole_OI if over_O1 is None else (whole_OI / over_O1).to(out_OI.dtype))


@functools.cache
def _kernels() -> Any:
    from thriftune.kernels import four_bit_triton

    return four_bit_triton
