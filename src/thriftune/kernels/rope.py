"""Rotary position embedding (Su et al. 2021) of queries and keys, from one place to another; the inverse rotation is
its gradient. Values come along unturned.

Shape legend: T tokens, H heads of queries, G of keys and of values, K elements of a head, P positions of the table.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from thriftune.kernels.launch import next_power_of_two, runs_triton

Heads = tuple[Tensor, Tensor, Tensor]  # queries (T, H, K), keys and values (T, G, K)


def turn(sources: Heads, targets: Heads, cos_PC: Tensor, sin_PC: Tensor, positions_T: Tensor, inverse: bool) -> None:
    """Write queries and keys turned, and values as they are, from `sources` to `targets`, each of which may be its
    source. C = K / 2: the tables hold each angle once; element c turns with element c + K/2.

    Tokens may lie apart in any of them; heads and elements lie side by side.
    """
    if not runs_triton(sources[0]):
        turn_reference(sources, targets, cos_PC, sin_PC, positions_T, inverse)
        return
    tokens, queries, size = sources[0].shape
    groups, half = sources[1].shape[1], size // 2
    at_once = min(next_power_of_two(queries), max(1, 2048 // next_power_of_two(half)))
    q_blocks, k_blocks = -(-queries // at_once), -(-groups // at_once)
    v_blocks = 0 if sources[2].data_ptr() == targets[2].data_ptr() else k_blocks
    _kernels().turn[(tokens, q_blocks + k_blocks + v_blocks)](
        *sources, *targets, cos_PC, sin_PC, positions_T,
        *(part.stride(0) for part in (*sources, *targets)), queries, groups, q_blocks, k_blocks,
        HALF=half, BLOCK_HALF=next_power_of_two(half), HEADS=at_once, INVERSE=inverse, num_warps=4,
    )  # fmt: skip


def turn_reference(
    sources: Heads, targets: Heads, cos_PC: Tensor, sin_PC: Tensor, positions_T: Tensor, inverse: bool
) -> None:
    wide = torch.promote_types(sources[0].dtype, torch.float32)
    cos_T1C, sin_T1C = cos_PC[positions_T][:, None].to(wide), sin_PC[positions_T][:, None].to(wide)
    if inverse:
        sin_T1C = -sin_T1C
    for source, target in zip(sources[:2], targets[:2], strict=True):
        first, second = source.to(wide).chunk(2, dim=-1)
        turned = (first * cos_T1C - second * sin_T1C, second * cos_T1C + first * sin_T1C)
        target.copy_(torch.cat(turned, dim=-1))
    targets[2].copy_(sources[2])


@functools.cache
def _kernels() -> Any:
    from thriftune.kernels import rope_triton

    return rope_triton
