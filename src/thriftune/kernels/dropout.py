"""Dropout of an adapter's input (Srivastava et al. 2014), whose masks are drawn anew wherever one is needed and never
stored.

Whether an element is kept is a function of the step's key, the linear, the token's row of the data, its position there
and the column: Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), which passes
BigCrush, with the step as its key and the rest as its counter. A call gives eight columns 16 bits each: the low halves
of its four words, then the high ones, for the columns `place`, `place` + E, `place` + 2 E ... where E is I / 8 rounded
up. An element stays where its 16 bits are below the threshold 65536 (1 - rate), rounded, and is multiplied by
65536 / threshold, so that the mean of what is kept is exactly that of the input.

Shape legend: T tokens, I elements of a row, E an eighth of them. Rows may lie apart (a stride), elements may not.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thriftune.kernels.launch import next_power_of_two, runs_triton

Key = tuple[int, int]
KEYS = 2**31  # each half of a key is below it
PARTS, RANGE = 8, 2**16  # columns of a call, and of how many values each gets one
LARGEST_BLOCK = 512
_WORD = 0xFFFFFFFF
_ROUNDS, _FACTORS, _RAISES = 10, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


@dataclass(frozen=True)
class Draw:
    """What the masks of a batch are drawn by: the step's key, each token's row of the data and its position in it
    (int64)."""

    key: Key
    rows_T: Tensor  # noqa: N815
    positions_T: Tensor  # noqa: N815


def drop(x_TI: Tensor, draw: Draw, linear: int, rate: float, out_TI: Tensor) -> None:
    """Write what dropout leaves of the input of the linear of this number into `out_TI` (may be `x_TI` itself)."""
    _apply(x_TI, draw, linear, rate, out_TI, add=False)


def add_dropped(x_TI: Tensor, draw: Draw, linear: int, rate: float, out_TI: Tensor) -> None:
    """Add to `out_TI` what the same mask and factor leave of `x_TI`: the gradient of an input from that of its rest."""
    _apply(x_TI, draw, linear, rate, out_TI, add=True)


def threshold_and_factor(rate: float) -> tuple[int, float]:
    """Below which of `RANGE` values an element stays, and what it is multiplied by."""
    threshold = max(1, round((1 - rate) * RANGE))
    return threshold, RANGE / threshold


def _apply(x_TI: Tensor, draw: Draw, linear: int, rate: float, out_TI: Tensor, add: bool) -> None:
    if not runs_triton(x_TI):
        apply_reference(x_TI, draw, linear, rate, out_TI, add)
        return
    tokens, size = x_TI.shape
    eighth, (threshold, factor) = -(-size // PARTS), threshold_and_factor(rate)
    block = min(LARGEST_BLOCK, next_power_of_two(eighth))
    _kernels().apply[(tokens, -(-eighth // block))](
        x_TI, out_TI, draw.rows_T, draw.positions_T, x_TI.stride(0), out_TI.stride(0), size, eighth,
        *draw.key, linear, threshold, factor, ADD=add, BLOCK=block, num_warps=4,
    )  # fmt: skip


def apply_reference(x_TI: Tensor, draw: Draw, linear: int, rate: float, out_TI: Tensor, add: bool) -> None:
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    _, factor = threshold_and_factor(rate)
    left_TI = torch.where(kept_reference(draw, linear, rate, x_TI.shape[1]), x_TI.to(wide) * factor, 0.0)
    out_TI.copy_(out_TI.to(wide) + left_TI if add else left_TI)


def kept_reference(draw: Draw, linear: int, rate: float, size: int) -> Tensor:
    """Which elements of the linear's input stay, T x I."""
    places_E = torch.arange(-(-size // PARTS), device=draw.rows_T.device)
    of_tokens = (draw.positions_T[:, None], draw.rows_T[:, None])
    words = _philox((places_E[None], *of_tokens, torch.full_like(places_E, linear)), draw.key)
    bits_TI = torch.cat([word & (RANGE - 1) for word in words] + [word >> 16 for word in words], dim=1)[:, :size]
    return bits_TI < threshold_and_factor(rate)[0]


def _philox(counter: tuple[Tensor, ...], key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits for each counter, in int64; products wrap around there as they do without a sign."""
    zero, one, two, three = (part & _WORD for part in counter)
    first, second = key
    for _ in range(_ROUNDS):
        of_zero, of_two = zero * _FACTORS[0], two * _FACTORS[1]
        zero, two = ((of_two >> 32) & _WORD) ^ one ^ first, ((of_zero >> 32) & _WORD) ^ three ^ second
        one, three = of_two & _WORD, of_zero & _WORD
        first, second = (first + _RAISES[0]) & _WORD, (second + _RAISES[1]) & _WORD
    return zero, one, two, three


@functools.cache
def _kernels() -> Any:
    from thriftune.kernels import dropout_triton

    return dropout_triton
