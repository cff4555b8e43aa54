"""The kernels of swiglu.py: one program a token and a block of columns."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(gate_up_ptr, out_ptr, gate_up_stride, out_stride, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up_ptr + token * gate_up_stride + column, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + token * gate_up_stride + width + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + token * out_stride + column, (silu * up.to(tl.float32)).to(gate.dtype), mask=inside)


@triton.jit
def backward(
    gate_up_ptr,
    dh_ptr,
    out_ptr,
    h_ptr,
    gate_up_stride,
    dh_stride,
    out_stride,
    h_stride,
    width,
    WRITE_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate_bits = tl.load(gate_up_ptr + token * gate_up_stride + column, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + token * gate_up_stride + width + column, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + token * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = gate_bits.to(tl.float32)
    share = tl.sigmoid(gate)
    silu = (gate * share).to(gate_bits.dtype).to(tl.float32)
    dgate = dh * up * share * (1.0 + gate * (1.0 - share))
    if WRITE_H:
        tl.store(h_ptr + token * h_stride + column, (silu * up).to(gate_bits.dtype), mask=inside)
    tl.store(out_ptr + token * out_stride + column, dgate.to(gate_bits.dtype), mask=inside)
    tl.store(out_ptr + token * out_stride + width + column, (dh * silu).to(gate_bits.dtype), mask=inside)
