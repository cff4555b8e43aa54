"""The mathematics of a cut: an adapter's factors in the basis of their product's singular directions, and which of all
modules' directions stay.

B A is the same function as (B G)(G^- A) for any invertible G, so a factor's rows mean nothing by themselves; the
singular directions of B A do (Eckart and Young 1936: keeping the largest is the nearest product of that rank). With
A^T = Q R_a, B A = (left * values) @ right, right = V^T Q^T and a number d, the turned factors are

    B' = B G = left * values / d       G   = R_a^T V / d
    A' = G^- A = d right               G^- = d V^T R_a^-T

of which a cut keeps some columns and rows. d is the mean norm of A's rows: A' is then as large as A was, and so is the
rate at which A and B learn.

Q is never needed: R_a comes from A A^T = R_a^T R_a, and V and the squared values are the eigenpairs of R_a B^T B R_a^T.
So only R x R matrices are decomposed, in float64, where squaring costs nothing that float32 factors have; a cut of an
8B's 224 modules is then 448 of them. `thriftune.lowrank` has the decomposition itself, which tests compare with.

Shape legend: O out, I in, R rank as it is, K directions, S directions that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Turned:
    """A module's factors seen from the singular directions of their product: `b @ outward` and `inward @ a` are the
    turned factors. In float64; `values_K` on the CPU, falling."""

    values_K: Tensor  # noqa: N815
    outward_RK: Tensor  # noqa: N815
    inward_KR: Tensor  # noqa: N815

    def kept(self, directions: list[int]) -> tuple[Tensor, Tensor]:
        """The maps to the factors of these directions: b @ the first, the second @ a."""
        return self.outward_RK[:, directions], self.inward_KR[directions]


def turned(b_OR: Tensor, a_RI: Tensor) -> Turned:
    """K = min(O, I, R) directions. The small matrices are decomposed on the CPU, which is faster at them than a GPU."""
    count = min(b_OR.shape[0], *a_RI.shape)
    b_OR, a_RI = b_OR.double(), a_RI.double()
    of_b_RR, of_a_RR = (b_OR.T @ b_OR).cpu(), (a_RI @ a_RI.T).cpu()
    squares_R, basis_RR = torch.linalg.eigh(of_a_RR)
    tiny = squares_R.max() * squares_R.shape[0] * torch.finfo(torch.float64).eps
    roots_R1 = squares_R.clamp(min=0).sqrt()[:, None]
    inverse_R1 = torch.where(squares_R[:, None] > tiny, 1 / roots_R1, 0.0)
    upper_RR = roots_R1 * basis_RR.T
    squares_R, rotation_RR = torch.linalg.eigh(upper_RR @ of_b_RR @ upper_RR.T)
    values_K = squares_R.flip(0)[:count].clamp(min=0).sqrt()
    rotation_RK = rotation_RR.flip(1)[:, :count]
    norm = of_a_RR.diagonal().sqrt().mean()
    norm = norm if float(norm) > 0 else torch.ones_like(norm)
    device = a_RI.device
    return Turned(
        values_K,
        outward_RK=(upper_RR.T @ rotation_RK / norm).to(device),
        inward_KR=(norm * rotation_RK.T @ (inverse_R1 * basis_RR.T)).to(device),
    )


def energy(values_K: Tensor, size: int) -> Tensor:
    """What each direction is worth: its share of |B A|^2 for each of the `size` parameters that it takes."""
    return values_K.square() / size


def directions_to_keep(
    worth: Mapping[str, Tensor], sizes: Mapping[str, int], budget: int, block: int, least: int
) -> dict[str, list[int]]:
    """Which directions of each module stay, best first, pooled over all modules.

    Args:
        worth: of each direction of a module, a parameter; in any order.
        sizes: parameters that one direction of a module takes.
        budget: parameters that may stay in all.
        block: directions stay in blocks of so many, so that ranks are its multiples.
        least: directions that every module keeps, as far as it has them.

    The most valuable block comes first; one that no longer fits ends its module, and others go on.
    """
    order = {name: values.argsort(descending=True, stable=True).tolist() for name, values in worth.items()}
    kept = {name: directions[:least] for name, directions in order.items()}
    left = budget - sum(len(directions) * sizes[name] for name, directions in kept.items())
    waiting = []
    for name, directions in order.items():
        for start in range(0, len(directions), block):
            part = directions[max(start, least) : start + block]
            if part:
                waiting.append((float(worth[name][part].mean()), name, part))
    closed: set[str] = set()
    for _, name, part in sorted(waiting, key=lambda entry: -entry[0]):
        cost = len(part) * sizes[name]
        if name in closed or cost > left:
            closed.add(name)
            continue
        kept[name] = kept[name] + part
        left -= cost
    return kept
