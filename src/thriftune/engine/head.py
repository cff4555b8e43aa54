"""The end of the model: last norm, the frozen head and cross-entropy, for the positions that predict a target only.

Shape legend: T tokens, D width, N predicting positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thriftune.engine.layer import Norm
from thriftune.engine.packing import PackedBatch
from thriftune.engine.sizes import head_rows
from thriftune.kernels.cross_entropy import cross_entropy_
from thriftune.kernels.rms_norm import rms_norm, rms_norm_backward


@dataclass(frozen=True)
class Head:
    """`spare_bytes` a token are free while the head runs, because a layer's backward pass needs them later."""

    norm: Norm
    weight_VD: Tensor  # noqa: N815
    spare_bytes: int

    def loss_and_gradient(self, x_TD: Tensor, batch: PackedBatch, scale: float, dx_TD: Tensor) -> Tensor:
        """Sum of the targets' losses, a float64 scalar; the gradient of scale * that sum is written to `dx_TD`."""
        dx_TD.zero_()
        total = torch.zeros((), dtype=torch.float64, device=x_TD.device)
        for rows in self._chunks(batch):
            x_ND = x_TD[batch.predicting_N[rows]]
            normed_ND = torch.empty_like(x_ND)
            rstd_N1 = rms_norm(x_ND, self.norm.weight_D, self.norm.epsilon, normed_ND)
            logits_NV = normed_ND @ self.weight_VD.T
            total += cross_entropy_(logits_NV, batch.targets_N[rows], scale).sum(dtype=torch.float64)
            torch.mm(logits_NV, self.weight_VD, out=normed_ND)
            rms_norm_backward(normed_ND, x_ND, self.norm.weight_D, rstd_N1, None, normed_ND)
            dx_TD[batch.predicting_N[rows]] = normed_ND
            del logits_NV  # or the next rows' logits would be made beside them
        return total

    def loss(self, x_TD: Tensor, batch: PackedBatch) -> Tensor:
        """Sum of the targets' losses, a float64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=x_TD.device)
        for rows in self._chunks(batch):
            x_ND = x_TD[batch.predicting_N[rows]]
            normed_ND = torch.empty_like(x_ND)
            rms_norm(x_ND, self.norm.weight_D, self.norm.epsilon, normed_ND)
            total += cross_entropy_(normed_ND @ self.weight_VD.T, batch.targets_N[rows], 1.0).sum(dtype=torch.float64)
        return total

    def rows_at_once(self, tokens: int) -> int:
        """Positions whose logits are made together in a batch of so many tokens."""
        row_bytes = self.weight_VD.shape[0] * self.weight_VD.element_size()
        return head_rows(row_bytes, tokens, self.spare_bytes)

    def _chunks(self, batch: PackedBatch) -> list[slice]:
        count = batch.predicting_N.shape[0]
        rows = self.rows_at_once(batch.segments.tokens)
        return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
