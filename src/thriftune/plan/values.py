"""What the planner's functions hand each other: the work of a step, its memory, its time. Frozen values, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FP8_LORA = "lora-fp8"  # a line of the plan beside lora's: method lora with precision=fp8
OFFLOADED = "qlora-offload"  # and beside qlora's, where its layers fit: all of them streamed, for the least memory
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace", "runtime")
LimitedBy = Literal["compute", "memory bandwidth", "link", "launches"]
Path = Literal["generic", "engine"]


@dataclass(frozen=True, slots=True)
class Packed:
    """The same steps as the engine runs them on each GPU: rows side by side, no padding. `largest` tokens of the
    fullest step there is and `longest` of its longest row decide memory; the means of a step (`squares` of its rows'
    squared lengths summed) decide time."""

    largest: int
    longest: int
    tokens: float
    targets: float
    squares: float

    @property
    def varied(self) -> bool:
        """Whether steps differ in length."""
        return self.tokens < self.largest


@dataclass(frozen=True, slots=True)
class Work:
    """What the run's data ask of each step. The fullest micro-batch is `rows` x `length` tokens, padding included,
    and computes logits at `target_positions` positions of each row; that decides memory. Micro-batches go longest
    first, so the ones that find gradients of others waiting are at most `later_length` long. The means decide time."""

    rows: int
    length: int
    target_positions: int
    later_length: int
    later_positions: int
    micro_batches: int  # an optimizer step
    tokens_per_step: float  # mean, padding not counted
    padded_tokens_per_step: float  # mean, what really goes through the model
    targets_per_step: float  # mean positions with logits
    steps: int
    tokens: int  # the whole run, padding not counted
    source: str  # in words: "rows.jsonl, 1,000 rows tokenised" or "assumed: rows of 1,024 tokens"
    packed: Packed


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU at the run's peak. `parts` has every name of PARTS; they add up to `peak_bytes`.

    `allocated_bytes` and `reserved_bytes` are what PyTorch's allocator would report; paged optimizer states, the
    driver's context and other libraries' workspaces lie outside it.
    """

    parts: dict[str, int]
    allocated_bytes: int
    reserved_bytes: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of one optimizer step, and what they are made of."""

    step_s: float
    compute_s: float
    memory_s: float
    link_s: float
    launch_s: float
    limited_by: LimitedBy
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of a step as a stopwatch found them on this machine, None where it could not. `note` is a sentence
    without its subject, the method: what was timed, or why nothing was."""

    step_s: float | None
    note: str
