"""How much of a step fits into free memory: bytes a token by what layers keep, counted from the layers' own sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from thriftune.data import Example
from thriftune.engine.head import CHUNK_BYTES
from thriftune.engine.layer import Keep
from thriftune.engine.program import Program
from thriftune.engine.sizes import kept_bytes, working_bytes

# Left for what is not counted: the attention kernel's workspace, fragments, cuBLAS.
SPARE_SHARE = 0.06
SPARE_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Choice:
    """`held` layers, of those in 4 bits, stay unpacked."""

    keep: Keep
    most_tokens: int
    held: int


@dataclass(frozen=True)
class Room:
    """Of one program on one device. `step_tokens` are the tokens of the largest step there will be, `longest` those of
    its longest example, `later_bytes` what the optimizer will take at its first step."""

    program: Program
    device: torch.device
    step_tokens: int
    longest: int
    later_bytes: int

    def choose(self, most: Keep, least: Keep) -> Choice:
        """What layers keep, from `most` to `least`, and how many tokens run at once: all of a step while anything fits,
        with as much kept as possible; then as many 4-bit layers stay unpacked as there is room for. Where nothing fits
        the least is returned, and running out of memory decides."""
        free = self._free_bytes()
        if free is None:
            return Choice(most, self.step_tokens, len(self.program.layers))
        parts = 1
        while True:
            tokens = max(self.longest, -(-self.step_tokens // parts))
            for keep in Keep:
                spare = free - self.needed_bytes(keep, tokens)
                if most <= keep <= least and spare >= 0:
                    return Choice(keep, tokens, spare // self._unpacked_bytes())
            if tokens <= self.longest:
                return Choice(least, tokens, 0)
            parts *= 2

    def _unpacked_bytes(self) -> int:
        """Of the largest layer, in the type of its products."""
        return max(sum(stack.buffer_YX.nbytes for stack in layer.stacks) for layer in self.program.layers)

    def needed_bytes(self, keep: Keep, tokens: int) -> int:
        """Of a step of so many tokens, on top of the weights."""
        layers, element = self.program.layers, self.program.embedding_VD.element_size()
        kept = sum(kept_bytes(layer, keep, element) for layer in layers)
        working = max(working_bytes(layer, keep, element) for layer in layers)
        head, width = self.program.head, self.program.embedding_VD.shape[1]
        logits = head.rows_at_once(tokens) * head.weight_VD.shape[0] * element
        at_the_head = logits + tokens * 4 * width * element
        return tokens * kept + max(tokens * working, at_the_head) + self.later_bytes

    def tokens_of_evaluation(self, examples: Sequence[Example]) -> int:
        """Tokens at once where nothing is kept from layer to layer."""
        free = self._free_bytes()
        if free is None:
            return self.step_tokens
        layers, element = self.program.layers, self.program.embedding_VD.element_size()
        a_token = max(2 * working_bytes(layer, Keep.INPUT, element) for layer in layers)
        return max(max(map(len, examples)), min(4 * self.step_tokens, (free - CHUNK_BYTES) // a_token))

    def _free_bytes(self) -> int | None:
        """What can still be allocated; None where it is not counted (a computer's own memory)."""
        if self.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        spare = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        limit = int(total * torch.cuda.get_per_process_memory_fraction(self.device))
        allowed = min(free + spare, limit - torch.cuda.memory_allocated(self.device))
        return int(allowed * (1 - SPARE_SHARE)) - SPARE_BYTES
