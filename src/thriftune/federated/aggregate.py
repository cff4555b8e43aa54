"""The sites' updates made one: pure functions of factors. A matrix's update is scale * B A, the same scale everywhere.

`svd` (default) is the exact weighted mean of the updates, sum_k w_k B_k A_k, held as stacked factors

    [w_1 B_1 ... w_K B_K] [A_1 ; ... ; A_K]

and cut to the global rank by its singular values, whose squares are its energy (Bai et al. 2024, FlexLoRA,
arXiv:2402.11505, without the dense product). A site of rank r_k trains the first r_k components of the global adapter
beside the frozen others, so its update is B_k A_k plus the others' product, and the others enter the stack as well,
each with the weight of the sites that did not train it. `fedit` averages A and B by themselves (Zhang et al. 2023,
arXiv:2305.05644), which is not the mean of the updates. Where all sites share one of the factors it is: `ffa` never
trains A (Sun et al. 2024, arXiv:2403.12313), `rolora` trains B and A in turn (Chen et al. 2025, arXiv:2502.01755).

Shape legend: O out, I in, R global rank, r a site's rank, S rank of a stack, K values of a decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from thriftune.lowrank import lowrank_svd

Half = Literal["both", "b", "a"]
MIXED_RANKS = ("svd", "fedit")  # the others are exact at equal ranks only
NEGLIGIBLE = 1e-4  # share of the mean's energy, in its weakest components, that is given up for room to train


@dataclass(frozen=True)
class Factors:
    """One matrix's update, `b @ a` before scaling. Rank r is the columns of b and the rows of a."""

    b_OR: Tensor  # noqa: N815
    a_RI: Tensor  # noqa: N815

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    def top(self, rank: int) -> Factors:
        return Factors(self.b_OR[:, :rank], self.a_RI[:rank])


Adapter = Mapping[str, Factors]  # by the name of the module that carries it


@dataclass(frozen=True)
class Update:
    """What a site sends after a round. `weight` is its share in the mean before the weights are made to sum to one."""

    site: str
    weight: float
    adapter: Adapter


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


def aggregate(aggregation: str, current: Adapter, updates: Sequence[Update]) -> Aggregate:
    """The next global adapter, in float64, of the current one's rank. Raises ValueError without an update."""
    if not updates:
        raise ValueError("a mean of no updates")
    total = math.fsum(update.weight for update in updates)
    weights = [update.weight / total for update in updates]
    merge = _svd if aggregation == "svd" else _mean_of_factors
    adapter, kept, whole = {}, 0.0, 0.0
    for name, now in current.items():
        parts = [_in_full(update.adapter[name]) for update in updates]
        adapter[name], kept_here, whole_here = merge(_in_full(now), parts, weights)
        kept, whole = kept + kept_here, whole + whole_here
    return Aggregate(adapter, kept / whole if whole else None)


def stacked_mean(current: Factors, parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The exact weighted mean of the sites' updates as one pair of factors of rank S = sum of the r_k, plus R for the
    components that some sites did not train."""
    untrained_R = torch.zeros(current.rank, dtype=current.a_RI.dtype)
    for part, weight in zip(parts, weights, strict=True):
        untrained_R[part.rank :] += weight
    left_OS = torch.cat(
        [*(part.b_OR * weight for part, weight in zip(parts, weights, strict=True)), current.b_OR * untrained_R], dim=1
    )
    return Factors(left_OS, torch.cat([*(part.a_RI for part in parts), current.a_RI]))


def truncated(stack: Factors, rank: int, near_RI: Tensor, ends: Sequence[int]) -> tuple[Factors, float, float]:
    """(the best approximation of rank `rank`, less its NEGLIGIBLE part; its squared norm; the stack's). Components fall
    in energy from one block to the next; blocks end at `ends`, the ranks that sites have.

    All rows of the new A have the norm that the rows of `near_RI` have on the average, so that each component is as
    easy to train as at the start, and within a block they are turned towards `near_RI`: the sites' optimizers go on in
    about the coordinates they know. Neither changes the product.
    """
    found = lowrank_svd(stack.b_OR, stack.a_RI)
    energy_K = found.values_R.square()
    kept = min(rank, len(energy_K))
    live = min(kept, 1 + int((energy_K.cumsum(0) < (1.0 - NEGLIGIBLE) * energy_K.sum()).sum()))
    row_norm = float(near_RI.square().sum(1).mean().sqrt()) or 1.0
    right_KI = torch.cat([found.right_RI[:live], _unused_directions(near_RI, found.right_RI[:live], kept - live)])
    right_KI *= row_norm
    left_OK = found.left_OR[:, :kept] * found.values_R[:kept] / row_norm
    left_OK[:, live:] = 0.0
    for first, end in _blocks(ends, kept):
        turned, _, onto = torch.linalg.svd(near_RI[first:end] @ right_KI[first:end].T)
        turn = turned @ onto
        right_KI[first:end] = turn @ right_KI[first:end]
        left_OK[:, first:end] = left_OK[:, first:end] @ turn.T
    b_OR, a_RI = left_OK.new_zeros(left_OK.shape[0], rank), near_RI.clone()
    b_OR[:, :kept], a_RI[:kept] = left_OK, right_KI
    return Factors(b_OR, a_RI), float(energy_K[:live].sum()), float(energy_K.sum())


def change_norm(current: Adapter, update: Update, scale: float) -> float:
    """Norm of what a site changed, scale * (B_k A_k - B A) over all matrices, B A the components that it trained."""
    squared = 0.0
    for name, factors in update.adapter.items():
        now, new = _in_full(current[name].top(factors.rank)), _in_full(factors)
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


def _svd(current: Factors, parts: Sequence[Factors], weights: Sequence[float]) -> tuple[Factors, float, float]:
    if len(parts) == 1 and parts[0].rank == current.rank:
        return parts[0], 0.0, 0.0  # the mean of one is itself, to the bit
    near_RI = _padded_mean([part.a_RI for part in parts], weights, current.a_RI)
    return truncated(stacked_mean(current, parts, weights), current.rank, near_RI, [part.rank for part in parts])


def _mean_of_factors(
    current: Factors, parts: Sequence[Factors], weights: Sequence[float]
) -> tuple[Factors, float, float]:
    """Smaller ranks are filled with zeros, as FedIT's users do."""
    b_OR, a_RI = torch.zeros_like(current.b_OR), torch.zeros_like(current.a_RI)
    for part, weight in zip(parts, weights, strict=True):
        b_OR[:, : part.rank] += part.b_OR * weight
        a_RI[: part.rank] += part.a_RI * weight
    return Factors(b_OR, a_RI), 0.0, 0.0


def _padded_mean(parts_rI: Sequence[Tensor], weights: Sequence[float], current_RI: Tensor) -> Tensor:
    """The weighted mean of the sites' A, the current one's rows standing in where a site has none."""
    mean_RI = torch.zeros_like(current_RI)
    for part_rI, weight in zip(parts_rI, weights, strict=True):
        mean_RI += torch.cat([part_rI, current_RI[len(part_rI) :]]) * weight
    return mean_RI


def _unused_directions(near_RI: Tensor, used_KI: Tensor, count: int) -> Tensor:
    """Where the rows of `near_RI` reach furthest beyond the directions in use: for components that are still zero."""
    _, _, directions = torch.linalg.svd(near_RI - near_RI @ used_KI.T @ used_KI, full_matrices=False)
    return directions[:count]


def _blocks(ends: Sequence[int], size: int) -> list[tuple[int, int]]:
    edges = sorted({0, size, *(end for end in ends if end < size)})
    return list(pairwise(edges))


def _in_full(factors: Factors) -> Factors:
    return Factors(factors.b_OR.double(), factors.a_RI.double())


def _is_finite(update: Update) -> bool:
    return math.isfinite(update.weight) and all(
        bool(torch.isfinite(factors.b_OR).all() and torch.isfinite(factors.a_RI).all())
        for factors in update.adapter.values()
    )
