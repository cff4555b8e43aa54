"""The kernels of rms_norm.py: one program a group of a row, which it holds whole."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(x_ptr, weight_ptr, out_ptr, rstd_ptr, x_stride, out_stride, groups, size, epsilon, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row, group = program // groups, program % groups
    column = tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(x_ptr + row * x_stride + group * size + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / size + epsilon)
    tl.store(rstd_ptr + program, rstd)
    normed = (wide * rstd).to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + group * size + column, (normed * weight).to(x.dtype), mask=inside)


@triton.jit
def backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    residual_ptr,
    out_ptr,
    dy_stride,
    x_stride,
    residual_stride,
    out_stride,
    groups,
    size,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, group = program // groups, program % groups
    column = tl.arange(0, BLOCK)
    inside = column < size
    place = group * size + column
    x = tl.load(x_ptr + row * x_stride + place, mask=inside, other=0.0)
    dy = tl.load(dy_ptr + row * dy_stride + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + program)
    normed = x.to(tl.float32) * rstd
    scaled = dy * weight
    dx = rstd * (scaled - normed * (tl.sum(scaled * normed, 0) / size))
    if HAS_RESIDUAL:
        dx += tl.load(residual_ptr + row * residual_stride + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + place, dx.to(x.dtype), mask=inside)
