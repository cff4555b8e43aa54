"""Where layers' inputs wait between the forward and the backward pass: on the device, or in pinned host memory.

On the host they leave while the layer computes and come back while the layer above computes backward, by streams of
their own; two layers' inputs at most are on the device for it.

Shape legend: T tokens of one part of a step, D width, L layers, P tokens of all parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from thriftune.engine.host_memory import PinnedBlock, check_host_memory, pinned_block
from thriftune.engine.lanes import Lane, lane_to


class Shelf(Protocol):
    """One pass at a time: every layer's parts are put in order, then fetched and taken layer by layer backwards."""

    def begin(self, tokens: Sequence[int]) -> None:
        """A pass whose parts have so many tokens."""
        ...

    def put(self, layer: int, part: int, x_TD: Tensor) -> None: ...

    def fetch(self, layer: int) -> None:
        """Have the layer's inputs come back; it will be needed next."""
        ...

    def take(self, layer: int, part: int) -> Tensor: ...


@dataclass
class DeviceShelf:
    _kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def begin(self, tokens: Sequence[int]) -> None:
        self._kept.clear()

    def put(self, layer: int, part: int, x_TD: Tensor) -> None:
        self._kept[layer, part] = x_TD

    def fetch(self, layer: int) -> None: ...

    def take(self, layer: int, part: int) -> Tensor:
        return self._kept.pop((layer, part))


@dataclass
class HostShelf:
    """`rows_LPD` is one block of pinned memory for steps of up to P tokens; a step of more takes a larger one."""

    block: PinnedBlock
    rows_LPD: Tensor  # noqa: N815
    device: torch.device
    leaving: Lane
    coming: Lane
    _starts: list[int] = field(default_factory=list)
    _on_the_way_out: deque[tuple[Any, Tensor]] = field(default_factory=deque)
    _back: dict[tuple[int, int], tuple[Any, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, layers: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> HostShelf:
        block, rows_LPD = _rows(layers, tokens, width, dtype, device)
        return cls(block, rows_LPD, device, lane_to(device), lane_to(device))

    def begin(self, tokens: Sequence[int]) -> None:
        self._starts = [sum(tokens[:number]) for number in range(len(tokens) + 1)]
        for arrival, _ in self._back.values():  # of a pass that was broken off: their memory is about to be another's
            self.coming.wait(arrival)
        self._back.clear()
        self._let_go(0)
        for lane in (self.leaving, self.coming):
            lane.times()  # which forgets the last pass's: nobody else asks for them
        layers, most, width = self.rows_LPD.shape
        if self._starts[-1] > most:  # another epoch's order has a larger step than the first one's
            self.close()  # or the host would have to hold both
            self.block, self.rows_LPD = _rows(layers, self._starts[-1], width, self.rows_LPD.dtype, self.device)

    def close(self) -> None:
        """Let go of the pinned memory, of which no view is left; nothing is put before the next `begin`."""
        layers, _, width = self.rows_LPD.shape
        self.rows_LPD = self.rows_LPD.new_empty(layers, 0, width)
        self.block.release()

    def put(self, layer: int, part: int, x_TD: Tensor) -> None:
        arrival = self.leaving.send(x_TD, self._place(layer, part), self.leaving.mark())
        self._on_the_way_out.append((arrival, x_TD))
        self._let_go(2 * (len(self._starts) - 1))

    def fetch(self, layer: int) -> None:
        self._let_go(0)
        for part in range(len(self._starts) - 1):
            place = self._place(layer, part)
            x_TD = torch.empty(place.shape, dtype=place.dtype, device=self.device)
            self._back[layer, part] = (self.coming.send(place, x_TD, self.coming.mark()), x_TD)

    def take(self, layer: int, part: int) -> Tensor:
        arrival, x_TD = self._back.pop((layer, part))
        self.coming.wait(arrival)
        return x_TD

    def _place(self, layer: int, part: int) -> Tensor:
        return self.rows_LPD[layer, self._starts[part] : self._starts[part + 1]]

    def _let_go(self, most: int) -> None:
        """Give back the device memory of inputs that have left; what computes next waits for that."""
        while len(self._on_the_way_out) > most:
            arrival, _ = self._on_the_way_out.popleft()
            self.leaving.wait(arrival)


def _rows(layers: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[PinnedBlock, Tensor]:
    size = layers * tokens * width * dtype.itemsize
    what = f"the inputs of {layers} layers for {tokens:,} tokens a step"
    check_host_memory(size, what)
    block = pinned_block(size, device, what)
    return block, block.bytes.view(dtype).view(layers, tokens, width)
