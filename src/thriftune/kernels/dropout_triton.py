"""The kernel of dropout.py: one program a token and a block of places, each of which stands for eight columns."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _write(x_ptr, out_ptr, bits, column, inside, threshold, factor, ADD: tl.constexpr):
    x = tl.load(x_ptr + column, mask=inside, other=0.0)
    left = tl.where(bits.to(tl.int32) < threshold, x.to(tl.float32) * factor, 0.0)
    if ADD:
        left += tl.load(out_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + column, left.to(x.dtype), mask=inside)


# Keys are others in every step and linears in every launch: neither may make a kernel of its own.
@triton.jit(do_not_specialize=["key_0", "key_1", "linear", "threshold"])
def apply(
    x_ptr,
    out_ptr,
    rows_ptr,
    positions_ptr,
    x_stride,
    out_stride,
    size,
    eighth,
    key_0,
    key_1,
    linear,
    threshold,
    factor,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + token).to(tl.int32)
    position = tl.load(positions_ptr + token).to(tl.int32)
    key = (key_1.to(tl.int64) << 32) | key_0.to(tl.int64)
    zero = place * 0
    words = tl.philox(key, place, zero + position, zero + row, zero + linear)
    x_ptr += token * x_stride
    out_ptr += token * out_stride
    for number in tl.static_range(4):
        low = number * eighth + place
        high = low + 4 * eighth
        _write(x_ptr, out_ptr, words[number] & 0xFFFF, low, (place < eighth) & (low < size), threshold, factor, ADD)
        _write(x_ptr, out_ptr, words[number] >> 16, high, (place < eighth) & (high < size), threshold, factor, ADD)
