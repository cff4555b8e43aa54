"""One linear of a stack: the place of its output and of its adapter among those of the linears beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Part:
    """One linear of a stack: its place in the output, and its adapter, if it has one."""

    rows: slice
    linear: Any
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scale: float = 1.0
    ranks: slice = field(default_factory=lambda: slice(0, 0))
