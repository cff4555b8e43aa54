"""The typed recipe of a run: schema and defaults (`schema.py`), and how it is read and written (`read.py`)."""

from thriftune.recipe.dynamic import contradictions_of_dynamic, cut_schedule
from thriftune.recipe.federated import FederatedRecipe
from thriftune.recipe.nearest import did_you_mean
from thriftune.recipe.read import dump_yaml, option_place, read_recipe
from thriftune.recipe.schema import (
    DataRecipe,
    DynamicRecipe,
    GenerationRecipe,
    LoraRecipe,
    MethodName,
    ModelRecipe,
    QuantRecipe,
    Recipe,
    TrainRecipe,
)

__all__ = [
    "DataRecipe",
    "DynamicRecipe",
    "FederatedRecipe",
    "GenerationRecipe",
    "LoraRecipe",
    "MethodName",
    "ModelRecipe",
    "QuantRecipe",
    "Recipe",
    "TrainRecipe",
    "contradictions_of_dynamic",
    "cut_schedule",
    "did_you_mean",
    "dump_yaml",
    "option_place",
    "read_recipe",
]
