"""A coordinator and sites in one process, their messages handed over by the test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from thriftune.federated.coordinator import Coordinator
from thriftune.federated.site import Base, Site, open_base, recipe_of_rounds
from thriftune.recipe import Recipe
from thriftune.run import Prepared, prepare_run
from tiny import tiny_recipe


def recipe_of(model: Path, rows: Path, output: Path, *, rounds: int = 3, **sections: Any) -> Recipe:
    federated = {"rounds": rounds, "local_steps": 2, **sections.pop("federated", {})}
    steps = federated["rounds"] * federated["local_steps"]
    train = {"max_steps": steps, **sections.pop("train", {})}
    return tiny_recipe(model, rows, output, federated=federated, train=train, **sections)


class Federation:
    def __init__(self, recipe: Recipe, ranks: dict[str, int]) -> None:
        self.prepared: Prepared = prepare_run(recipe_of_rounds(recipe))
        self.output = Path(self.prepared.recipe.output or "")
        self.coordinator = Coordinator(self.prepared.recipe, ranks, self.output, None)
        self.base: Base = open_base(self.prepared, self.output, lambda text: None)

    def site(self, name: str, keeps: bool = False) -> Site:
        folder = self.output / name
        return Site(self.base, name, self.prepared.data.train, folder, [], keeps)


def gradient_of(base: Base, examples: Sequence[Any], targets: int) -> list[Tensor]:
    for parameter in base.job.trainable:
        parameter.grad = None
    base.path.add_gradients(examples, targets)
    gradients = [parameter.grad for parameter in base.job.trainable if parameter.grad is not None]
    for parameter in base.job.trainable:
        parameter.grad = None
    return gradients
