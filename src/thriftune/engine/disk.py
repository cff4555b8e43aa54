"""Slabs that host memory does not hold, read from the store ahead of their use by a thread, into pinned blocks.

The thread reads in the order that was announced, as long as a block is free; a block is free again when the copy to the
device that was made from it has been.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from thriftune.engine.lanes import Lane


@dataclass
class _Block:
    bytes: Tensor
    arrival: Any = None


class DiskReader:
    """`read(index, place)` fills the slab of a layer; `sizes` are the slabs' bytes by layer."""

    def __init__(
        self, read: Callable[[int, Tensor], None], sizes: Sequence[int], blocks: Sequence[Tensor], lane: Lane
    ) -> None:
        self._read, self._sizes, self.lane = read, sizes, lane
        self._changed = threading.Condition()
        self._free = deque(_Block(block) for block in blocks)
        self._wanted: deque[int] = deque()
        self._ready: deque[tuple[int, _Block]] = deque()
        self._lent: dict[int, _Block] = {}
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="disk reader", daemon=True)
        self._thread.start()

    def announce(self, order: Sequence[int]) -> None:
        """These layers will be asked for, in this order; what was announced before is forgotten. What has been read of
        it and is what the new order begins with stays."""
        with self._changed:
            wanted, kept = deque(order), []
            while wanted and self._ready and self._ready[0][0] == wanted[0]:
                kept.append(self._ready.popleft())
                wanted.popleft()
            self._free.extend(block for _, block in self._ready)
            self._ready, self._wanted = deque(kept), wanted
            self._changed.notify_all()

    def take(self, index: int, wait: bool) -> Tensor | None:
        """The layer's slab; None when it has not been read yet and nobody is to wait. Give it back by `sent`."""
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                while wait and self._ready and self._ready[0][0] != index:  # not in the order that was announced
                    self._free.append(self._ready.popleft()[1])
                if self._ready and self._ready[0][0] == index:
                    _, block = self._ready.popleft()
                    self._lent[index] = block
                    return block.bytes[: self._sizes[index]]
                if not wait:
                    return None
                if index not in self._wanted:
                    self._wanted.appendleft(index)
                self._changed.notify_all()
                self._changed.wait()

    def sent(self, index: int, arrival: Any) -> None:
        """The copy to the device has been queued; the block may be overwritten after its `arrival`."""
        with self._changed:
            block = self._lent.pop(index)
            block.arrival = arrival
            self._free.append(block)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop reading; the blocks are the caller's again when this returns."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._free.clear()
        self._ready.clear()
        self._lent.clear()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (self._wanted and self._free))
                if self._closed:
                    return
                index, block = self._wanted[0], self._free.popleft()
            try:
                if block.arrival is not None:
                    self.lane.settle(block.arrival)
                    block.arrival = None
                self._read(index, block.bytes[: self._sizes[index]])
            except BaseException as error:  # whoever waits for the slab raises it
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                if self._wanted and self._wanted[0] == index:  # still, or again in an order that came meanwhile
                    self._wanted.popleft()
                    self._ready.append((index, block))
                else:
                    self._free.append(block)
                self._changed.notify_all()
