"""Many small matrices times a factor each, copied into strided places of another type: one launch for all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thriftune.kernels.launch import runs_triton

BLOCK = 4096


@dataclass(frozen=True)
class Copy:
    """`place` = `factor` * `source`; both keep their memory as long as the copy is in use. Sources are contiguous."""

    source: Tensor
    place: Tensor
    factor: float


class Copies:
    """A list of copies, to be made again and again; all sources are of one type, and all places."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = list(copies)
        self._table: tuple[Tensor, Tensor] | None = None

    def __call__(self) -> None:
        if not self._copies:
            return
        first = self._copies[0]
        if not first.source.is_cuda or not runs_triton(first.place):
            with torch.no_grad():
                for copy in self._copies:
                    torch.mul(copy.source, copy.factor, out=copy.place)
            return
        if self._table is None:
            self._table = self._make_table(first.source.device)
        numbers, factors = self._table
        blocks = -(-max(copy.source.numel() for copy in self._copies) // BLOCK)
        _kernels().copy_all[(len(self._copies), blocks)](numbers, factors, first.source, first.place, BLOCK=BLOCK)

    def _make_table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        rows = [
            [copy.source.data_ptr(), copy.place.data_ptr(), copy.source.numel(), copy.source.shape[1],
             copy.place.stride(0)]
            for copy in self._copies
        ]  # fmt: skip
        factors = torch.tensor([copy.factor for copy in self._copies], dtype=torch.float32)
        return torch.tensor(rows, dtype=torch.int64).to(device), factors.to(device)


@functools.cache
def _kernels() -> Any:
    from thriftune.kernels import copies_triton

    return copies_triton
