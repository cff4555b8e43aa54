"""Differential privacy of a site's whole contribution: clipping, noise on the sum, and what it adds up to.

For the linear methods only, where the factor that trains enters the result linearly. Each site's change of that
factor, all matrices together, is cut to the norm C; Gaussian noise of standard deviation z C is added to the sum; the
sum is divided by the number of sites that there are, whether they answered or not (McMahan et al. 2018,
arXiv:1710.06963). Whoever sees the published adapters then learns little about any one site. The coordinator itself
sees the updates before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from thriftune.errors import InputError
from thriftune.federated.aggregate import Adapter, Factors, Half, Update
from thriftune.recipe import FederatedRecipe

BITS = 52  # with a half added they fill a float64's mantissa, so that neither 0 nor 1 comes out


def private_mean(
    current: Adapter, updates: Sequence[Update], half: Half, rounds: FederatedRecipe, sites: int
) -> dict[str, Factors]:
    """The current adapter moved by the noisy mean of the clipped changes, in float64. `rounds.clip_norm` is given."""
    clip_norm = float(rounds.clip_norm or 0.0)
    total = {name: torch.zeros_like(_trained(factors, half), dtype=torch.float64) for name, factors in current.items()}
    for update in updates:
        change = {
            name: _trained(factors, half).double() - _trained(current[name], half).double()
            for name, factors in update.adapter.items()
        }
        norm = math.sqrt(math.fsum(float(part.square().sum()) for part in change.values()))
        share = min(1.0, clip_norm / norm) if norm else 1.0
        for name, part in change.items():
            total[name] += share * part
    moved = {}
    for name, factors in current.items():
        noise = (
            rounds.noise_multiplier * clip_norm * secure_normal(total[name].shape) if rounds.noise_multiplier else 0.0
        )
        step = (total[name] + noise) / sites
        b_OR, a_RI = factors.b_OR.double(), factors.a_RI.double()
        moved[name] = Factors(b_OR + step, a_RI) if half == "b" else Factors(b_OR, a_RI + step)
    return moved


def secure_normal(shape: Sequence[int]) -> Tensor:
    """Standard normal numbers from the system's source of randomness, which no seed predicts; float64.

    By the inverse of the distribution function, so nothing lies beyond 8.2 standard deviations. Floating-point noise is
    not the real numbers' Gaussian (Mironov 2012): the last bits are no protection.
    """
    count = math.prod(shape)
    whole = torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64) if count else torch.zeros(0).long()
    uniform = ((whole & (2**BITS - 1)).double() + 0.5) / 2**BITS
    return torch.special.ndtri(uniform).view(*shape)


def epsilon_of(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Epsilon at `delta` after so many rounds in which every site takes part, for adding or removing one site, by Renyi
    accounting. Infinite without noise. Raises InputError when the accountant is not installed."""
    if not noise_multiplier:
        return math.inf
    try:
        from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
        from dp_accounting.rdp import RdpAccountant
    except ImportError:
        raise InputError(
            given="federated.noise_multiplier, and the package dp-accounting is not installed",
            allowed="noise whose privacy loss can be stated",
            do="install it: pip install 'thriftune[federated]'",
        ) from None
    accountant = RdpAccountant()
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(noise_multiplier), rounds))
    return float(accountant.get_epsilon(delta))


def loss_of(rounds: FederatedRecipe) -> float | None:
    """Epsilon of a whole federation; None without `clip_norm`. Raises InputError as `epsilon_of` does."""
    return None if rounds.clip_norm is None else epsilon_of(rounds.noise_multiplier, rounds.rounds, rounds.delta)


def _trained(factors: Factors, half: Half) -> Tensor:
    return factors.a_RI if half == "a" else factors.b_OR
