"""How slabs get to the device: on a GPU by a stream of their own, on a CPU by a plain copy.

A lane never waits for the device: it queues a copy behind the moment from which its place may be overwritten, and lets
computation wait, on the device, for the moment when it has arrived.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """Seconds in which copies to the device ran, and in which computation stood still for one; bytes copied."""

    copy_s: float
    waited_s: float
    bytes: int


class Lane(Protocol):
    def send(self, source: Tensor, place: Tensor, free: Any) -> Any:
        """Begin the copy once `free` has passed (None: at once). Returns its arrival, to be waited for."""
        ...

    def wait(self, arrival: Any) -> None:
        """What is computed from here on finds the copy there."""
        ...

    def settle(self, arrival: Any) -> None:
        """Return when the copy has been made. From any thread."""
        ...

    def mark(self) -> Any:
        """The moment when all that was computed so far is done."""
        ...

    def times(self) -> LinkTimes:
        """Since the last time this was asked."""
        ...


class HostLane:
    """Between places of a computer's own memory: a copy has arrived when it is sent."""

    def __init__(self) -> None:
        self._bytes = 0

    def send(self, source: Tensor, place: Tensor, free: Any) -> None:
        place.copy_(source)
        self._bytes += source.numel()

    def wait(self, arrival: Any) -> None: ...

    def settle(self, arrival: Any) -> None: ...

    def mark(self) -> None: ...

    def times(self) -> LinkTimes:
        found, self._bytes = LinkTimes(0.0, 0.0, self._bytes), 0
        return found


@dataclass
class CudaLane:
    """A stream beside the one that computes; `source` must be in pinned memory for the copy to run beside it."""

    device: torch.device
    stream: torch.cuda.Stream = field(init=False)
    _copies: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = field(default_factory=list)
    _waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stream = torch.cuda.Stream(self.device)

    def send(self, source: Tensor, place: Tensor, free: torch.cuda.Event | None) -> torch.cuda.Event:
        if free is not None:
            self.stream.wait_event(free)
        with torch.cuda.stream(self.stream):
            began = self._event(self.stream)
            place.copy_(source, non_blocking=True)
            arrived = self._event(self.stream)
        self._copies.append((began, arrived, source.numel()))
        return arrived

    def wait(self, arrival: torch.cuda.Event) -> None:
        computing = torch.cuda.current_stream(self.device)
        before = self._event(computing)
        computing.wait_event(arrival)
        self._waits.append((before, self._event(computing)))

    def settle(self, arrival: torch.cuda.Event) -> None:
        arrival.synchronize()

    def mark(self) -> torch.cuda.Event:
        return self._event(torch.cuda.current_stream(self.device))

    def times(self) -> LinkTimes:
        """Of what has ended: the first copies of the next pass may still run."""
        torch.cuda.current_stream(self.device).synchronize()
        made = [(copy, copy[1].query()) for copy in self._copies]
        copies, self._copies = [copy for copy, ended in made if ended], [copy for copy, ended in made if not ended]
        copy_ms = sum(began.elapsed_time(arrived) for began, arrived, _ in copies)
        waited_ms = sum(before.elapsed_time(after) for before, after in self._waits)
        self._waits = []
        return LinkTimes(copy_ms / 1e3, waited_ms / 1e3, sum(size for _, _, size in copies))

    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event


def lane_to(device: torch.device) -> Lane:
    return CudaLane(device) if device.type == "cuda" else HostLane()
