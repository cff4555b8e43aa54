"""The kernel of rope.py: one program a token and a block of heads, of the queries, the keys or the values."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _move(
    source_ptr,
    target_ptr,
    heads,
    block,
    cos,
    sin,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    TURN: tl.constexpr,
):
    head = block * HEADS + tl.arange(0, HEADS)
    element = tl.arange(0, BLOCK_HALF)
    place = head[:, None] * (2 * HALF) + element[None, :]
    inside = (head[:, None] < heads) & (element[None, :] < HALF)
    first = tl.load(source_ptr + place, mask=inside, other=0.0)
    second = tl.load(source_ptr + place + HALF, mask=inside, other=0.0)
    if TURN:
        a, b = first.to(tl.float32), second.to(tl.float32)
        first, second = (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)
    tl.store(target_ptr + place, first, mask=inside)
    tl.store(target_ptr + place + HALF, second, mask=inside)


@triton.jit
def turn(
    q_from,
    k_from,
    v_from,
    q_to,
    k_to,
    v_to,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_from_stride,
    k_from_stride,
    v_from_stride,
    q_to_stride,
    k_to_stride,
    v_to_stride,
    queries,
    groups,
    q_blocks,
    k_blocks,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    INVERSE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    element = tl.arange(0, BLOCK_HALF)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + element, mask=element < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + position * HALF + element, mask=element < HALF, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    if block < q_blocks:
        source, target = q_from + token * q_from_stride, q_to + token * q_to_stride
        _move(source, target, queries, block, cos, sin, HALF, BLOCK_HALF, HEADS, True)
    elif block < q_blocks + k_blocks:
        source, target = k_from + token * k_from_stride, k_to + token * k_to_stride
        _move(source, target, groups, block - q_blocks, cos, sin, HALF, BLOCK_HALF, HEADS, True)
    else:
        source, target = v_from + token * v_from_stride, v_to + token * v_to_stride
        _move(source, target, groups, block - q_blocks - k_blocks, cos, sin, HALF, BLOCK_HALF, HEADS, False)
