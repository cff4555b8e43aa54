"""Which examples make a step, which process takes which of them, and how they become padded tensors.

torch is imported inside the functions that need it: a plan reads the data too, and starts without it.

Shapes: B rows at once, T tokens (of the longest of these rows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from thriftune.data.encoding import Example

if TYPE_CHECKING:
    import torch

NO_TARGET = -100
_PADDING_ID = 0  # any id will do: padding is masked and is no target


@dataclass(frozen=True)
class StepOrder:
    """The examples of every optimizer step, counted from 0: a pure function of the step, so resuming needs its number.

    Each epoch has an order of its own, drawn by seed + epoch; its last step may be smaller than the others. `max_steps`
    above 0 decides how many steps there are, else `num_train_epochs` (a fraction is allowed) does.
    """

    num_examples: int
    examples_per_step: int
    num_train_epochs: float
    max_steps: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if self.num_examples < 1 or self.examples_per_step < 1:
            raise ValueError(f"a step order needs examples, got {self.num_examples} at {self.examples_per_step} a step")

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_examples / self.examples_per_step)

    @property
    def steps(self) -> int:
        if self.max_steps > 0:
            return self.max_steps
        # Rounded first: 0.1 epochs of 30 steps are 3 steps, not the 4 that 3.0000000000000004 would make.
        return max(1, math.ceil(round(self.num_train_epochs * self.steps_per_epoch, 6)))

    def indices(self, step: int) -> list[int]:
        """Examples of step `step` (0 <= step < steps). Raises IndexError outside."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.examples_per_step
        if not self.shuffle:
            return list(range(start, min(start + self.examples_per_step, self.num_examples)))
        return list(_permutation(self.num_examples, self.seed + epoch)[start : start + self.examples_per_step])

    def epoch(self, step: int) -> float:
        """Epochs that have passed when `step` steps are done: epoch(0) is 0.0, epoch(steps_per_epoch) is 1.0."""
        whole, within = divmod(step, self.steps_per_epoch)
        return whole + min(within * self.examples_per_step, self.num_examples) / self.num_examples


@lru_cache(maxsize=2)
def _permutation(num_examples: int, seed: int) -> tuple[int, ...]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randperm(num_examples, generator=generator).tolist())


def shared_out(indices: Sequence[int], lengths: Sequence[int], rank: int, world: int) -> list[int]:
    """The share of process `rank` of `world` in one step's `indices`, in their order.

    `lengths[index]` is the length of example `index` in tokens. The shares are disjoint and together everything; their
    numbers of rows differ by at most one and their tokens by little: of every `world` rows, longest first, the process
    with the least so far takes the longest. Every process computes the same shares.
    """
    if world == 1:
        return list(indices)
    by_length = sorted(range(len(indices)), key=lambda place: (-lengths[indices[place]], place))
    tokens = [0] * world
    owner = [0] * len(indices)
    for start in range(0, len(by_length), world):
        poorest_first = sorted(range(world), key=lambda process: (tokens[process], process))
        for place, process in zip(by_length[start : start + world], poorest_first, strict=False):
            owner[place] = process
            tokens[process] += lengths[indices[place]]
    return [index for place, index in enumerate(indices) if owner[place] == rank]


def largest_step(order: StepOrder, lengths: Sequence[int], world: int) -> int:
    """Tokens that the fullest of `world` processes has at most in a step of the first epoch."""
    counts = np.asarray(lengths)
    steps = range(min(order.steps, order.steps_per_epoch))
    fullest = max(int(counts[order.indices(step)].sum()) for step in steps)
    if world == 1:
        return fullest
    return min(fullest, -(-fullest // world) + int(counts.max()))


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right. `labels_BT` is not shifted: labels_BT[b, t] is tokens_BT[b, t] where that token is
    trained, else -100. `mask_BT` is 1 on tokens and 0 on padding. All int64."""

    tokens_BT: torch.Tensor  # noqa: N815
    labels_BT: torch.Tensor  # noqa: N815
    mask_BT: torch.Tensor  # noqa: N815
    num_tokens: int
    num_targets: int

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.tokens_BT.to(device, non_blocking=True),
            self.labels_BT.to(device, non_blocking=True),
            self.mask_BT.to(device, non_blocking=True),
            self.num_tokens,
            self.num_targets,
        )


def micro_batches(examples: Sequence[Example], rows_at_once: int) -> list[Batch]:
    """The examples in batches of at most `rows_at_once`, longest first: little padding, and the largest need of memory
    shows at once."""
    by_length = sorted(examples, key=lambda example: -len(example))
    return [_batch(by_length[start : start + rows_at_once]) for start in range(0, len(by_length), rows_at_once)]


def _batch(examples: Sequence[Example]) -> Batch:
    import torch

    shape = (len(examples), max(len(example) for example in examples))
    tokens_BT = np.full(shape, _PADDING_ID, dtype=np.int64)
    labels_BT = np.full(shape, NO_TARGET, dtype=np.int64)
    mask_BT = np.zeros(shape, dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example)
        tokens_BT[row, :length] = example.tokens
        labels_BT[row, :length] = np.where(example.trained, example.tokens, NO_TARGET)
        mask_BT[row, :length] = 1
    return Batch(
        torch.from_numpy(tokens_BT),
        torch.from_numpy(labels_BT),
        torch.from_numpy(mask_BT),
        num_tokens=int(mask_BT.sum()),
        # Nothing stands before position 0, so it is never predicted.
        num_targets=int((labels_BT[:, 1:] != NO_TARGET).sum()),
    )
