"""The typed recipe of a run: schema and defaults (`schema.py`), and how it is read and written (`read.py`)."""

from thriftune.recipe.federated import FederatedRecipe
from thriftune.recipe.read import dump_yaml, option_place, read_recipe
from thriftune.recipe.schema import (
    DataRecipe,
    GenerationRecipe,
    LoraRecipe,
    MethodName,
    ModelRecipe,
    QuantRecipe,
    Recipe,
    TrainRecipe,
    did_you_mean,
)

__all__ = [
    "DataRecipe",
    "FederatedRecipe",
    "GenerationRecipe",
    "LoraRecipe",
    "MethodName",
    "ModelRecipe",
    "QuantRecipe",
    "Recipe",
    "TrainRecipe",
    "did_you_mean",
    "dump_yaml",
    "option_place",
    "read_recipe",
]
