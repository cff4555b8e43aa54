"""Where a program's frozen layers are while it runs: some stay on the device, the others are streamed into few slots.

A layer's weights are one slab. Streamed slabs wait in host memory and are copied into device slots in the order in
which the layers will be visited, ahead of use; nothing is ever copied back, and evicting is forgetting. A slot is free
again as soon as its layer has been unpacked. It changes hands only when that has been queued, and it is asked for its
owner at each use.

Of the slots that may be overwritten the one whose layer is needed last goes first. So at the turn from the forward to
the backward pass, and from one step to the next, the layers that are in slots are not fetched again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from thriftune.engine.disk import DiskReader
from thriftune.engine.lanes import Lane
from thriftune.kernels.four_bit import FourBit
from thriftune.kernels.slab import SlabLayout, Tables


class Place(Protocol):
    """Where the packed matrices of some linears are read, while their layer is visited."""

    packed: list[FourBit]

    @property
    def parts(self) -> Sequence[Any]: ...


class Holder(Protocol):
    """A layer, as far as its weights come and go."""

    @property
    def stacks(self) -> Sequence[Place]: ...


@dataclass
class Slot:
    """Room for one slab on the device. `free`: the moment from which it may be overwritten."""

    bytes: Tensor
    owner: int | None = None
    arrival: Any = None
    free: Any = None
    in_use: bool = False
    _views: dict[SlabLayout, list[FourBit]] = field(default_factory=dict)

    def views(self, layout: SlabLayout, tables: Tables) -> list[FourBit]:
        if layout not in self._views:
            self._views[layout] = layout.views(self.bytes, tables)
        return self._views[layout]


@dataclass
class Streaming:
    """`resident` slabs lie on the device, `streamed` ones in host memory, by the number of their layer; those that are
    in neither are read by `disk`."""

    layers: Sequence[Holder]
    layouts: Sequence[SlabLayout]
    tables: Tables
    resident: dict[int, Tensor]
    streamed: dict[int, Tensor]
    slots: list[Slot]
    lane: Lane
    disk: DiskReader | None = None
    _coming: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        for index, slab in self.resident.items():
            self._give(index, self.layouts[index].views(slab, self.tables))
        for slot in self.slots:  # its memory may be what computation that is still queued works with
            slot.free = self.lane.mark()

    def begin(self, visits: Sequence[int]) -> None:
        """A pass over the layers in this order begins; one that was broken off is forgotten."""
        for slot in self.slots:
            if slot.in_use:
                slot.in_use, slot.free = False, self.lane.mark()
        self._coming = deque(index for index in visits if index not in self.resident)
        if self.disk is not None:
            order = sends(self._coming, [slot.owner for slot in self.slots])
            self.disk.announce([index for index in order if index not in self.streamed])
        self._send()

    def acquire(self, index: int) -> None:
        """Have the layer's packed weights on the device for what is queued from here to `release`."""
        if index in self.resident:
            return
        if not self._coming or self._coming[0] != index:
            raise RuntimeError(f"layer {index} is visited where layer {next(iter(self._coming), None)} was announced")
        if self._slot_of(index) is None:
            self._send(must=True)  # it comes from the disk, and had not been read when there was room for it
        slot = self._slot_of(index)
        if slot is None:
            raise RuntimeError(f"layer {index} is in no slot, and all {len(self.slots)} are in use")
        slot.in_use = True
        self.lane.wait(slot.arrival)
        self._give(index, slot.views(self.layouts[index], self.tables))

    def release(self, index: int) -> None:
        """The layer has been unpacked, or will have been when what is queued is done."""
        if index in self.resident:
            return
        slot = self._slot_of(index)
        if slot is None or not slot.in_use:
            raise RuntimeError(f"the slot of layer {index} was overwritten while the layer was in use")
        self._give(index, [])
        slot.in_use, slot.free = False, self.lane.mark()
        self._coming.popleft()
        self._send()

    def give_up(self, count: int, slab_of: Callable[[int], Tensor]) -> int:
        """Stream up to `count` layers more; `slab_of` has their slabs in host memory. Returns how many it became."""
        chosen = sorted(self.resident)[:: max(1, len(self.resident) // max(1, count))][:count]
        for index in chosen:
            self._give(index, [])
            self.streamed[index] = slab_of(index)
            del self.resident[index]
        self._coming.clear()
        return len(chosen)

    def _slot_of(self, index: int) -> Slot | None:
        return next((slot for slot in self.slots if slot.owner == index), None)

    def _send(self, must: bool = False) -> None:
        """Begin every copy that has room now, in the order of the visits, up to one that is still on the disk. With
        `must` the first is waited for."""
        for index in dict.fromkeys(self._coming):
            if self._slot_of(index) is not None:
                continue
            owners, in_use = [slot.owner for slot in self.slots], [slot.in_use for slot in self.slots]
            place = best_slot(index, self._coming, owners, in_use)
            if place is None:
                return
            slab = self._slab(index, must and index == self._coming[0])
            if slab is None:
                return
            slot = self.slots[place]
            slot.owner = index
            slot.arrival = self.lane.send(slab, slot.bytes[: slab.numel()], slot.free)
            if self.disk is not None and index not in self.streamed:
                self.disk.sent(index, slot.arrival)

    def _slab(self, index: int, wait: bool) -> Tensor | None:
        if index in self.streamed:
            return self.streamed[index]
        assert self.disk is not None
        return self.disk.take(index, wait)

    def _give(self, index: int, weights: Sequence[FourBit]) -> None:
        """Have the layer's stacks read these, or nothing."""
        rest = list(weights)
        for stack in self.layers[index].stacks:
            stack.packed, rest = rest[: len(stack.parts)], rest[len(stack.parts) :]


def best_slot(index: int, coming: Sequence[int], owners: Sequence[int | None], in_use: Sequence[bool]) -> int | None:
    """Where a layer of those to come goes: to the slot, not in use, whose layer is needed last. None where all are
    needed before it is."""
    never = len(coming)

    def next_use(place: int) -> int:
        if in_use[place]:
            return -1
        owner = owners[place]
        return next((at for at, visited in enumerate(coming) if visited == owner), never)

    best = max(range(len(owners)), key=next_use, default=None)
    here = next(at for at, visited in enumerate(coming) if visited == index)
    return best if best is not None and next_use(best) > here else None


def sends(visits: Sequence[int], owners: Sequence[int | None]) -> list[int]:
    """The copies of a pass in their order, when each begins as soon as there is room."""
    found, held, coming = [], list(owners), deque(visits)
    idle = [False] * len(held)
    while coming:
        for index in dict.fromkeys(coming):
            if index in held:
                continue
            place = best_slot(index, coming, held, idle)
            if place is None:
                break
            held[place] = index
            found.append(index)
        coming.popleft()
    return found


def new_slots(count: int, layouts: Sequence[SlabLayout], device: torch.device) -> list[Slot]:
    """Each takes the largest slab."""
    size = max(layout.bytes for layout in layouts)
    return [Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(count)]


def spread(resident: int, layers: int) -> list[int]:
    """Which layers stay: evenly between the streamed ones, so that each transfer has a resident layer's time too."""
    return [int((number + 0.5) * layers / resident) for number in range(min(resident, layers))]
