"""The engine as the loop's way to a gradient: packs a step's examples, cuts them only by memory, steps down when full.

What is kept for the backward pass is chosen from the memory that is free, by the bytes that each choice takes: first
less of each layer is kept, in the order of `Keep`, then the step is cut into parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from thriftune.data import Example
from thriftune.engine.attention import Attention
from thriftune.engine.packing import cut_by_tokens, pack
from thriftune.engine.program import Program
from thriftune.engine.read import follow_adapters
from thriftune.engine.room import Room
from thriftune.engine.sizes import Keep
from thriftune.errors import DoesNotFitError


@dataclass
class EnginePath:
    """`keep` and `most_tokens` are None until the first step, which looks at the memory that is free then and chooses
    between keeping as much as `most` and as little as `least`."""

    program: Program
    device: torch.device
    attention: Attention
    room: Room
    most: Keep
    least: Keep
    keep: Keep | None = None
    most_tokens: int | None = None
    name: Literal["engine", "generic"] = "engine"
    _resumed: bool = False  # and which 4-bit layers stay unpacked is still to be chosen

    def add_gradients(self, examples: Sequence[Example], targets: float) -> Tensor:
        keep, most_tokens = self._choose()
        self.program.copy_masters()
        key, kept = self.program.key_of_step(), [keep] * len(self.program.layers)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for group in cut_by_tokens(examples, most_tokens):
            batch = pack(group, self.device)
            total += self.program.add_gradients(batch, 1.0 / targets, kept, self.attention, key)
        return total / targets

    def losses(self, examples: Sequence[Example]) -> tuple[float, int]:
        self.program.copy_masters()
        total, targets = 0.0, 0
        if self.most_tokens is None:
            self.most_tokens = self.room.tokens_of_evaluation()
        for group in cut_by_tokens(examples, self.most_tokens):
            batch = pack(group, self.device)
            total += float(self.program.loss(batch, self.attention))
            targets += batch.targets_N.shape[0]
        return total, targets

    def step_down(self, reason: str) -> str:
        if self.program.let_go():
            return "out of memory: 4-bit layers are unpacked anew in every pass from here on, same step, same examples"
        if self.keep is not None and self.keep < self.least:
            self.keep = Keep(self.keep + 1)
            return f"out of memory: layers keep {self.keep.words} from here on, same step, same examples"
        longest = self.room.longest
        if self.most_tokens is not None and self.most_tokens > longest:
            before, self.most_tokens = self.most_tokens, max(longest, self.most_tokens // 2)
            return f"out of memory: {before} -> {self.most_tokens} tokens at once, same step, same examples"
        raise DoesNotFitError(
            given=f"one example of up to {longest} tokens at once, with layers keeping "
            f"{self.least.words}, runs out of memory: {reason}",
            allowed="a step whose smallest part fits",
            do="lower data.max_length, use method qlora, allow gradient_checkpointing, or take a smaller model",
        )

    def in_evaluation(self) -> EnginePath:
        return replace(self, keep=Keep.INPUT, most_tokens=None)

    def state(self) -> dict[str, int | bool]:
        if self.keep is None or self.most_tokens is None:
            return {}
        return {"keep": int(self.keep), "most_tokens": self.most_tokens}

    def measured(self) -> dict[str, float]:
        return {}

    def resume(self, state: Mapping[str, int | bool]) -> None:
        """As the checkpoint was left."""
        if "keep" in state and "most_tokens" in state:
            self.keep, self.most_tokens = Keep(int(state["keep"])), int(state["most_tokens"])
            self._resumed = True

    def parameters_changed(self) -> None:
        follow_adapters(self.program)

    def copies_bytes(self) -> int:
        return sum(stack.copies_bytes for layer in self.program.layers for stack in layer.stacks if not stack.shared)

    def _choose(self) -> tuple[Keep, int]:
        """What layers keep, and tokens at once: chosen at the first step for a step of the longest kind there is. A
        resumed run has them from its checkpoint, and beside them unpacks as many layers as there is room for."""
        held = 0
        if self.keep is None or self.most_tokens is None:
            chosen = self.room.choose(self.most, self.least)
            self.keep, self.most_tokens, held = chosen.keep, chosen.most_tokens, chosen.held
        elif self._resumed:
            held = self.room.choose(self.keep, self.keep).held
        self._resumed = False
        for layer in self.program.layers[:held]:
            layer.hold()
        return self.keep, self.most_tokens
