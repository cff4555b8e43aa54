"""lowrank_svd against torch's decomposition of the dense product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thriftune.lowrank import lowrank_svd

SHAPES = [(48, 20, 6), (20, 48, 6), (7, 5, 7), (5, 9, 13), (33, 1, 4), (1, 1, 1)]  # out, in, rank


def factors(size_out: int, size_in: int, rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size_out * 1000 + size_in * 10 + rank)
    b_OR = torch.randn(size_out, rank, generator=generator, dtype=torch.float64)
    a_RI = torch.randn(rank, size_in, generator=generator, dtype=torch.float64)
    return b_OR.to(dtype), a_RI.to(dtype)


def check(b_OR: Tensor, a_RI: Tensor, tolerance: float) -> None:
    found = lowrank_svd(b_OR, a_RI)
    dense_OI = b_OR @ a_RI
    kept = min(*dense_OI.shape, b_OR.shape[1])
    assert found.left_OR.shape == (b_OR.shape[0], kept)
    assert found.right_RI.shape == (kept, a_RI.shape[1])
    assert found.left_OR.dtype == found.values_R.dtype == found.right_RI.dtype == b_OR.dtype
    scale = max(1.0, float(dense_OI.abs().max()) if dense_OI.numel() else 0.0)
    difference = (found.left_OR * found.values_R) @ found.right_RI - dense_OI
    assert float(difference.abs().max()) <= tolerance * scale
    expected = torch.linalg.svdvals(dense_OI)[:kept]
    assert torch.allclose(found.values_R, expected, atol=tolerance * scale, rtol=0)
    assert bool((found.values_R.diff() <= 0).all())
    identity = torch.eye(kept, dtype=b_OR.dtype)
    assert torch.allclose(found.left_OR.T @ found.left_OR, identity, atol=tolerance)
    assert torch.allclose(found.right_RI @ found.right_RI.T, identity, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_decomposition(shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    check(*factors(*shape, dtype), tolerance)


def test_of_factors_that_lack_rank() -> None:
    b_OR, a_RI = factors(40, 24, 8)
    b_OR[:, 5:] = b_OR[:, :3] * 2
    a_RI[6:] = 0
    check(b_OR, a_RI, 1e-12)
    assert int((lowrank_svd(b_OR, a_RI).values_R > 1e-10).sum()) == 5


def test_of_a_zero_product() -> None:
    """A fresh adapter: B is zero."""
    _, a_RI = factors(40, 24, 8)
    check(torch.zeros(40, 8, dtype=torch.float64), a_RI, 1e-12)


def test_of_no_rank_at_all() -> None:
    found = lowrank_svd(torch.zeros(4, 0), torch.zeros(0, 3))
    assert [*found.left_OR.shape, *found.values_R.shape, *found.right_RI.shape] == [4, 0, 0, 0, 3]


def test_never_forms_the_dense_product() -> None:
    """A product of 4 TB: its factors are 16 MB."""
    found = lowrank_svd(torch.ones(1_000_000, 2), torch.ones(2, 1_000_000))
    assert found.values_R[0] == pytest.approx(2e6, rel=1e-4)


@pytest.mark.parametrize(
    ("b_OR", "a_RI"),
    [
        (torch.zeros(4, 3), torch.zeros(2, 5)),
        (torch.zeros(4, 3), torch.zeros(3, 5, dtype=torch.float64)),
        (torch.zeros(2, 4, 3), torch.zeros(3, 5)),
    ],
)
def test_factors_that_do_not_belong_together_are_refused(b_OR: Tensor, a_RI: Tensor) -> None:
    with pytest.raises(ValueError, match="out x rank and rank x in"):
        lowrank_svd(b_OR, a_RI)
