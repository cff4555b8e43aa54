"""Cross-entropy of rows of logits, the gradient written over them: no second array of that size ever exists.

Shape legend: N rows, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from thriftune.kernels.launch import next_power_of_two, runs_triton

LONGEST_BLOCK = 8192


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor, scale: float) -> Tensor:
    """The losses logsumexp(x) - x[target] as loss_N (float32; float64 for float64 logits). `logits_NV` becomes
    scale * (softmax(x) - onehot(target)). Every target is an index in the vocabulary."""
    if not runs_triton(logits_NV):
        return cross_entropy_reference_(logits_NV, targets_N, scale)
    rows, vocabulary = logits_NV.shape
    loss_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    block = min(LONGEST_BLOCK, next_power_of_two(vocabulary))
    _kernels().in_place[(rows,)](
        logits_NV, targets_N, loss_N, logits_NV.stride(0), scale, VOCABULARY=vocabulary, BLOCK=block, num_warps=16
    )
    return loss_N


def cross_entropy_reference_(logits_NV: Tensor, targets_N: Tensor, scale: float) -> Tensor:
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32), copy=True)
    log_total_N1 = torch.logsumexp(wide_NV, dim=-1, keepdim=True)
    loss_N = (log_total_N1 - wide_NV.gather(1, targets_N[:, None]))[:, 0]
    wide_NV = torch.exp_(wide_NV.sub_(log_total_N1))
    wide_NV.scatter_add_(1, targets_N[:, None], wide_NV.new_full((len(targets_N), 1), -1.0))
    logits_NV.copy_(wide_NV * scale)
    return loss_N


@functools.cache
def _kernels() -> Any:
    from thriftune.kernels import cross_entropy_triton

    return cross_entropy_triton
