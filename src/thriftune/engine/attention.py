"""Causal attention inside each segment of a packed row, forward and backward, by the best kernel there is.

Shape legend: T tokens, H heads of queries, G heads of keys and values (each serves H / G), K elements of a head.
A window of W lets a token see itself and the W - 1 before it; None lets it see all before it in its segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from thriftune.engine.packing import Segments


@dataclass(frozen=True)
class Kind:
    """What all layers of a kind share: the factor of the scores, and the window."""

    scale: float
    window: int | None

    def window_of(self, segments: Segments) -> int | None:
        """The window where it hides anything from anyone."""
        return self.window if self.window is not None and segments.longest > self.window else None


class Attention(Protocol):
    """`forward` writes `out_THK` and returns what `backward` needs besides; `backward` writes dq, dk and dv."""

    @property
    def name(self) -> str: ...

    def forward(
        self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, segments: Segments, kind: Kind, out_THK: Tensor
    ) -> Any: ...

    def backward(
        self,
        dout_THK: Tensor,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        out_THK: Tensor,
        kept: Any,
        segments: Segments,
        kind: Kind,
        gradients: tuple[Tensor, Tensor, Tensor],
    ) -> None: ...


class ReferenceAttention:
    """Segment by segment with whole score matrices, in the input's type (float32 for 16-bit ones)."""

    name = "reference"

    def forward(
        self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, segments: Segments, kind: Kind, out_THK: Tensor
    ) -> list[Tensor]:
        return [
            self.forward_segment(q_THK[rows], k_TGK[rows], v_TGK[rows], kind, out_THK[rows]) for rows in _rows(segments)
        ]

    def forward_segment(self, q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, kind: Kind, out_SHK: Tensor) -> Tensor:
        """Write the result of one segment; the logarithms of the scores' sums are kept."""
        scores_HSS, values_HSK, _ = _scores(q_SHK, k_SGK, v_SGK, kind)
        log_total_HS1 = torch.logsumexp(scores_HSS, dim=-1, keepdim=True)
        shares_HSS = torch.exp(scores_HSS - log_total_HS1)
        out_SHK.copy_((shares_HSS @ values_HSK).transpose(0, 1))
        return log_total_HS1

    def backward(
        self,
        dout_THK: Tensor,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        out_THK: Tensor,
        kept: list[Tensor],
        segments: Segments,
        kind: Kind,
        gradients: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        for rows, log_total in zip(_rows(segments), kept, strict=True):
            dq_HSK, dk_HSK, dv_HSK = self.backward_segment(
                dout_THK[rows], q_THK[rows], k_TGK[rows], v_TGK[rows], out_THK[rows], log_total, kind
            )
            gradients[0][rows] = dq_HSK.transpose(0, 1).to(q_THK.dtype)
            for gradient_TGK, by_head_HSK in ((gradients[1], dk_HSK), (gradients[2], dv_HSK)):
                summed_GSK = by_head_HSK.unflatten(0, (k_TGK.shape[1], -1)).sum(1)
                gradient_TGK[rows] = summed_GSK.transpose(0, 1).to(gradient_TGK.dtype)

    def backward_segment(
        self,
        dout_SHK: Tensor,
        q_SHK: Tensor,
        k_SGK: Tensor,
        v_SGK: Tensor,
        out_SHK: Tensor,
        log_total: Tensor,
        kind: Kind,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values of one segment, each (H, S, K): of keys and values for every head."""
        scores_HSS, values_HSK, keys_HSK = _scores(q_SHK, k_SGK, v_SGK, kind)
        shares_HSS = torch.exp(scores_HSS - log_total)
        dout_HSK, out_HSK, q_HSK = (part.transpose(0, 1).to(shares_HSS.dtype) for part in (dout_SHK, out_SHK, q_SHK))
        dshares_HSS = dout_HSK @ values_HSK.transpose(1, 2)
        inner_HS1 = (dout_HSK * out_HSK).sum(-1, keepdim=True)
        dscores_HSS = shares_HSS * (dshares_HSS - inner_HS1) * kind.scale
        return dscores_HSS @ keys_HSK, dscores_HSS.transpose(1, 2) @ q_HSK, shares_HSS.transpose(1, 2) @ dout_HSK


class CpuAttention(ReferenceAttention):
    """PyTorch's FlashAttention for CPUs, segment by segment: what a row gives does not depend on what is packed beside
    it. A segment in which a window hides something is left to the reference."""

    name = "flash on the CPU"

    def forward_segment(self, q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, kind: Kind, out_SHK: Tensor) -> Tensor:
        if _hides(kind, q_SHK):
            return super().forward_segment(q_SHK, k_SGK, v_SGK, kind, out_SHK)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_by_head(q_SHK, k_SGK, v_SGK), 0.0, True, scale=kind.scale
        )
        out_SHK.copy_(found[0][0].transpose(0, 1))
        log_total: Tensor = found[1]
        return log_total

    def backward_segment(
        self,
        dout_SHK: Tensor,
        q_SHK: Tensor,
        k_SGK: Tensor,
        v_SGK: Tensor,
        out_SHK: Tensor,
        log_total: Tensor,
        kind: Kind,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if _hides(kind, q_SHK):
            return super().backward_segment(dout_SHK, q_SHK, k_SGK, v_SGK, out_SHK, log_total, kind)
        dout_1HSK, out_1HSK = (part.transpose(0, 1)[None] for part in (dout_SHK, out_SHK))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_1HSK, *_by_head(q_SHK, k_SGK, v_SGK), out_1HSK, log_total, 0.0, True, scale=kind.scale
        )
        dq_1HSK, dk_1HSK, dv_1HSK = found
        return dq_1HSK[0], dk_1HSK[0], dv_1HSK[0]


def _hides(kind: Kind, q_SHK: Tensor) -> bool:
    return kind.window is not None and q_SHK.shape[0] > kind.window


def _by_head(q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1, H, S, K) each: keys and values for every query head."""
    each = q_SHK.shape[1] // k_SGK.shape[1]
    k_HSK, v_HSK = (part.transpose(0, 1).repeat_interleave(each, dim=0) for part in (k_SGK, v_SGK))
    return q_SHK.transpose(0, 1)[None], k_HSK[None], v_HSK[None]


def _rows(segments: Segments) -> list[slice]:
    found, start = [], 0
    for length in segments.lengths:
        found.append(slice(start, start + length))
        start += length
    return found


def _scores(q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Masked scores, and values and keys for every query head."""
    wide = torch.promote_types(q_SHK.dtype, torch.float32)
    each = q_SHK.shape[1] // k_SGK.shape[1]
    q_HSK = q_SHK.transpose(0, 1).to(wide)
    k_HSK, v_HSK = (part.transpose(0, 1).to(wide).repeat_interleave(each, dim=0) for part in (k_SGK, v_SGK))
    scores_HSS = q_HSK @ k_HSK.transpose(1, 2) * kind.scale
    size = scores_HSS.shape[-1]
    ages_SS = torch.arange(size, device=q_SHK.device)[:, None] - torch.arange(size, device=q_SHK.device)[None, :]
    hidden_SS = ages_SS < 0
    if kind.window is not None:
        hidden_SS |= ages_SS >= kind.window
    return scores_HSS.masked_fill_(hidden_SS, float("-inf")), v_HSK, k_HSK


@dataclass(frozen=True)
class FlashAttention:
    """PyTorch's own FlashAttention-2 (Dao 2023) over segments."""

    name: str = "flash"

    def forward(
        self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, segments: Segments, kind: Kind, out_THK: Tensor
    ) -> tuple[Tensor, Tensor]:
        starts, longest, window = segments.starts_S1, segments.longest, kind.window_of(segments)
        found = torch.ops.aten._flash_attention_forward(
            q_THK, k_TGK, v_TGK, starts, starts, longest, longest, 0.0, True, False,
            scale=kind.scale,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )  # fmt: skip
        out_THK.copy_(found[0])
        return found[1], found[2]

    def backward(
        self,
        dout_THK: Tensor,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        out_THK: Tensor,
        kept: tuple[Tensor, Tensor],
        segments: Segments,
        kind: Kind,
        gradients: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        starts, longest, window = segments.starts_S1, segments.longest, kind.window_of(segments)
        log_totals, state = kept
        found = torch.ops.aten._flash_attention_backward(
            dout_THK, q_THK, k_TGK, v_TGK, out_THK.contiguous(), log_totals, starts, starts, longest, longest,
            0.0, True, state, torch.empty((), device=q_THK.device),
            scale=kind.scale,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )  # fmt: skip
        for gradient, computed in zip(gradients, found, strict=True):
            gradient.copy_(computed)
