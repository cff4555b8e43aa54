"""What `eval`, `chat`, `predict` and `merge` are pointed at: a run's folder, an adapter, a checkpoint, or a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thriftune.data import stop_token_ids
from thriftune.errors import InputError, ModelError
from thriftune.methods import METHODS, load_adapter_weights
from thriftune.models import LoadedModel, load_model
from thriftune.models.load import choose_dtype
from thriftune.recipe import ModelRecipe, QuantRecipe, Recipe, read_recipe

ALLOWED_TARGET = "a run's folder, an adapter's folder, a checkpoint, a model's folder, a hub id, or pocket"


@dataclass(frozen=True)
class Target:
    """Where the weights are, before anything is loaded. `recipe` is the run's own, or the default one."""

    name: str
    recipe: Recipe
    base: ModelRecipe
    adapter: Path | None
    four_bit: bool
    is_run: bool


@dataclass(frozen=True)
class OpenedTarget:
    target: Target
    model: nn.Module
    tokenizer: Any
    loaded: LoadedModel
    stop_token_ids: list[int]


def find_target(name: str) -> Target:
    """What a name or folder stands for. Raises InputError when a run has no result yet."""
    folder = Path(name).expanduser()
    if (folder / "recipe.yaml").is_file():
        return _run_target(folder)
    if (folder / "adapter_config.json").is_file():
        run = folder.parent
        recipe = read_recipe(run / "recipe.yaml") if (run / "recipe.yaml").is_file() else None
        if recipe is None:
            base = ModelRecipe(name=_base_of_adapter(folder))
            return Target(name, Recipe(model=base), base, folder, False, False)
        return Target(name, recipe, recipe.model, folder, METHODS[recipe.method].four_bit, True)
    base = ModelRecipe(name=name)
    return Target(name, Recipe(model=base), base, None, False, False)


def _run_target(folder: Path) -> Target:
    recipe = read_recipe(folder / "recipe.yaml")
    method = METHODS.get(recipe.method)
    result = folder / method.result_folder if method else None
    if method is None or result is None or not result.is_dir():
        raise InputError(
            given=f"run {folder} has no result yet", allowed="a run that was trained to its end, or one of its checkpoints",
            do=f"finish it: thriftune train --config {folder / 'recipe.yaml'} resume_from_checkpoint=auto",
        )
    if recipe.method == "full":
        base = recipe.model.model_copy(update={"name": str(result)})
        return Target(str(folder), recipe, base, None, False, True)
    return Target(str(folder), recipe, recipe.model, result, method.four_bit, True)


def _base_of_adapter(folder: Path) -> str:
    path = folder / "adapter_config.json"
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise ModelError(given=f"{path} names no base_model_name_or_path", allowed="an adapter folder written by PEFT",
                         do="write the base model's name into it")
    return base


def open_target(target: Target, device: torch.device) -> OpenedTarget:
    """Load the base as it was trained on (4-bit for qlora) with the adapter on top, ready for inference."""
    loaded = load_base(target, device)
    model = attach_adapter(loaded.model, target.adapter) if target.adapter else loaded.model
    model.eval()
    stops = stop_token_ids(loaded.tokenizer, getattr(loaded.model, "generation_config", None))
    return OpenedTarget(target, model, loaded.tokenizer, loaded, stops)


def load_base(target: Target, device: torch.device) -> LoadedModel:
    quant: QuantRecipe | None = target.recipe.quant if target.four_bit else None
    return load_model(target.base, device=device, dtype=choose_dtype(target.base, device), quant=quant)


def attach_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """A PEFT model over `base` with the folder's adapter in it, every tensor accounted for.

    Raises ModelError when the adapter's configuration is no LoRA one, CheckpointError for missing or unexpected tensors.
    """
    from peft import PeftConfig, get_peft_model

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(
            given=f"{folder / 'adapter_config.json'} cannot be read: {str(error).splitlines()[0]}",
            allowed="an adapter folder written by PEFT", do="write it again, or take the run's other checkpoint",
        ) from None
    config.init_lora_weights = True  # the start does not matter, and others would rewrite the base
    model: nn.Module = get_peft_model(base, config)
    load_adapter_weights(model, folder)
    model.requires_grad_(False)
    return model
