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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thriftune.engine.lanes import Lane
from thriftune.engine.layer import Layer
from thriftune.kernels.four_bit import FourBit
from thriftune.kernels.slab import SlabLayout, Tables


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
    """`resident` slabs lie on the device, `streamed` ones in host memory, by the number of their layer."""

    layers: Sequence[Layer]
    layouts: Sequence[SlabLayout]
    tables: Tables
    resident: dict[int, Tensor]
    streamed: dict[int, Tensor]
    slots: list[Slot]
    lane: Lane
    _coming: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        assert self.resident.keys() | self.streamed.keys() == set(range(len(self.layers)))
        for index, slab in self.resident.items():
            self._give(index, self.layouts[index].views(slab, self.tables))
        for slot in self.slots:  # its memory may be what computation that is still queued works with
            slot.free = self.lane.mark()

    def begin(self, visits: Sequence[int]) -> None:
        """A pass over the layers in this order begins; one that was broken off is forgotten."""
        for slot in self.slots:
            if slot.in_use:
                slot.in_use, slot.free = False, self.lane.mark()
        self._coming = deque(index for index in visits if index in self.streamed)
        self._send()

    def acquire(self, index: int) -> None:
        """Have the layer's packed weights on the device for what is queued from here to `release`."""
        if index in self.resident:
            return
        if not self._coming or self._coming[0] != index:
            raise RuntimeError(f"layer {index} is visited where layer {next(iter(self._coming), None)} was announced")
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

    def _send(self) -> None:
        """Begin every copy that has room now, in the order of the visits."""
        needed: dict[int, int] = {}
        for place, index in enumerate(self._coming):
            needed.setdefault(index, place)
        for index, place in needed.items():
            if self._slot_of(index) is not None:
                continue
            slot = self._slot_for(place, needed)
            if slot is None:
                return
            slot.owner = index
            slab = self.streamed[index]
            slot.arrival = self.lane.send(slab, slot.bytes[: slab.numel()], slot.free)

    def _slot_for(self, place: int, needed: Mapping[int, int]) -> Slot | None:
        """The slot, not in use, whose layer is needed last, and after the visit at `place`; never comes before all."""
        never = len(self._coming)

        def next_use(slot: Slot) -> int:
            return -1 if slot.in_use else never if slot.owner is None else needed.get(slot.owner, never)

        best = max(self.slots, key=next_use)
        return best if next_use(best) > place else None

    def _give(self, index: int, weights: Sequence[FourBit]) -> None:
        """Have the layer's stacks read these, or nothing."""
        rest = list(weights)
        for stack in self.layers[index].stacks:
            stack.packed, rest = rest[: len(stack.parts)], rest[len(stack.parts) :]


def new_slots(count: int, layouts: Sequence[SlabLayout], device: torch.device) -> list[Slot]:
    """Each takes the largest slab."""
    size = max(layout.bytes for layout in layouts)
    return [Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(count)]


def spread(resident: int, layers: int) -> list[int]:
    """Which layers stay: evenly between the streamed ones, so that each transfer has a resident layer's time too."""
    return [int((number + 0.5) * layers / resident) for number in range(min(resident, layers))]
