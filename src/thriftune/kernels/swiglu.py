"""SwiGLU (Shazeer 2020): silu(gate) * up of a stacked product [gate | up], and its gradient.

Shape legend: T tokens, F width of the gated layer, E = 2 F. Rows may lie apart.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from thriftune.kernels.launch import runs_triton

BLOCK = 1024


def swiglu(gate_up_TE: Tensor, out_TF: Tensor) -> None:
    if not runs_triton(gate_up_TE):
        swiglu_reference(gate_up_TE, out_TF)
        return
    tokens, width = out_TF.shape
    _kernels().forward[(tokens, -(-width // BLOCK))](
        gate_up_TE, out_TF, gate_up_TE.stride(0), out_TF.stride(0), width, BLOCK=BLOCK, num_warps=4
    )


def swiglu_backward(gate_up_TE: Tensor, dh_TF: Tensor, out_TE: Tensor, h_TF: Tensor | None) -> None:
    """Write the gradient of [gate | up] into `out_TE` (may be `gate_up_TE` itself), and silu(gate) * up again into
    `h_TF` (may be `dh_TF` itself) where it is wanted."""
    if not runs_triton(gate_up_TE):
        swiglu_backward_reference(gate_up_TE, dh_TF, out_TE, h_TF)
        return
    tokens, width = dh_TF.shape
    h = dh_TF if h_TF is None else h_TF
    _kernels().backward[(tokens, -(-width // BLOCK))](
        gate_up_TE, dh_TF, out_TE, h, gate_up_TE.stride(0), dh_TF.stride(0), out_TE.stride(0), h.stride(0), width,
        WRITE_H=h_TF is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def swiglu_reference(gate_up_TE: Tensor, out_TF: Tensor) -> None:
    gate_TF, up_TF = gate_up_TE.chunk(2, dim=-1)
    out_TF.copy_(functional.silu(gate_TF) * up_TF)


def swiglu_backward_reference(gate_up_TE: Tensor, dh_TF: Tensor, out_TE: Tensor, h_TF: Tensor | None) -> None:
    wide = torch.promote_types(gate_up_TE.dtype, torch.float32)
    gate_TF, up_TF = (half_TF.to(wide) for half_TF in gate_up_TE.chunk(2, dim=-1))
    dh_wide_TF = dh_TF.to(wide)
    share_TF = torch.sigmoid(gate_TF)
    silu_TF = (gate_TF * share_TF).to(gate_up_TE.dtype).to(wide)
    slope_TF = (1 - share_TF).mul_(gate_TF).add_(1).mul_(share_TF)  # of silu
    dgate_TF, dup_TF = (dh_wide_TF * up_TF).mul_(slope_TF), dh_wide_TF * silu_TF
    if h_TF is not None:
        h_TF.copy_(silu_TF.mul_(up_TF))
    for place_TF, gradient_TF in zip(out_TE.chunk(2, dim=-1), (dgate_TF, dup_TF), strict=True):  # all is read by now
        place_TF.copy_(gradient_TF)


@functools.cache
def _kernels() -> Any:
    from thriftune.kernels import swiglu_triton

    return swiglu_triton
