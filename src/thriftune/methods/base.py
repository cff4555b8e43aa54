"""What a method is: how a loaded model becomes trainable, and how what was trained is written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import nn

from thriftune.models import LoadedModel
from thriftune.recipe import Recipe


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
