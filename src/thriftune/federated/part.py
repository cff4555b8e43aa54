"""Training a part of the adapter: some components of each matrix, or one of its two factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thriftune.data import Example
from thriftune.federated.adapter import Places
from thriftune.federated.aggregate import Half
from thriftune.recipe import Recipe
from thriftune.train.optim import build_optimizer
from thriftune.train.path import StepPath


@dataclass
class PartialPath:
    """A path whose gradients reach only the components `first` to `end` and the factors of `half`; `inner` computes
    them.

    A factor that does not train has no gradient at all, so that the optimizer passes it over, moments included. Other
    components have the gradient zero, which the norm of the gradient does not feel; PartOptimizer passes them over.
    """

    inner: StepPath
    places: Places
    first: int
    end: int
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
                place.b.grad[:, : self.first] = 0.0
                place.b.grad[:, self.end :] = 0.0
            if self.half == "b":
                place.a.grad = None
            elif place.a.grad is not None:
                place.a.grad[: self.first] = 0.0
                place.a.grad[self.end :] = 0.0
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


class PartOptimizer(torch.optim.Optimizer):
    """The recipe's optimizer over the components `first` to `end` alone: it holds states of no others and moves no
    others. Its parameters are copies, taken before each step and written back after it."""

    def __init__(self, places: Places, first: int, end: int, recipe: Recipe, device: torch.device) -> None:
        self._views = [
            (parameter, view)
            for place in places.by_name.values()
            for parameter, view in ((place.b, (slice(None), slice(first, end))), (place.a, (slice(first, end),)))
        ]
        copies = [nn.Parameter(parameter.detach()[view].clone()) for parameter, view in self._views]
        self._inner, _, _ = build_optimizer(nn.ParameterList(copies), recipe, device)
        self._copies = copies

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self._inner.param_groups

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._inner.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter, _ in self._views:
            parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for copy, (parameter, view) in zip(self._copies, self._views, strict=True):
            copy.copy_(parameter[view])
            copy.grad = None if parameter.grad is None else parameter.grad[view].contiguous()
        self._inner.step()
        for copy, (parameter, view) in zip(self._copies, self._views, strict=True):
            parameter[view] = copy
            copy.grad = None


def without_components_beyond(places: Places, rank: int) -> None:
    """Set the components beyond `rank` to zero: what a site of that rank has under `fedit`."""
    with torch.no_grad():
        for place in places.by_name.values():
            place.b[:, rank:] = 0.0
            place.a[rank:] = 0.0
