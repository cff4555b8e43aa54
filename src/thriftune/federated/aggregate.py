"""The sites' updates made one: pure functions of factors. A matrix's update is scale * B A, the same scale everywhere.

`svd` (default) is the exact weighted mean of the updates, held as stacked factors and cut to the global rank by its
singular values, whose squares are its energy (Bai et al. 2024, FlexLoRA, arXiv:2402.11505, without the dense product).
A site of rank r_k trains a part of at most r_k components, ceil(R / r_k) parts in turn, beside the frozen others (as
FedRolex has a small site train a rolling part of a network, Alam et al. 2022, arXiv:2212.01548). Its update is B_k A_k
in the place of the product B_p A_p of its part before:

    B A + sum_k w_k (B_k A_k - B_p A_p)  =  [w_1 B_1 ... w_K B_K  B u] [A_1 ; ... ; A_K ; A]

with u = 1 - sum_k w_k over the sites whose part has the component (docs/decisions/0017). `fedit` averages A and B by
themselves (Zhang et al. 2023, arXiv:2305.05644), which is not the mean of the updates. Where all sites share one of the
factors it is: `ffa` never trains A (Sun et al. 2024, arXiv:2403.12313), `rolora` trains B and A in turn (Chen et al.
2025, arXiv:2502.01755).

Shape legend: O out, I in, R global rank, r components of a part, S rank of a stack, K values of a decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from thriftune.lowrank import lowrank_svd

Half = Literal["both", "b", "a"]
MIXED_RANKS = ("svd", "fedit")  # the others are exact at equal ranks only
NEGLIGIBLE = 1e-4  # share of the mean's energy, in its weakest components, that is given up for room to train
LEAST_ROW = 0.1  # of the mean norm of A's rows: none becomes shorter, so that its column of B can train


@dataclass(frozen=True)
class Factors:
    """One matrix's update, `b @ a` before scaling. Rank r is the columns of b and the rows of a."""

    b_OR: Tensor  # noqa: N815
    a_RI: Tensor  # noqa: N815

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    def between(self, first: int, end: int) -> Factors:
        return Factors(self.b_OR[:, first:end], self.a_RI[first:end])


Adapter = Mapping[str, Factors]  # by the name of the module that carries it


@dataclass(frozen=True)
class Update:
    """What a site sends after a round: the components from `first` on. `weight` is its share in the mean before the
    weights are made to sum to one."""

    site: str
    weight: float
    adapter: Adapter
    first: int = 0


@dataclass(frozen=True)
class Refused:
    site: str
    reason: str


@dataclass(frozen=True)
class Aggregate:
    """`energy_kept` is the share of the exact mean's squared norm, over all matrices, that was kept when it was cut;
    None where nothing was cut: no `svd`, a single full update, a mean of zero."""

    adapter: dict[str, Factors]
    energy_kept: float | None


def trained_half(aggregation: str, round_number: int) -> Half:
    """Which factors sites train and send in a round, counted from 0. With B = 0 at the start, B has to be first."""
    if aggregation == "ffa":
        return "b"
    if aggregation == "rolora":
        return "b" if round_number % 2 == 0 else "a"
    return "both"


def parts_of(aggregation: str, rank: int, whole: int) -> list[tuple[int, int]]:
    """The parts, (first, end) of nearly equal size, that a site of this rank trains in turn. `fedit` is the way it is
    known: always the first components."""
    if aggregation != "svd":
        return [(0, rank)]
    number = math.ceil(whole / rank)
    return [(part * whole // number, (part + 1) * whole // number) for part in range(number)]


def aggregate(aggregation: str, current: Adapter, updates: Sequence[Update]) -> Aggregate:
    """The next global adapter, in float64, of the current one's rank. Raises ValueError without an update."""
    if not updates:
        raise ValueError("a mean of no updates")
    total = math.fsum(update.weight for update in updates)
    merge = _svd if aggregation == "svd" else _mean_of_factors
    adapter, kept, whole = {}, 0.0, 0.0
    for name, now in current.items():
        shares = [Share(_in_full(update.adapter[name]), update.first, update.weight / total) for update in updates]
        adapter[name], kept_here, whole_here = merge(_in_full(now), shares)
        kept, whole = kept + kept_here, whole + whole_here
    return Aggregate(adapter, kept / whole if whole else None)


@dataclass(frozen=True)
class Share:
    """One site's part of one matrix: the components from `first` on, and its weight (all sum to one)."""

    factors: Factors
    first: int
    weight: float

    @property
    def end(self) -> int:
        return self.first + self.factors.rank


def stacked_mean(current: Factors, shares: Sequence[Share]) -> Factors:
    """The exact mean of the updates as one pair of factors of rank S = R plus all parts' r (the module's formula)."""
    left_R = torch.ones(current.rank, dtype=current.a_RI.dtype)
    for share in shares:
        left_R[share.first : share.end] -= share.weight
    left_OS = torch.cat([*(share.factors.b_OR * share.weight for share in shares), current.b_OR * left_R], dim=1)
    return Factors(left_OS, torch.cat([*(share.factors.a_RI for share in shares), current.a_RI]))


def truncated(stack: Factors, rank: int, near_RI: Tensor) -> tuple[Factors, float, float]:
    """(the best approximation of rank `rank`, less its NEGLIGIBLE part; its squared norm; the stack's).

    Of all factors with that product those are taken whose A is what `near_RI` has in the directions of the product, so
    the sites' optimizers go on in the coordinates they know: where the factors that `near_RI` belongs to have that very
    product, they come back. Directions of `near_RI` that the product does not use yet stay in A, with B = 0.
    """
    found = lowrank_svd(stack.b_OR, stack.a_RI)
    energy_K = found.values_R.square()
    kept = min(rank, len(energy_K))
    live = min(kept, 1 + int((energy_K.cumsum(0) < (1.0 - NEGLIGIBLE) * energy_K.sum()).sum()))
    right_KI = torch.cat([found.right_RI[:live], _unused_directions(near_RI, found.right_RI[:live], kept - live)])
    left_OK = found.left_OR[:, :kept] * found.values_R[:kept]
    left_OK[:, live:] = 0.0
    turned_KK, sizes_K, onto_KK = torch.linalg.svd(near_RI[:kept] @ right_KI.T)
    sizes_K = sizes_K.clamp(min=LEAST_ROW * float(near_RI.square().sum(1).mean().sqrt()) or 1.0)
    b_OR, a_RI = left_OK.new_zeros(left_OK.shape[0], rank), near_RI.clone()
    b_OR[:, :kept] = left_OK @ onto_KK.T / sizes_K @ turned_KK.T
    a_RI[:kept] = turned_KK * sizes_K @ onto_KK @ right_KI
    return Factors(b_OR, a_RI), float(energy_K[:live].sum()), float(energy_K.sum())


def change_norm(current: Adapter, update: Update, scale: float) -> float:
    """Norm of what a site changed, scale * (B_k A_k - B A) over all matrices, B A the components that it trained."""
    squared = 0.0
    for name, factors in update.adapter.items():
        now = _in_full(current[name].between(update.first, update.first + factors.rank))
        new = _in_full(factors)
        left_OS, right_SI = torch.cat([new.b_OR, -now.b_OR], dim=1), torch.cat([new.a_RI, now.a_RI])
        squared += float(((left_OS.T @ left_OS) * (right_SI @ right_SI.T)).sum())
    return scale * math.sqrt(max(squared, 0.0))


def refuse_unusable(
    current: Adapter, updates: Sequence[Update], scale: float, largest: float, history: Sequence[float]
) -> tuple[list[Update], list[Refused], list[float]]:
    """(updates to take, those refused and why, the norms of the changes taken).

    Refused are values that are not finite, and a change more than `largest` times the median of this round's changes
    and of those taken before (`history`). With two sites and no history nothing can be called outsized.
    """
    finite = [update for update in updates if _is_finite(update)]
    refused = [
        Refused(update.site, f"the update of site {update.site} has values that are not finite")
        for update in updates
        if not _is_finite(update)
    ]
    norms = {update.site: change_norm(current, update, scale) for update in finite}
    usual = median([*norms.values(), *history]) if finite else 0.0
    taken = []
    for update in finite:
        norm = norms[update.site]
        if norm > largest * usual:
            reason = (
                f"site {update.site} changed the model by {norm:.3g}, more than {largest:g} times the usual {usual:.3g}"
            )
            refused.append(Refused(update.site, reason))
        else:
            taken.append(update)
    return taken, refused, [norms[update.site] for update in taken]


def _svd(current: Factors, shares: Sequence[Share]) -> tuple[Factors, float, float]:
    if len(shares) == 1 and shares[0].factors.rank == current.rank:
        return shares[0].factors, 0.0, 0.0  # the mean of one is itself, to the bit
    near_RI = current.a_RI.clone()
    for share in shares:
        part = slice(share.first, share.end)
        near_RI[part] += share.weight * (share.factors.a_RI - current.a_RI[part])
    return truncated(stacked_mean(current, shares), current.rank, near_RI)


def _mean_of_factors(current: Factors, shares: Sequence[Share]) -> tuple[Factors, float, float]:
    """Smaller ranks are filled with zeros, as FedIT's users do."""
    b_OR, a_RI = torch.zeros_like(current.b_OR), torch.zeros_like(current.a_RI)
    for share in shares:
        b_OR[:, share.first : share.end] += share.factors.b_OR * share.weight
        a_RI[share.first : share.end] += share.factors.a_RI * share.weight
    return Factors(b_OR, a_RI), 0.0, 0.0


def _unused_directions(near_RI: Tensor, used_KI: Tensor, count: int) -> Tensor:
    """Where the rows of `near_RI` reach furthest beyond the directions in use: for components that are still zero."""
    _, _, directions = torch.linalg.svd(near_RI - near_RI @ used_KI.T @ used_KI, full_matrices=False)
    return directions[:count]


def _in_full(factors: Factors) -> Factors:
    return Factors(factors.b_OR.double(), factors.a_RI.double())


def _is_finite(update: Update) -> bool:
    return math.isfinite(update.weight) and all(
        bool(torch.isfinite(factors.b_OR).all() and torch.isfinite(factors.a_RI).all())
        for factors in update.adapter.values()
    )
