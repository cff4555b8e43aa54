"""Examples side by side in one row: no padding, positions restart with each, attention stays inside each.

Shape legend: T tokens of all examples, S examples, N positions that predict a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thriftune.data import Example


@dataclass(frozen=True)
class Segments:
    """Where the examples lie in the row. `starts_S1` (int32, one more than examples) ends with the number of tokens."""

    lengths: tuple[int, ...]
    starts_S1: Tensor  # noqa: N815

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class PackedBatch:
    """`rows_T` are the rows of the data that tokens come from, `predicting_N` the places whose next token is trained,
    `targets_N` those tokens. int64 but the segments."""

    tokens_T: Tensor  # noqa: N815
    positions_T: Tensor  # noqa: N815
    rows_T: Tensor  # noqa: N815
    predicting_N: Tensor  # noqa: N815
    targets_N: Tensor  # noqa: N815
    segments: Segments


def pack(examples: Sequence[Example], device: torch.device) -> PackedBatch:
    """One row of all the examples. An example's first token is never predicted: nothing stands before it."""
    lengths = [len(example) for example in examples]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([example.tokens for example in examples]).astype(np.int64)
    trained = np.concatenate([example.trained for example in examples])
    trained[starts[:-1]] = False
    trained_at = np.flatnonzero(trained)
    positions = np.concatenate([np.arange(length) for length in lengths])
    rows = np.repeat([example.row for example in examples], lengths)
    # One copy to the device: the parts are views of it.
    parts = [tokens, positions.astype(np.int64), rows.astype(np.int64), trained_at - 1, tokens[trained_at]]
    whole = torch.from_numpy(np.concatenate(parts))
    if device.type == "cuda":
        whole = whole.pin_memory()
    on_device = whole.to(device, non_blocking=True).split([len(part) for part in parts])
    starts_S1 = torch.from_numpy(starts.astype(np.int32)).to(device, non_blocking=True)
    tokens_T, positions_T, rows_T, predicting_N, targets_N = on_device
    return PackedBatch(tokens_T, positions_T, rows_T, predicting_N, targets_N, Segments(tuple(lengths), starts_S1))


def cut_by_tokens(examples: Sequence[Example], most_tokens: int) -> list[list[Example]]:
    """The examples in groups of at most `most_tokens` tokens (one longer than that stands alone), longest first: the
    largest need of memory shows at once, and groups are even. Of no examples (a process of several may have none of a
    step) there is no group."""
    if not examples:
        return []
    if sum(map(len, examples)) <= most_tokens:
        return [list(examples)]
    groups: list[list[Example]] = []
    sizes: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example)):
        fitting = [place for place, size in enumerate(sizes) if size + len(example) <= most_tokens]
        if fitting:
            place = min(fitting, key=lambda place: sizes[place])
            groups[place].append(example)
            sizes[place] += len(example)
        else:
            groups.append([example])
            sizes.append(len(example))
    return groups
