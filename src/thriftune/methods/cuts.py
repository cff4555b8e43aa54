"""The mathematics of a cut: an adapter's factors in the basis of their product's singular directions, and which of all
modules' directions stay.

B A is the same function as (B G)(G^-1 A) for any invertible G, so a factor's rows mean nothing by themselves; the
singular directions of B A do (Eckart and Young 1936: keeping the largest is the nearest product of that rank). With
B A = (left * values) @ right the turned factors are

    B' = B G = left * values / d       G    = A right^T / d
    A' = G^- A = d right               G^-  = d right A^T (A A^T)^-1

of which a cut keeps some columns and rows. d is the mean norm of A's rows: A' is then as large as A was, and so is the
rate at which A and B learn.

Shape legend: O out, I in, R rank as it is, K directions, S directions that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from thriftune.lowrank import lowrank_svd


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
    """In float64, whatever the factors are: inverting A A^T squares its condition."""
    b_OR, a_RI = b_OR.double(), a_RI.double()
    found = lowrank_svd(b_OR, a_RI)
    norm = a_RI.norm(dim=1).mean()
    norm = norm if float(norm) > 0 else torch.ones_like(norm)
    across_KR = found.right_RI @ a_RI.T
    gram_RR = (a_RI @ a_RI.T).cpu()
    inverse_RR = torch.linalg.pinv(gram_RR, hermitian=True).to(a_RI.device)
    return Turned(found.values_R.cpu(), across_KR.T / norm, norm * (across_KR @ inverse_RR))


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
