"""What `eval`, `chat`, `predict` and `merge` are pointed at: a run's folder, an adapter, a checkpoint, or a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thriftune.data import stop_token_ids
from thriftune.errors import InputError, ModelError, first_line
from thriftune.methods import METHODS, load_adapter_weights
from thriftune.methods.full import WEIGHTS_FILE
from thriftune.methods.lora import PEFT_REFUSES, REPLACES_BASE
from thriftune.models import LoadedModel, load_model, local_path
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
    """`rows_at_once` is there where layers are streamed: tokens of a row -> rows that have room at once, None where
    memory is not counted. `close` is to be called when nothing is asked of the model any more: streamed layers pin
    memory of the host until then."""

    target: Target
    model: nn.Module
    tokenizer: Any
    loaded: LoadedModel
    stop_token_ids: list[int]
    rows_at_once: Callable[[int], int | None] | None = None
    layers_streamed: int = 0
    close: Callable[[], None] = lambda: None


def find_target(name: str) -> Target:
    """What a name or folder stands for. Raises InputError when a run has no result yet, or its files are damaged."""
    folder = local_path(name)
    if folder is not None and (folder / "recipe.yaml").is_file():
        return _run_target(folder)
    if folder is not None and (folder / "adapter_config.json").is_file():
        return _adapter_target(name, folder)
    if folder is not None and (folder / WEIGHTS_FILE).is_file():
        run = folder.parent
        raise InputError(
            given=f"{folder} is a checkpoint of a full run: weights to go on from, without a model around them",
            allowed=ALLOWED_TARGET,
            do=f"use the run's result, {run}, or finish it: thriftune train --config {run / 'recipe.yaml'} "
            f"resume_from_checkpoint={folder}",
        )
    if not name:
        raise InputError(given="an empty name", allowed=ALLOWED_TARGET, do="name one of these")
    base = ModelRecipe(name=name)
    return Target(name, Recipe(model=base), base, None, False, False)


def find_adapter(name: str, verb: str) -> tuple[Target, Path]:
    """A target and its adapter, which is to be merged or shrunk. Raises InputError when it has none."""
    target = find_target(name)
    if target.adapter is not None:
        return target, target.adapter
    folder = local_path(name)
    exists = name == "pocket" or (folder is not None and folder.exists())
    raise InputError(
        given=f"{name} has no adapter to {verb}" if exists else f"{name} is no folder here (looked from {Path.cwd()})",
        allowed="the folder of a run with an adapter, or an adapter's own folder",
        do="use it as it is, or name a run of method lora, qlora or dynamic" if exists else "correct the path",
    )


def _run_target(folder: Path) -> Target:
    recipe = read_recipe(folder / "recipe.yaml")
    method = METHODS.get(recipe.method)
    result = folder / method.result_folder if method else None
    if method is None or result is None or not result.is_dir():
        raise InputError(
            given=f"run {folder} has no result yet",
            allowed="a run that was trained to its end, or one of its checkpoints",
            do=f"finish it: thriftune train --config {folder / 'recipe.yaml'} resume_from_checkpoint=auto",
        )
    if recipe.method == "full":
        base = recipe.model.model_copy(update={"name": str(result), "revision": None})
        return Target(str(folder), recipe, base, None, False, True)
    return Target(str(folder), recipe, recipe.model, result, method.four_bit, True)


def _adapter_target(name: str, folder: Path) -> Target:
    """An adapter with its run's recipe when it lies in its run's folder, else over the base that it names itself."""
    run_recipe = folder.parent / "recipe.yaml"
    if run_recipe.is_file() and (folder.name == "adapter" or folder.name.startswith("checkpoint-")):
        recipe = read_recipe(run_recipe)
        if recipe.method in METHODS:  # a run's recipe names its method; any other recipe is only a neighbour
            return Target(name, recipe, recipe.model, folder, METHODS[recipe.method].four_bit, True)
    base_name, revision = _base_of_adapter(folder)
    base = ModelRecipe(name=base_name, revision=revision)
    return Target(name, Recipe(model=base), base, folder, False, False)


def _base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """The base that adapter_config.json names, and its revision."""
    path = folder / "adapter_config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        base, revision = content["base_model_name_or_path"], content.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        base = revision = None
    if not isinstance(base, str) or not base:
        raise ModelError(
            given=f"{path} names no base_model_name_or_path",
            allowed="an adapter folder written by PEFT",
            do="write the base model's name into it",
        )
    return base, revision if isinstance(revision, str) and revision else None


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
    """A PEFT model over `base`, for inference, with the folder's adapter in it, every tensor accounted for.

    Raises ModelError when the adapter's configuration is no LoRA one or does not fit the base, CheckpointError for
    missing, unexpected, misshapen or damaged tensors.
    """
    from peft import get_peft_model

    path = folder / "adapter_config.json"
    config = adapter_config(path)
    # PEFT compares the two names and warns; which base this is was settled when the target was found.
    config.base_model_name_or_path = base.name_or_path
    # Where a start rewrote the base, the same start must do so again; otherwise it does not matter.
    if str(config.init_lora_weights).lower() not in REPLACES_BASE:
        config.init_lora_weights = True
    try:
        model: nn.Module = get_peft_model(base, config)
    except torch.OutOfMemoryError:
        raise
    except PEFT_REFUSES as error:
        raise ModelError(
            given=f"{path} does not fit the base model: {first_line(error)}",
            allowed="an adapter that was trained on this base",
            do="name the base that the adapter was trained on",
        ) from None
    load_adapter_weights(model, folder)
    model.requires_grad_(False)
    return model.eval()


def adapter_config(path: Path) -> Any:
    """The LoraConfig of an adapter's folder, read from the file alone: PEFT would look for a missing one on the hub."""
    from peft import LoraConfig, PeftConfig

    def refuse(why: str) -> ModelError:
        return ModelError(
            given=f"{path} {why}",
            allowed="the adapter_config.json of a LoRA adapter, as PEFT writes it",
            do="copy it again, or take another checkpoint of the run",
        )

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise refuse("is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(f"cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        kind = content.get("peft_type") if isinstance(content, dict) else None
        raise refuse(f"describes an adapter of type {kind}" if kind else "describes no adapter")
    try:
        config = PeftConfig.from_peft_type(**content)
    except PEFT_REFUSES as error:
        raise refuse(f"cannot be used: {first_line(error)}") from None
    if not isinstance(config, LoraConfig) or not config.target_modules:
        raise refuse("names no target modules")
    return config
