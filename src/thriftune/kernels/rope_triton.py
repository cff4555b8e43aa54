"""The kernel of rope.py: one program a token and a block of heads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate(
    x_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    token_stride,
    heads,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    element = tl.arange(0, BLOCK_HALF)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + element, mask=element < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + position * HALF + element, mask=element < HALF, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    place = x_ptr + token * token_stride + head[:, None] * (2 * HALF) + element[None, :]
    inside = (head[:, None] < heads) & (element[None, :] < HALF)
    first = tl.load(place, mask=inside, other=0.0)
    second = tl.load(place + HALF, mask=inside, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    tl.store(place, (a * cos - b * sin).to(first.dtype), mask=inside)
    tl.store(place + HALF, (b * cos + a * sin).to(first.dtype), mask=inside)
