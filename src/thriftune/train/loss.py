"""Sum of the target tokens' losses, and the only place that shifts labels.

Shape legend: B rows, T positions, K positions that predict a target in any row, V vocabulary, N = B * K.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from thriftune.data import Batch

IGNORE = -100
# Float32 copies of the logits are made for so many positions at a time: 1024, and fewer where the vocabulary would make
# that more than 64 MiB.
ROWS_AT_ONCE = 1024
CHUNK_ELEMENTS = 16 * 1024**2


class SumCrossEntropy(torch.autograd.Function):
    """sum_n [logsumexp(x_n) - x_n[target_n]] over targets that are not IGNORE; float32 inside, float64 across chunks.

    The gradient, softmax(x_n) - onehot(target_n), is made in the forward pass chunk by chunk and kept in the logits'
    own type, so no float32 copy of all logits ever exists. Logits in float64 stay float64 throughout.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient_NV = torch.empty_like(logits_NV) if needs_gradient else None
        total = torch.zeros((), dtype=torch.float64, device=logits_NV.device)
        at_once = _rows_at_once(logits_NV)
        for start in range(0, logits_NV.shape[0], at_once):
            rows = slice(start, start + at_once)
            # A copy, also where the logits have this type already: it is overwritten below, and they are not ours.
            chunk_NV = logits_NV[rows].to(torch.promote_types(logits_NV.dtype, torch.float32), copy=True)
            counted_N = targets_N[rows] != IGNORE
            picked_N = targets_N[rows].where(counted_N, 0)
            log_total_N = torch.logsumexp(chunk_NV, dim=-1)
            loss_N = log_total_N - chunk_NV.gather(1, picked_N[:, None])[:, 0]
            # where, not a product: a position without a target may hold infinities
            total += loss_N.where(counted_N, 0.0).sum(dtype=torch.float64)
            if gradient_NV is not None:
                chunk_NV = torch.exp_(chunk_NV.sub_(log_total_N[:, None]))
                chunk_NV.scatter_add_(1, picked_N[:, None], chunk_NV.new_full((len(picked_N), 1), -1.0))
                gradient_NV[rows] = chunk_NV.masked_fill_(~counted_N[:, None], 0.0)
        ctx.save_for_backward(gradient_NV)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """In place, so once a graph (autograd refuses a second time). The factor, 1 / targets of the step, is not
        rounded to bfloat16 first: that would change every gradient by up to 0.4 %."""
        (gradient_NV,) = ctx.saved_tensors
        wide = torch.promote_types(gradient_NV.dtype, torch.float32)
        for chunk_NV in gradient_NV.split(_rows_at_once(gradient_NV)):
            chunk_NV.copy_(chunk_NV.to(wide) * grad_outputs[0].to(wide))
        return gradient_NV, None


def _rows_at_once(logits_NV: Tensor) -> int:
    return max(1, min(ROWS_AT_ONCE, CHUNK_ELEMENTS // max(1, logits_NV.shape[1])))


def accepts_logits_to_keep(model: nn.Module) -> bool:
    """Whether the causal model under any wrapper can compute logits for chosen positions only."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def loss_sum(model: nn.Module, batch: Batch, logits_for_targets_only: bool) -> Tensor:
    """The batch's summed loss, a float64 scalar. Padding stands right of every row, so causal attention never sees it
    and no attention mask is needed; logits are computed only at positions that predict a target in some row."""
    targets_BT = batch.labels_BT[:, 1:]
    positions_K = (targets_BT != IGNORE).any(dim=0).nonzero()[:, 0]
    targets_BK = targets_BT[:, positions_K]
    if logits_for_targets_only:
        logits_BKV = model(input_ids=batch.tokens_BT, use_cache=False, logits_to_keep=positions_K).logits
    else:
        logits_BKV = model(input_ids=batch.tokens_BT, use_cache=False).logits[:, positions_K]
    total: Tensor = SumCrossEntropy.apply(logits_BKV.flatten(0, 1), targets_BK.flatten())
    return total
