"""Training a part of the adapter: the first components of each matrix, or one of its two factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from thriftune.data import Example
from thriftune.federated.adapter import Places
from thriftune.federated.aggregate import Half
from thriftune.train.path import StepPath


@dataclass
class PartialPath:
    """A path whose gradients reach only the first `rank` components and the factors of `half`; `inner` computes them.

    A factor that does not train has no gradient at all, so that the optimizer passes it over, moments included.
    Components beyond the rank have the gradient zero from the first step on, which leaves AdamW's moments and the
    weights as they are.
    """

    inner: StepPath
    places: Places
    rank: int
    half: Half = "both"

    @property
    def name(self) -> Literal["engine", "generic"]:
        return self.inner.name

    def add_gradients(self, examples: Sequence[Example], targets: float) -> Tensor:
        loss = self.inner.add_gradients(examples, targets)
        for place in self.places.by_name.values():
            if self.half == "a":
                place.b.grad = None
            elif place.b.grad is not None:
                place.b.grad[:, self.rank :] = 0.0
            if self.half == "b":
                place.a.grad = None
            elif place.a.grad is not None:
                place.a.grad[self.rank :] = 0.0
        return loss

    def losses(self, examples: Sequence[Example]) -> tuple[float, int]:
        return self.inner.losses(examples)

    def step_down(self, reason: str) -> str:
        return self.inner.step_down(reason)

    def in_evaluation(self) -> PartialPath:
        return replace(self, inner=self.inner.in_evaluation())

    def state(self) -> dict[str, int | bool]:
        return self.inner.state()

    def resume(self, state: Mapping[str, int | bool]) -> None:
        self.inner.resume(state)

    def measured(self) -> dict[str, float]:
        return self.inner.measured()

    def parameters_changed(self) -> None:
        self.inner.parameters_changed()

    def copies_bytes(self) -> int:
        return self.inner.copies_bytes()


def without_components_beyond(places: Places, rank: int) -> None:
    """Set the components beyond `rank` to zero: what a site of that rank has under `fedit`."""
    with torch.no_grad():
        for place in places.by_name.values():
            place.b[:, rank:] = 0.0
            place.a[rank:] = 0.0
