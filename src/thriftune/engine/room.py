"""How much of a step fits into the memory that is free on a device, by the bytes that `sizes` counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from thriftune.engine.program import Program
from thriftune.engine.sizes import CHUNK_BYTES, Choice, Keep, choose, without_spare


@dataclass(frozen=True)
class Room:
    """Of one program on one device. `step_tokens` are the tokens of the largest step there will be, `longest` those of
    its longest example, `later_bytes` what gradients and optimizer will take."""

    program: Program
    device: torch.device
    step_tokens: int
    longest: int
    later_bytes: int

    def choose(self, most: Keep, least: Keep) -> Choice:
        """For the memory that is free now, between `most` and `least` that layers keep."""
        sizes = self.program.sizes
        return choose(sizes, self._free_bytes(), self.step_tokens, self.longest, self.later_bytes, most, least)

    def tokens_of_evaluation(self) -> int:
        """Tokens at once where nothing is kept from layer to layer."""
        free = self._free_bytes()
        if free is None:
            return self.step_tokens
        a_token = 2 * self.program.sizes.working_bytes(Keep.INPUT)
        return max(self.longest, min(4 * self.step_tokens, (free - CHUNK_BYTES) // a_token))

    def _free_bytes(self) -> int | None:
        free = free_bytes(self.device)
        return None if free is None else without_spare(free)


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated; None where it is not counted (a computer's own memory)."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free + spare, limit - torch.cuda.memory_allocated(device))
