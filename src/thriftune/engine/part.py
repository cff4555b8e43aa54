"""One linear of a stack: the place of its output and of its adapter among those of the linears beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Part:
    """One linear of a stack: its place in the output, and its adapter, if it has one. `number` is the linear's own in
    the model, by which the masks of its dropout are drawn."""

    rows: slice
    linear: Any
    number: int
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scale: float = 1.0
    dropout: float = 0.0
    ranks: slice = field(default_factory=lambda: slice(0, 0))
