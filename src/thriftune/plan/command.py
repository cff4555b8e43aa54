"""The `thriftune train` line that runs what was planned."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

from thriftune.recipe import Recipe
from thriftune.recipe.read import FLAT
from thriftune.recipe.strict_yaml import parse_yaml
from thriftune.records import PlannedMethod

PINNED = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
STAND_IN = "rows.jsonl"  # where a plan was made without data


def settled(recipe: Recipe, plan: PlannedMethod) -> Recipe:
    """The recipe with the plan's method and settings in it."""
    train = recipe.train.model_copy(update={name: plan.settings[name] for name in PINNED})
    return recipe.model_copy(update={"method": plan.method, "train": train})


def train_command(recipe: Recipe, plan: PlannedMethod, gpus: int, data_named: bool) -> str:
    """The line, quoted for a shell. Without named data `rows.jsonl` stands for a person's own."""
    words = train_words(settled(recipe, plan), data_named)
    launcher = ["thriftune"] if gpus == 1 else ["torchrun", "--nproc-per-node", str(gpus), "-m", "thriftune"]
    return shlex.join([*launcher, "train", *words])


def train_words(recipe: Recipe, data_named: bool) -> list[str]:
    """The arguments of `train` that read back to this recipe: what differs from the defaults, and what was planned."""
    name = recipe.model.name
    words = [f"model.name={name}" if "=" in name else name]
    words += ["--data", recipe.data.name if data_named else STAND_IN, "--method", recipe.method]
    for place, value, default in _leaves(recipe):
        leaf = place.rpartition(".")[2]
        if place in ("model.name", "data.name", "method") or (value == default and leaf not in PINNED):
            continue
        if recipe.method == "full" and place.startswith("lora."):
            continue
        key = leaf if FLAT.get(leaf) == place and place.startswith(("data.", "train.")) else place
        words.append(f"{key}={_as_yaml(value)}")
    return words


def _leaves(recipe: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """(dotted place, value, default) of every option."""
    values, defaults = recipe.dump(), Recipe().dump()
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(defaults[name], dict):
            for leaf, inner in value.items():
                yield f"{name}.{leaf}", inner, defaults[name][leaf]
        else:
            yield name, value, defaults[name]


def _as_yaml(value: Any) -> str:
    """JSON is YAML; a text that YAML would read as that text needs no quotes."""
    if isinstance(value, str):
        try:
            plain = parse_yaml(value) == value
        except ValueError:
            plain = False
        return value if plain else json.dumps(value)
    return json.dumps(value)
