"""A program's slabs brought from the store to where they stay: the device, pinned host memory, or, where that does not
hold them all, the disk that they are read from in every pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from thriftune.engine.disk import DiskReader
from thriftune.engine.fp8 import Fp8Values, read_fp8
from thriftune.engine.host_memory import (
    LEFT_FOR_THE_SYSTEM,
    PinnedBlock,
    available_bytes,
    check_host_memory,
    pinned_block,
)
from thriftune.engine.lanes import Lane, lane_to
from thriftune.engine.program import Program
from thriftune.engine.residency import Holder, Streaming, new_slots, spread
from thriftune.errors import ModelError
from thriftune.kernels.slab import Matrix, SlabLayout, Tables

READERS = 8  # threads that read and check slabs, at most
THROUGH = 4  # blocks that resident layers are read through
STAGED = 3  # blocks that layers from the disk are read into: one is copied, one is ready, one is read

Say = Callable[[str], None]


class Slabs(Protocol):
    """A store of slabs, by the number of their layer."""

    @property
    def layouts(self) -> list[SlabLayout]: ...

    def tables(self, device: torch.device) -> Tables: ...

    def read(self, index: int, slab: Tensor, say: Say) -> None:
        """Fill `slab`, in host memory, checked. May be called from several threads, for different layers."""
        ...

    def read_again(self, index: int, slab: Tensor) -> None:
        """The same, unchecked."""
        ...


@dataclass
class Hosted:
    """The blocks of pinned memory that hold slabs, one a layer, each of its slab's size; and what reads the layers that
    have none from the disk, through blocks of its own."""

    slabs: Slabs
    device: torch.device
    say: Say
    blocks: dict[int, PinnedBlock] = field(default_factory=dict)
    staging: list[PinnedBlock] = field(default_factory=list)
    disk: DiskReader | None = None

    def split(self, indices: Sequence[int]) -> tuple[list[int], list[int]]:
        """These layers as host memory holds them, and those that are left to the disk, spread between them."""
        available = available_bytes()
        slab = max((self.slabs.layouts[index].bytes for index in indices), default=0)
        if available is None or len(indices) * slab <= available - LEFT_FOR_THE_SYSTEM:
            return list(indices), []
        held = max(0, (available - LEFT_FOR_THE_SYSTEM) // slab - STAGED)
        in_memory = [indices[place] for place in spread(held, len(indices))]
        on_disk = [index for index in indices if index not in set(in_memory)]
        self.say(
            f"offload: host memory holds {held} of {len(indices)} streamed layers; {len(on_disk)} are read from the "
            "disk in every pass, which is far slower"
        )
        return in_memory, on_disk

    def reader(self, indices: Sequence[int], lane: Lane) -> DiskReader | None:
        """What reads these layers from the disk, where there are any."""
        if not indices:
            return None
        sizes = [layout.bytes for layout in self.slabs.layouts]
        largest, what = max(sizes[index] for index in indices), f"{STAGED} blocks for layers read from the disk"
        check_host_memory(STAGED * largest, what)
        self.staging = [pinned_block(largest, self.device, what) for _ in range(STAGED)]
        checked: set[int] = set()

        def read(index: int, slab: Tensor) -> None:
            if index in checked:
                self.slabs.read_again(index, slab)
            else:
                self.slabs.read(index, slab, self.say)
                checked.add(index)

        self.disk = DiskReader(read, sizes, [block.bytes for block in self.staging], lane)
        return self.disk

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
        """The slabs of these layers on the device, through a few blocks of host memory."""
        if not indices:
            return {}
        layouts, what = self.slabs.layouts, "blocks to read layers through"
        largest, count = max(layouts[index].bytes for index in indices), min(THROUGH, len(indices))
        check_host_memory(count * largest, what)
        blocks = [pinned_block(largest, self.device, what) for _ in range(count)]
        free: SimpleQueue[PinnedBlock] = SimpleQueue()
        for block in blocks:
            free.put(block)

        def put(index: int) -> Tensor:
            block = free.get()
            try:
                staged = block.bytes[: layouts[index].bytes]
                self.slabs.read(index, staged, self.say)
                return torch.empty(staged.shape, dtype=torch.uint8, device=self.device).copy_(staged)
            finally:
                free.put(block)

        try:
            with ThreadPoolExecutor(count) as readers:
                return dict(zip(indices, readers.map(put, indices), strict=True))
        finally:
            for block in blocks:
                block.release()

    def close(self) -> None:
        """Stop reading and let go of all pinned memory. What was read into it is not to be used after this."""
        if self.disk is not None:  # its thread holds this and so every block: nobody else lets go of them
            self.disk.close()
            self.disk = None
        for block in [*self.blocks.values(), *self.staging]:
            block.release()
        self.blocks.clear()
        self.staging.clear()

    @property
    def bytes(self) -> int:
        return sum(block.bytes.numel() for block in [*self.blocks.values(), *self.staging])


def stream(program: Program, hosted: Hosted, resident: Sequence[int], slots: int) -> Streaming:
    """Have `program` run with only these of its layers on the device, the others streamed through so many slots.

    Raises DoesNotFitError when host memory is too short even to read them from the disk.
    """
    streaming = stream_layers(program.layers, hosted, resident, slots)
    if program.fp8:
        with closed_if_it_fails(hosted):
            read_scales(program, streaming)
    return streaming


def stream_layers(layers: Sequence[Holder], hosted: Hosted, resident: Sequence[int], slots: int) -> Streaming:
    """The same of layers that need no scales of their own."""
    others = [index for index in range(len(layers)) if index not in set(resident)]
    layouts, lane = hosted.slabs.layouts, lane_to(hosted.device)
    with closed_if_it_fails(hosted):
        on_device = hosted.put_on_device(resident)  # first: it gives back its host memory, which `split` then counts
        in_memory, on_disk = hosted.split(others)
        disk = hosted.reader(on_disk, lane)
        streamed = hosted.take(in_memory)
        return Streaming(
            layers=layers,
            layouts=layouts,
            tables=hosted.slabs.tables(hosted.device),
            resident=on_device,
            streamed=streamed,
            slots=new_slots(slots, [layouts[index] for index in others], hosted.device) if others else [],
            lane=lane,
            disk=disk,
        )


@contextmanager
def closed_if_it_fails(hosted: Hosted) -> Iterator[None]:
    try:
        yield
    except BaseException:
        hosted.close()
        raise


def refuse_another_size(linear: Any, matrix: Matrix, index: int) -> None:
    """Raise ModelError where a slab's matrix is not that of the linear of layer `index`."""
    if (linear.out_features, linear.in_features) != (matrix.rows, matrix.columns):
        raise ModelError(
            given=f"{matrix.name} of layer {index} is {matrix.rows} x {matrix.columns} in the model's files, "
            f"and {linear.out_features} x {linear.in_features} by its config.json",
            allowed="weights that match config.json",
            do="download the model again",
        )


def read_scales(program: Program, streaming: Streaming) -> None:
    """The scales of every layer's rows, with which its weights are unpacked into 8-bit floats."""
    order = range(len(program.layers))
    streaming.begin(order)
    with torch.no_grad():
        for index in order:
            streaming.acquire(index)
            for stack in program.layers[index].stacks:
                assert stack.fp8 is not None
                values = Fp8Values(stack.fp8.forward.values_NK, stack.fp8.backward.values_NK)
                stack.fp8 = read_fp8(stack.parts, stack.packed, stack.size_in, stack.rank, values, stack.fp8.a_RI)
            streaming.release(index)
    streaming.lane.times()
