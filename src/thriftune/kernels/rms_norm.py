"""RMSNorm (Zhang and Sennrich 2019) over the last part of a row, into a strided place; and its gradient.

Shape legend: T rows (tokens), G groups in a row that are normed each for itself (1 for a layer's norm, the number of
heads for a norm of queries and keys), D elements in a group. Rows may lie apart (a stride), elements may not.
Rounding is that of transformers' Llama: x * rstd in the input's type, then times the weight.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from thriftune.kernels.launch import next_power_of_two, runs_triton


def rms_norm(x_TD: Tensor, weight_D: Tensor, epsilon: float, out_TD: Tensor, groups: int = 1) -> Tensor:
    """Write norm(x) * weight into `out_TD`; returns 1 / rms as rstd_TG (float32, or float64 for float64 input)."""
    if not runs_triton(x_TD):
        return rms_norm_reference(x_TD, weight_D, epsilon, out_TD, groups)
    rows, size = x_TD.shape[0], weight_D.shape[0]
    rstd_TG = torch.empty(rows, groups, dtype=torch.float32, device=x_TD.device)
    block = next_power_of_two(size)
    _kernels().forward[(rows * groups,)](
        x_TD, weight_D, out_TD, rstd_TG, x_TD.stride(0), out_TD.stride(0), groups, size, epsilon,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return rstd_TG


def rms_norm_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_TG: Tensor, residual_TD: Tensor | None, out_TD: Tensor
) -> None:
    """Write the gradient of x, plus `residual_TD` where given, into `out_TD` (which may be `dy_TD` or the residual)."""
    if not runs_triton(x_TD):
        rms_norm_backward_reference(dy_TD, x_TD, weight_D, rstd_TG, residual_TD, out_TD)
        return
    (rows, groups), size = rstd_TG.shape, weight_D.shape[0]
    block = next_power_of_two(size)
    residual = dy_TD if residual_TD is None else residual_TD
    _kernels().backward[(rows * groups,)](
        dy_TD, x_TD, weight_D, rstd_TG, residual, out_TD,
        dy_TD.stride(0), x_TD.stride(0), residual.stride(0), out_TD.stride(0), groups, size,
        HAS_RESIDUAL=residual_TD is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, epsilon: float, out_TD: Tensor, groups: int = 1) -> Tensor:
    size = weight_D.shape[0]
    x_TGD = _in_groups(x_TD, groups, size)
    wide_TGD = x_TGD.to(torch.promote_types(x_TD.dtype, torch.float32))
    rstd_TG = torch.rsqrt(wide_TGD.square().mean(-1) + epsilon)
    normed_TGD = (wide_TGD * rstd_TG[..., None]).to(x_TD.dtype)
    _in_groups(out_TD, groups, size).copy_(normed_TGD * weight_D)
    return rstd_TG


def rms_norm_backward_reference(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_TG: Tensor, residual_TD: Tensor | None, out_TD: Tensor
) -> None:
    groups, size = rstd_TG.shape[1], weight_D.shape[0]
    wide = rstd_TG.dtype
    normed_TGD = _in_groups(x_TD, groups, size).to(wide) * rstd_TG[..., None]
    scaled_TGD = _in_groups(dy_TD, groups, size).to(wide) * weight_D.to(wide)
    mean_TG1 = (scaled_TGD * normed_TGD).mean(-1, keepdim=True)
    dx_TGD = rstd_TG[..., None] * (scaled_TGD - normed_TGD * mean_TG1)
    if residual_TD is not None:
        dx_TGD = dx_TGD + _in_groups(residual_TD, groups, size).to(wide)
    _in_groups(out_TD, groups, size).copy_(dx_TGD)


def _in_groups(rows_TD: Tensor, groups: int, size: int) -> Tensor:
    return rows_TD.unflatten(1, (groups, size))


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


@functools.cache
def _kernels() -> Any:
    from thriftune.kernels import rms_norm_triton

    return rms_norm_triton
