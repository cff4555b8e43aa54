"""The singular value decomposition of a product of two thin matrices, without forming the product.

B A (out x in, of rank at most R) is Qb (Rb Ra^T) Qa^T with B = Qb Rb and A^T = Qa Ra, two thin QR decompositions; the
core Rb Ra^T is at most R x R, and its decomposition U S V^T gives that of the product as (Qb U) S (Qa V)^T. This costs
(out + in) R^2 operations where the dense product would cost out * in * min(out, in) (Golub and Van Loan, Matrix
Computations, 4th edition, sections 5.2 and 8.6).

Shape legend: O out, I in, R rank of the factors as given, K = min(O, I, R).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """B A = (left * values) @ right. The columns of `left` and the rows of `right` are orthonormal, also where the
    values, which fall, are zero. There are K = min(O, I, R) of them."""

    left_OR: Tensor  # noqa: N815
    values_R: Tensor  # noqa: N815
    right_RI: Tensor  # noqa: N815


def lowrank_svd(b_OR: Tensor, a_RI: Tensor) -> LowRank:
    """The decomposition of b @ a, for any R, larger than O and I or zero. float32 or float64 in, the same out.

    The core is decomposed on the CPU, where matrices of its size take a tenth of a GPU's time. Raises ValueError for
    factors that do not belong together, and torch's error for values that are not finite.
    """
    if b_OR.ndim != 2 or a_RI.ndim != 2 or b_OR.shape[1] != a_RI.shape[0] or b_OR.dtype != a_RI.dtype:
        raise ValueError(
            f"b is {tuple(b_OR.shape)} of {b_OR.dtype} and a {tuple(a_RI.shape)} of {a_RI.dtype}; "
            "needed are out x rank and rank x in of one type"
        )
    orthonormal_OK, upper_b_KR = torch.linalg.qr(b_OR)
    orthonormal_IK, upper_a_KR = torch.linalg.qr(a_RI.T)
    core = (upper_b_KR @ upper_a_KR.T).cpu()
    left, values_K, right = torch.linalg.svd(core, full_matrices=False)
    device = b_OR.device
    return LowRank(
        left_OR=orthonormal_OK @ left.to(device),
        values_R=values_K.to(device),
        right_RI=right.to(device) @ orthonormal_IK.T,
    )
