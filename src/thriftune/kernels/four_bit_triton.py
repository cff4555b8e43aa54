"""The kernel of four_bit.py: one program a number of blocks of one row, each with one scale."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weights_of_blocks(
    packed_ptr,
    values_ptr,
    scales_ptr,
    scale_values_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    number,
    inside,
    scale_block,
    NESTED: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """The first and the second weight of every byte of the blocks with these numbers, in float32."""
    if NESTED:
        index = tl.load(scales_ptr + number, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scale_values_ptr + index, mask=inside, other=0.0)
        scale = scale * tl.load(scale_scales_ptr + number // scale_block, mask=inside, other=0.0)
        scale = scale + tl.load(scale_offset_ptr)
    else:
        scale = tl.load(scales_ptr + number, mask=inside, other=0.0)
    pair = tl.arange(0, WEIGHTS // 2)
    place = number[:, None] * (WEIGHTS // 2) + pair[None, :]
    byte = tl.load(packed_ptr + place, mask=inside[:, None], other=0).to(tl.int32)
    high = tl.load(values_ptr + (byte >> 4)) * scale[:, None]
    low = tl.load(values_ptr + (byte & 15)) * scale[:, None]
    return high, low


@triton.jit
def unpack(
    packed_ptr,
    values_ptr,
    scales_ptr,
    scale_values_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    over_ptr,
    out_ptr,
    out_stride,
    columns,
    scale_block,
    NESTED: tl.constexpr,
    OVER: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Rows hold whole blocks of `WEIGHTS` weights."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < columns // WEIGHTS
    number = row * (columns // WEIGHTS) + block
    high, low = weights_of_blocks(
        packed_ptr, values_ptr, scales_ptr, scale_values_ptr, scale_scales_ptr, scale_offset_ptr, number, inside,
        scale_block, NESTED, WEIGHTS,
    )  # fmt: skip
    if OVER:
        over = tl.load(over_ptr + row)
        high, low = high / over, low / over
    kind = out_ptr.dtype.element_ty
    both = tl.reshape(tl.join(high.to(kind), low.to(kind)), (BLOCKS, WEIGHTS))
    column = block[:, None] * WEIGHTS + tl.arange(0, WEIGHTS)[None, :]
    tl.store(out_ptr + row * out_stride + column, both, mask=inside[:, None])
