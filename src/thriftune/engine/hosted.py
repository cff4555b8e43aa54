"""A program's slabs brought from where they are kept to where they stay: host memory, pinned, or the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from thriftune.engine.host_memory import PinnedBlock, check_host_memory, pinned_block
from thriftune.engine.lanes import lane_to
from thriftune.engine.program import Program
from thriftune.engine.residency import Streaming, new_slots
from thriftune.kernels.slab import SlabLayout, Tables

READERS = 8  # threads that read and check slabs, at most

Say = Callable[[str], None]


class Slabs(Protocol):
    """A store of slabs, by the number of their layer."""

    @property
    def layouts(self) -> list[SlabLayout]: ...

    def tables(self, device: torch.device) -> Tables: ...

    def read(self, index: int, slab: Tensor, say: Say) -> None:
        """Fill `slab`, in host memory. May be called from several threads, for different layers."""
        ...


@dataclass
class Hosted:
    """The blocks of pinned memory that hold slabs, one a layer, each of its slab's size."""

    slabs: Slabs
    device: torch.device
    say: Say
    blocks: dict[int, PinnedBlock] = field(default_factory=dict)

    def take(self, indices: Sequence[int]) -> dict[int, Tensor]:
        """The slabs of these layers in pinned memory. All of it is taken before anything is read."""
        sizes = {index: self.slabs.layouts[index].bytes for index in indices}
        what = f"the 4-bit weights of {len(sizes)} streamed layers"
        check_host_memory(sum(sizes.values()), what)
        for index, size in sizes.items():
            self.blocks[index] = pinned_block(size, self.device, what)
        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as readers:
            list(readers.map(lambda index: self.slabs.read(index, self.blocks[index].bytes, self.say), indices))
        return {index: self.blocks[index].bytes for index in indices}

    def put_on_device(self, indices: Sequence[int]) -> dict[int, Tensor]:
        """The slabs of these layers on the device, through one block of host memory."""
        if not indices:
            return {}
        layouts = self.slabs.layouts
        block = pinned_block(max(layouts[index].bytes for index in indices), self.device, "one layer's 4-bit weights")
        found = {}
        for index in indices:
            staged = block.bytes[: layouts[index].bytes]
            self.slabs.read(index, staged, self.say)
            found[index] = torch.empty(staged.shape, dtype=torch.uint8, device=self.device).copy_(staged)
        block.release()
        return found

    @property
    def bytes(self) -> int:
        return sum(block.bytes.numel() for block in self.blocks.values())


def stream(program: Program, hosted: Hosted, resident: Sequence[int], slots: int) -> Streaming:
    """Have `program` run with only these of its layers on the device, the others streamed through so many slots.

    Raises DoesNotFitError when host memory does not hold the others.
    """
    others = [index for index in range(len(program.layers)) if index not in set(resident)]
    layouts = hosted.slabs.layouts
    streamed = hosted.take(others)
    return Streaming(
        layers=program.layers,
        layouts=layouts,
        tables=hosted.slabs.tables(hosted.device),
        resident=hosted.put_on_device(resident),
        streamed=streamed,
        slots=new_slots(slots, [layouts[index] for index in others], hosted.device) if others else [],
        lane=lane_to(hosted.device),
    )
