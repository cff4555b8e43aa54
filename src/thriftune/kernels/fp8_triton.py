"""The kernels of fp8.py. Products of 8-bit floats themselves are cuBLAS's."""

from __future__ import annotations

import triton
import triton.language as tl

from thriftune.kernels.four_bit_triton import weights_of_blocks


@triton.jit
def quantise(
    x_ptr,
    side_ptr,
    side_scales_ptr,
    out_ptr,
    scales_ptr,
    x_stride,
    side_stride,
    out_stride,
    size,
    rank,
    largest,
    HAS_SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
):
    """One program a row: its largest magnitude, then its values over the scale; the row is in the cache by then."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        column = first + offsets
        x = tl.load(x_ptr + row * x_stride + column, mask=column < size, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x))
    top = tl.max(most, 0)
    if HAS_SIDE:
        of_side = tl.arange(0, SIDE)
        inside = of_side < rank
        side = tl.load(side_ptr + row * side_stride + of_side, mask=inside, other=0.0).to(tl.float32)
        side = side * tl.load(side_scales_ptr + of_side, mask=inside, other=0.0)
        top = tl.maximum(top, tl.max(tl.abs(side), 0))
    scale = tl.where(top > 0.0, top / largest, 1.0)
    tl.store(scales_ptr + row, scale)
    kind = out_ptr.dtype.element_ty
    for first in range(0, size, BLOCK):
        column = first + offsets
        x = tl.load(x_ptr + row * x_stride + column, mask=column < size, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * out_stride + column, (x / scale).to(kind), mask=column < size)
    if HAS_SIDE:
        high = (side / scale).to(kind)
        low = (side / scale - high.to(tl.float32)).to(kind)
        place = out_ptr + row * out_stride + size + of_side
        tl.store(place, high, mask=inside)
        tl.store(place + rank, low, mask=inside)
        tl.store(place + 2 * rank, high, mask=inside)


@triton.jit
def largest_over_scales(table_ptr, factors_ptr, found_ptr, source_example, N: tl.constexpr, R: tl.constexpr):
    """The largest |value| / row scale of each entry, by atomic maximum; `found` starts with zeros."""
    entry = table_ptr + tl.program_id(0) * 10
    source = tl.load(entry).to(source_example.dtype)
    scales = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    count, ranks = tl.load(entry + 4), tl.load(entry + 5)
    row_stride, rank_stride = tl.load(entry + 6), tl.load(entry + 7)
    row = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    rank = tl.arange(0, R).to(tl.int64)
    inside = (row[:, None] < count) & (rank[None, :] < ranks)
    value = tl.load(source + row[:, None] * row_stride + rank[None, :] * rank_stride, mask=inside, other=0.0)
    scale = tl.load(scales + row, mask=row < count, other=1.0)
    value = tl.abs(value.to(tl.float32) * tl.load(factors_ptr + tl.program_id(0))) / scale[:, None]
    tl.atomic_max(found_ptr + tl.program_id(0), tl.max(value))


@triton.jit
def place(table_ptr, factors_ptr, found_ptr, source_example, place_example, wanted, N: tl.constexpr, R: tl.constexpr):
    """Values over row scale and the entry's power of two, as high, high and low part; the power itself for the side."""
    entry = table_ptr + tl.program_id(0) * 10
    source = tl.load(entry).to(source_example.dtype)
    target = tl.load(entry + 1).to(place_example.dtype)
    scales = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    sides = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    count, ranks = tl.load(entry + 4), tl.load(entry + 5)
    row_stride, rank_stride = tl.load(entry + 6), tl.load(entry + 7)
    target_stride, whole_rank = tl.load(entry + 8), tl.load(entry + 9)
    most = tl.load(found_ptr + tl.program_id(0))
    power = tl.where(most > 0.0, tl.exp2(tl.ceil(tl.log2(most / wanted))), 1.0)
    row = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    rank = tl.arange(0, R).to(tl.int64)
    inside = (row[:, None] < count) & (rank[None, :] < ranks)
    value = tl.load(source + row[:, None] * row_stride + rank[None, :] * rank_stride, mask=inside, other=0.0)
    scale = tl.load(scales + row, mask=row < count, other=1.0) * power
    value = value.to(tl.float32) * tl.load(factors_ptr + tl.program_id(0)) / scale[:, None]
    kind = place_example.dtype.element_ty
    high = value.to(kind)
    low = (value - high.to(tl.float32)).to(kind)
    where = target + row[:, None] * target_stride + rank[None, :]
    tl.store(where, high, mask=inside)
    tl.store(where + whole_rank, high, mask=inside)
    tl.store(where + 2 * whole_rank, low, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(sides + rank, tl.zeros((R,), tl.float32) + power, mask=rank < ranks)


@triton.jit
def unpack_transposed(
    packed_ptr,
    values_ptr,
    scales_ptr,
    scale_values_ptr,
    scale_scales_ptr,
    scale_offset_ptr,
    row_scales_ptr,
    out_ptr,
    out_stride,
    rows,
    columns,
    scale_block,
    NESTED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`ROWS` rows of one block of columns, unpacked, over the scale of their column, written as columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    number = row * (columns // WEIGHTS) + tl.program_id(1)
    high, low = weights_of_blocks(
        packed_ptr, values_ptr, scales_ptr, scale_values_ptr, scale_scales_ptr, scale_offset_ptr, number, inside,
        scale_block, NESTED, WEIGHTS,
    )  # fmt: skip
    both = tl.reshape(tl.join(high, low), (ROWS, WEIGHTS))
    column = tl.program_id(1).to(tl.int64) * WEIGHTS + tl.arange(0, WEIGHTS)
    both = both / tl.load(row_scales_ptr + column)[None, :]
    out = tl.trans(both.to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + column[:, None] * out_stride + row[None, :], out, mask=inside[None, :])
