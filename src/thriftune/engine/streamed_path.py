"""The engine with streamed layers as the loop's way to a gradient: parts of a step go layer by layer.

How many layers stay, and where their inputs wait, is chosen once, before the first step, from the memory that is free
then. Out of memory gives up a quarter of the layers that stay, then makes parts smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from thriftune.data import Example
from thriftune.engine import by_layer
from thriftune.engine.attention import Attention
from thriftune.engine.hosted import Hosted, Say, Slabs, refuse_another_size, stream
from thriftune.engine.lanes import LinkTimes
from thriftune.engine.offload import SLOTS, Demand, Offload, choose_offload, padding_bytes
from thriftune.engine.packing import PackedBatch, cut_by_tokens, pack
from thriftune.engine.program import Program
from thriftune.engine.residency import Streaming, spread
from thriftune.engine.room import free_bytes
from thriftune.engine.shelf import DeviceShelf, HostShelf, Shelf
from thriftune.errors import DoesNotFitError


@dataclass
class StreamedPath:
    """`chosen` is how it was to run; stepping down changes the size of its parts there. `spent` are the link's times of
    the last step whose times were asked for: to ask is to wait for the device, so it is done when the step is over."""

    program: Program
    streaming: Streaming
    hosted: Hosted
    shelf: Shelf
    device: torch.device
    attention: Attention
    chosen: Offload
    longest: int
    name: Literal["engine", "generic"] = "engine"
    spent: LinkTimes = field(default_factory=lambda: LinkTimes(0.0, 0.0, 0))
    _untold: bool = False  # a step's times have not been asked for yet

    @property
    def offload(self) -> Offload:
        """How it runs now. Layers are given up for this path and its copy for evaluation alike, so they are counted."""
        return replace(self.chosen, resident=len(self.streaming.resident))

    def add_gradients(self, examples: Sequence[Example], targets: float) -> Tensor:
        program, parts, key = self.program, self._parts(examples), self.program.key_of_step()
        loss = by_layer.add_gradients(program, self.streaming, self.shelf, parts, 1.0 / targets, self.attention, key)
        self._untold = True
        return loss / targets

    def losses(self, examples: Sequence[Example]) -> tuple[float, int]:
        """In groups as large as a step, so that what lies between layers never takes more than in training."""
        total, targets = 0.0, 0
        for group in cut_by_tokens(examples, max(self.longest, 2 * self.offload.most_tokens)):
            parts = self._parts(group)
            total += float(by_layer.losses(self.program, self.streaming, parts, self.attention))
            targets += sum(part.targets_N.shape[0] for part in parts)
        self.streaming.lane.times()
        return total, targets

    def step_down(self, reason: str) -> str:
        same = "same step, same examples"
        if self.streaming.resident and self.streaming.slots:
            given = self.streaming.give_up(max(1, len(self.streaming.resident) // 4), self._to_host)
            return f"out of memory: {given} layers more are streamed from here on, {same}"
        before = self.offload.most_tokens
        if before > self.longest:
            self.chosen = replace(self.chosen, most_tokens=max(self.longest, before // 2))
            return f"out of memory: parts of {before} -> {self.offload.most_tokens} tokens at once, {same}"
        raise DoesNotFitError(
            given=f"one example of up to {self.longest} tokens at once, with {self.offload.words}, runs out of memory: "
            f"{reason}",
            allowed="a step whose smallest part fits",
            do="lower data.max_length, lora.r or the rows of a step, or take a smaller model",
        )

    def in_evaluation(self) -> StreamedPath:
        self.measured()  # or its copies would count as the step's
        return replace(self)

    def state(self) -> dict[str, int | bool]:
        return {"most_tokens": self.offload.most_tokens}

    def resume(self, state: Mapping[str, int | bool]) -> None:
        """Parts as the checkpoint was left, so that sums are taken in the same order."""
        if "most_tokens" in state:
            self.chosen = replace(self.chosen, most_tokens=int(state["most_tokens"]))

    def parameters_changed(self) -> None:
        """Only method dynamic changes them, whose recipes stream nothing."""
        raise NotImplementedError("streamed layers keep the adapters that they were read with")

    def copies_bytes(self) -> int:
        """Only method dynamic asks, around a change of the parameters."""
        raise NotImplementedError("streamed layers keep the adapters that they were read with")

    def measured(self) -> dict[str, float]:
        if self._untold:
            self.spent, self._untold = self.streaming.lane.times(), False
        return {"copy_s": self.spent.copy_s, "waited_s": self.spent.waited_s}

    @property
    def host_bytes(self) -> int:
        """Pinned memory of the host."""
        of_shelf = self.shelf.block.bytes.numel() if isinstance(self.shelf, HostShelf) else 0
        return self.hosted.bytes + of_shelf

    def close(self) -> None:
        """Let go of the host's pinned memory, which another program of this process may need; nothing runs after it."""
        self.streaming.streamed.clear()  # views of the blocks that follow
        self.hosted.close()
        if isinstance(self.shelf, HostShelf):
            self.shelf.close()

    def _parts(self, examples: Sequence[Example]) -> list[PackedBatch]:
        self.program.copy_masters()
        return [pack(group, self.device) for group in cut_by_tokens(examples, self.offload.most_tokens)]

    def _to_host(self, index: int) -> Tensor:
        return self.hosted.take([index])[index]


def streamed_path(
    program: Program,
    slabs: Slabs,
    device: torch.device,
    attention: Attention,
    demand: Demand,
    say: Say,
) -> StreamedPath:
    """The path of a run whose program has none of its layers' weights yet. Raises DoesNotFitError when host memory does
    not hold what is to be streamed."""
    _refuse_other_sizes(program, slabs)
    sizes = program.sizes
    ranked = sum(p.a.numel() for layer in program.layers for s in layer.stacks for p in s.parts if p.a is not None)
    demand = replace(demand, later_bytes=demand.later_bytes + padding_bytes(sizes, ranked))
    chosen = choose_offload(sizes, free_bytes(device), demand)
    say(f"offload: {chosen.words}")
    shelf: Shelf = DeviceShelf()
    if chosen.inputs_on_host:
        kind = program.head.weight_VD.dtype
        shelf = HostShelf.of(chosen.layers, demand.step_tokens, sizes.width, kind, device)
    hosted = Hosted(slabs, device, say)
    streaming = stream(program, hosted, spread(chosen.resident, chosen.layers), SLOTS)
    return StreamedPath(program, streaming, hosted, shelf, device, attention, chosen, demand.longest)


def _refuse_other_sizes(program: Program, slabs: Slabs) -> None:
    """Raise ModelError where a slab's matrices are not those of the program's layer."""
    for index, (layer, layout) in enumerate(zip(program.layers, slabs.layouts, strict=True)):
        linears = [part.linear for stack in layer.stacks for part in stack.parts]
        for linear, matrix in zip(linears, layout.matrices, strict=True):
            refuse_another_size(linear, matrix, index)
