"""What a method is: how a loaded model becomes trainable, and how what was trained is written and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from thriftune.models import LoadedModel
from thriftune.recipe import Recipe


@dataclass(frozen=True)
class Replacement:
    """A trained parameter that another one takes the place of, or, where `new` is None, none. A gradient of the new one
    is `left` @ the old one's @ `right`; None stands for the identity."""

    old: nn.Parameter
    new: nn.Parameter | None
    left: Tensor | None = None
    right: Tensor | None = None


@dataclass(frozen=True)
class ModelChange:
    """What a method did to its model between two steps. `ranks` has those of all adapted modules by name, 0 for what
    lost its adapter; `share` of the parameters at the start was allowed to stay."""

    share: float
    ranks: dict[str, int]
    replacements: list[Replacement]


class Method(Protocol):
    """One way to adapt a model. `four_bit` says that the base is loaded quantised."""

    @property
    def name(self) -> str: ...

    @property
    def four_bit(self) -> bool: ...

    @property
    def result_folder(self) -> str:
        """The folder under the run: 'adapter' or 'model'."""
        ...

    def attach(self, loaded: LoadedModel, recipe: Recipe) -> nn.Module:
        """The model to train: exactly the intended parameters require gradients, and they are float32.

        The same seed gives the same start. Raises RecipeError for options the method cannot honour.
        """
        ...

    def between_steps(self, recipe: Recipe, step: int, steps: int) -> Callable[[nn.Module], ModelChange] | None:
        """What is to be done to the model after `step` of so many steps, before anything is measured or saved; None for
        nothing. It may put other parameters in the place of trained ones; there are no gradients then."""
        ...

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what training changed, without loss, into an existing folder. `load` reads it back bit for bit."""
        ...

    def load(self, model: nn.Module, folder: Path) -> None:
        """Read what `save` wrote into an attached model. Raises CheckpointError for missing or unexpected tensors."""
        ...

    def export(self, model: nn.Module, loaded: LoadedModel, folder: Path) -> None:
        """Write the result for others: a plain PEFT adapter, or a whole model, with its tokenizer and template."""
        ...


def trainable_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
