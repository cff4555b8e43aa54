"""Rotary position embedding (Su et al. 2021) of queries and keys, in place; the inverse rotation is its gradient.

Shape legend: T tokens, H heads (queries', then keys'), K elements of a head, P positions of the table.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from thriftune.kernels.launch import next_power_of_two, runs_triton


def rope_(heads_THK: Tensor, cos_PC: Tensor, sin_PC: Tensor, positions_T: Tensor, inverse: bool) -> None:
    """Rotate `heads_THK` in place. C = K / 2: the tables hold each angle once; element c turns with element c + K/2.

    `heads_THK` may have any stride between tokens; heads and elements lie side by side.
    """
    if not runs_triton(heads_THK):
        rope_reference_(heads_THK, cos_PC, sin_PC, positions_T, inverse)
        return
    tokens, heads, size = heads_THK.shape
    half = size // 2
    at_once = min(next_power_of_two(heads), max(1, 4096 // next_power_of_two(half)))
    grid = (tokens, -(-heads // at_once))
    _kernels().rotate[grid](
        heads_THK, cos_PC, sin_PC, positions_T, heads_THK.stride(0), heads,
        HALF=half, BLOCK_HALF=next_power_of_two(half), HEADS=at_once, INVERSE=inverse, num_warps=4,
    )  # fmt: skip


def rope_reference_(heads_THK: Tensor, cos_PC: Tensor, sin_PC: Tensor, positions_T: Tensor, inverse: bool) -> None:
    wide = torch.promote_types(heads_THK.dtype, torch.float32)
    cos_T1C, sin_T1C = cos_PC[positions_T][:, None].to(wide), sin_PC[positions_T][:, None].to(wide)
    if inverse:
        sin_T1C = -sin_T1C
    first_THC, second_THC = heads_THK.to(wide).chunk(2, dim=-1)
    turned = (first_THC * cos_T1C - second_THC * sin_T1C, second_THC * cos_T1C + first_THC * sin_T1C)
    heads_THK.copy_(torch.cat(turned, dim=-1))


@functools.cache
def _kernels() -> Any:
    from thriftune.kernels import rope_triton

    return rope_triton
