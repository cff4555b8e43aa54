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
        kept = []
        for rows in _rows(segments):
            scores_HSS, values_HSK, _ = _scores(q_THK[rows], k_TGK[rows], v_TGK[rows], kind)
            log_total_HS1 = torch.logsumexp(scores_HSS, dim=-1, keepdim=True)
            shares_HSS = torch.exp(scores_HSS - log_total_HS1)
            out_THK[rows] = (shares_HSS @ values_HSK).transpose(0, 1).to(out_THK.dtype)
            kept.append(log_total_HS1)
        return kept

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
        dq_THK, dk_TGK, dv_TGK = gradients
        groups = k_TGK.shape[1]
        for rows, log_total_HS1 in zip(_rows(segments), kept, strict=True):
            scores_HSS, values_HSK, keys_HSK = _scores(q_THK[rows], k_TGK[rows], v_TGK[rows], kind)
            shares_HSS = torch.exp(scores_HSS - log_total_HS1)
            dout_HSK = dout_THK[rows].transpose(0, 1).to(shares_HSS.dtype)
            out_HSK = out_THK[rows].transpose(0, 1).to(shares_HSS.dtype)
            dshares_HSS = dout_HSK @ values_HSK.transpose(1, 2)
            inner_HS1 = (dout_HSK * out_HSK).sum(-1, keepdim=True)
            dscores_HSS = shares_HSS * (dshares_HSS - inner_HS1) * kind.scale
            q_HSK = q_THK[rows].transpose(0, 1).to(shares_HSS.dtype)
            dq_THK[rows] = (dscores_HSS @ keys_HSK).transpose(0, 1).to(dq_THK.dtype)
            for gradient_TGK, by_head_HSK in (
                (dk_TGK, dscores_HSS.transpose(1, 2) @ q_HSK),
                (dv_TGK, shares_HSS.transpose(1, 2) @ dout_HSK),
            ):
                summed_GSK = by_head_HSK.unflatten(0, (groups, -1)).sum(1)
                gradient_TGK[rows] = summed_GSK.transpose(0, 1).to(gradient_TGK.dtype)


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
