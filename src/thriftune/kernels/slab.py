"""All 4-bit matrices of a layer side by side in one slab of bytes: one copy moves them, views of it are the matrices.

Layout, matrix after matrix in the order given: two weights a byte, row after row; a scale for each block (a byte with
double quantisation, else a float32); with double quantisation the scales' own float32 scales and one float32 offset.
Each of these starts at a multiple of `ALIGNMENT` bytes, numbers are little-endian, gaps are zero, and the slab's length
is a multiple of `PAGE`. The tables that bytes are looked up in are the same for all matrices and are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thriftune.kernels.four_bit import FourBit

ALIGNMENT = 256
PAGE = 4096
SCALE_BLOCK = 256  # scales that share one of theirs


@dataclass(frozen=True, slots=True)
class Matrix:
    """Which linear of its layer it is, and its sizes."""

    name: str
    rows: int
    columns: int

    @property
    def weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Tables:
    """What bytes mean: the sixteen values of a weight, and those of a scale where scales are quantised too."""

    values: Tensor
    scale_values: Tensor | None

    def to(self, device: torch.device) -> Tables:
        scale_values = self.scale_values.to(device) if self.scale_values is not None else None
        return Tables(self.values.to(device), scale_values)


@dataclass(frozen=True, slots=True)
class SlabLayout:
    """`block` weights share a scale; `nested` says that scales are quantised too."""

    matrices: tuple[Matrix, ...]
    block: int
    nested: bool

    @property
    def bytes(self) -> int:
        end = 0
        for matrix in self.matrices:
            end = _after(end, self._sizes(matrix))
        return -(-end // PAGE) * PAGE

    def views(self, slab: Tensor, tables: Tables) -> list[FourBit]:
        """The matrices of a slab of uint8, on whatever device it lies; nothing is copied."""
        found, start = [], 0
        for matrix in self.matrices:
            sizes = self._sizes(matrix)
            fields = _cut(slab, start, sizes)
            start = _after(start, sizes)
            found.append(
                FourBit(
                    packed=fields[0],
                    values=tables.values,
                    block=self.block,
                    rows=matrix.rows,
                    columns=matrix.columns,
                    scales=fields[1] if self.nested else fields[1].view(torch.float32),
                    scale_values=tables.scale_values,
                    scale_scales=fields[2].view(torch.float32) if self.nested else None,
                    scale_block=SCALE_BLOCK if self.nested else 1,
                    scale_offset=fields[3].view(torch.float32)[0] if self.nested else None,
                )
            )
        return found

    def write(self, slab: Tensor, place: int, weight: FourBit) -> None:
        """Copy a matrix into its place, the `place`-th of the layout, from whatever device it is on."""
        view = self.views(slab, Tables(weight.values, weight.scale_values))[place]
        assert (weight.rows, weight.columns, weight.block) == (view.rows, view.columns, view.block)
        view.packed.copy_(weight.packed.flatten())
        view.scales.copy_(weight.scales)
        if self.nested:
            assert view.scale_scales is not None and view.scale_offset is not None
            assert weight.scale_scales is not None and weight.scale_offset is not None
            view.scale_scales.copy_(weight.scale_scales)
            view.scale_offset.copy_(weight.scale_offset)

    def _sizes(self, matrix: Matrix) -> list[int]:
        """Bytes of each field of a matrix."""
        blocks = -(-matrix.weights // self.block)
        packed = -(-matrix.weights // 2)
        if not self.nested:
            return [packed, 4 * blocks]
        return [packed, blocks, 4 * -(-blocks // SCALE_BLOCK), 4]


def _after(start: int, sizes: Sequence[int]) -> int:
    return start + sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _cut(slab: Tensor, start: int, sizes: Sequence[int]) -> list[Tensor]:
    found = []
    for size in sizes:
        found.append(slab[start : start + size])
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return found
