"""PyTorch's FlashAttention for CPUs against the reference; a row's result does not depend on its neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thriftune.engine.attention import Attention, CpuAttention, Kind, ReferenceAttention
from thriftune.engine.packing import Segments

LENGTHS = (17, 1, 40, 5)


def segments_of(lengths: tuple[int, ...]) -> Segments:
    return Segments(lengths, torch.tensor([0, *lengths]).cumsum(0).int())


def drawn(heads: int, groups: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and a gradient of the result; queries lie apart, as in a stacked product."""
    draw, tokens = torch.Generator().manual_seed(1), sum(LENGTHS)
    wide = torch.randn(tokens, heads + 3, size, generator=draw, dtype=torch.float64).to(dtype)
    others = [
        torch.randn(tokens, count, size, generator=draw, dtype=torch.float64) for count in (groups, groups, heads)
    ]
    return [wide[:, 1 : heads + 1], *(part.to(dtype) for part in others)]


def results(attention: Attention, parts: list[Tensor], lengths: tuple[int, ...], kind: Kind) -> list[Tensor]:
    q_THK, k_TGK, v_TGK, dout_THK = parts
    out_THK = torch.full((q_THK.shape[0], q_THK.shape[1] + 1, q_THK.shape[2]), float("nan"), dtype=q_THK.dtype)[:, 1:]
    gradients = (torch.full_like(q_THK, float("nan")), torch.full_like(k_TGK, float("nan")), torch.empty_like(v_TGK))
    segments = segments_of(lengths)
    kept = attention.forward(q_THK, k_TGK, v_TGK, segments, kind, out_THK)
    attention.backward(dout_THK, q_THK, k_TGK, v_TGK, out_THK, kept, segments, kind, gradients)
    return [out_THK, *gradients]


@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("window", [None, 8, 40])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 16), (3, 3, 8), (4, 1, 100)])
def test_it_is_the_reference(heads, groups, size, window, dtype, off) -> None:
    parts, kind = drawn(heads, groups, size, dtype), Kind(0.3 * size**-0.5, window)
    found = results(CpuAttention(), parts, LENGTHS, kind)
    wanted = results(ReferenceAttention(), [part.double() for part in parts], LENGTHS, kind)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == dtype and float((ours.double() - theirs).norm() / theirs.norm()) < off


@pytest.mark.parametrize("window", [None, 8])
def test_a_row_gives_the_same_bits_alone_and_beside_others(window) -> None:
    parts, kind = drawn(4, 2, 16, torch.float32), Kind(0.25, window)
    together, start = results(CpuAttention(), parts, LENGTHS, kind), 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        alone = results(CpuAttention(), [part[rows] for part in parts], (length,), kind)
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[rows], part)
        start += length
