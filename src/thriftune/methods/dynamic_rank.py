"""LoRA whose rank falls while it trains: it starts at dynamic.r_start and ends with dynamic.keep of its parameters.

Between steps, as `cut_schedule` says, every module's factors are turned into the singular basis of their product, and
of all modules' directions those with the most energy a parameter stay (`cuts.py`). What goes is really gone: parameter,
gradient and optimizer state are smaller from there on, and a module of which nothing stays loses its adapter. The scale
alpha / r_start is that of the start for ever, so that a falling rank changes no step size. After LoRA-Squeeze (2026,
arXiv:2602.10993), with one budget for all modules and with Adam's moments carried along (`train/moments.py`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from thriftune.errors import CheckpointError, RecipeError
from thriftune.methods.base import ModelChange, Replacement, trainable_parameters
from thriftune.methods.cuts import Turned, directions_to_keep, energy, turned
from thriftune.methods.lora import CONFIG_FILE, LoraMethod, load_adapter_weights, save_adapter
from thriftune.methods.ranked import config_of_ranks, ranks_of_config
from thriftune.models import LoadedModel
from thriftune.recipe import Recipe, cut_schedule

ADAPTER = "default"
SIZES = "adapted_sizes"  # attribute of the model: parameters of one direction of each adapted module, by name


@dataclasses.dataclass(frozen=True)
class DynamicRankMethod:
    name: str = "dynamic"
    four_bit: bool = False
    result_folder: str = "adapter"

    def attach(self, loaded: LoadedModel, recipe: Recipe) -> nn.Module:
        start = recipe.model_copy(update={"lora": recipe.adapter_at_start(self.name)})
        model = LoraMethod(self.name, self.four_bit).attach(loaded, start)
        sizes = {name: layer.in_features + layer.out_features for name, layer in _layers(model)}
        if problems := _what_cannot_work(model, recipe, sizes):
            raise RecipeError(problems, "the recipe")
        setattr(model, SIZES, sizes)
        return model

    def between_steps(self, recipe: Recipe, step: int, steps: int) -> Callable[[nn.Module], ModelChange] | None:
        share = cut_schedule(recipe.dynamic, steps).get(step)
        return None if share is None else partial(_cut, recipe=recipe, step=step, share=share)

    def save(self, model: nn.Module, folder: Path) -> None:
        layers = dict(_layers(model))
        scales = {name: float(layer.scaling[ADAPTER]) for name, layer in layers.items()}
        config: Any = model.peft_config[ADAPTER]  # type: ignore[index]
        save_adapter(model, folder, config_of_ranks(config, {name: rank_of(layers[name]) for name in layers}, scales))

    def load(self, model: nn.Module, folder: Path) -> None:
        """Into a model as `attach` gives it or with the same ranks; it takes those that were saved."""
        saved = _saved_ranks(folder)
        layers = dict(_layers(model))
        for name, (rank, scale) in saved.items():
            layer = layers.get(name)
            if layer is None or rank > rank_of(layer) or not math.isclose(scale, layer.scaling[ADAPTER]):
                raise CheckpointError(
                    given=f"{folder / CONFIG_FILE} does not belong to this model and recipe: {name} has rank {rank} "
                    f"and scale {scale:g}",
                    allowed="the scale of this recipe, and the ranks of its start or what cuts left of them",
                    do="use the model and the recipe that it was trained with",
                )
        for name, layer in layers.items():
            a, b = factors(layer)
            rank = saved[name][0] if name in saved else 0
            if rank < a.shape[0]:  # the values come from the file
                _put(model, name, layer, a.detach()[:rank].clone(), b.detach()[:, :rank].clone())
        load_adapter_weights(model, folder)

    def export(self, model: nn.Module, loaded: LoadedModel, folder: Path) -> None:
        self.save(model, folder)
        loaded.tokenizer.save_pretrained(str(folder))


def factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of an adapted linear."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def rank_of(layer: Any) -> int:
    return int(factors(layer)[0].shape[0])


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The adapted linears by their names in the base model."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _what_cannot_work(model: nn.Module, recipe: Recipe, sizes: dict[str, int]) -> list[str]:
    problems = []
    embeddings = [name for name, layer in _layers(model) if ADAPTER not in layer.lora_A]
    if embeddings:
        problems.append(f"lora.target_modules: {embeddings[0]} is no linear, and method dynamic cuts linears only")
    dynamic = recipe.dynamic
    smallest = min(dynamic.round_to, dynamic.r_start) * min(sizes.values())
    if dynamic.keep * trainable_parameters(model) < smallest:
        problems.append(
            f"dynamic.keep {dynamic.keep} of {trainable_parameters(model):,} parameters is less than one block of "
            f"dynamic.round_to {dynamic.round_to} directions ({smallest:,}); raise keep or lower round_to"
        )
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        problems.append("method dynamic runs in one process; start it without torchrun, or use method lora")
    return problems


def _cut(model: nn.Module, *, recipe: Recipe, step: int, share: float) -> ModelChange:
    """Cut the adapters to `share` of the parameters that they started with."""
    dynamic, sizes = recipe.dynamic, getattr(model, SIZES)
    layers = dict(_layers(model))
    with torch.no_grad():
        views = {}
        for name, layer in layers.items():
            a, b = factors(layer)
            views[name] = turned(b, a)
        kept = directions_to_keep(
            _worth(views, sizes, recipe, step),
            sizes,
            budget=int(share * dynamic.r_start * sum(sizes.values())),
            block=dynamic.round_to,
            least=dynamic.min_rank,
        )
        replacements: list[Replacement] = []
        for name, layer in layers.items():
            if len(kept[name]) < rank_of(layer):
                replacements += _cut_one(model, name, layer, views[name], kept[name])
    left = dict(_layers(model))
    ranks = {name: rank_of(left[name]) if name in left else 0 for name in sizes}
    return ModelChange(share, ranks, replacements)


def _worth(views: dict[str, Turned], sizes: dict[str, int], recipe: Recipe, step: int) -> dict[str, Tensor]:
    if recipe.dynamic.score == "energy":
        return {name: energy(view.values_K, sizes[name]) for name, view in views.items()}
    draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    return {name: torch.rand(view.values_K.shape, generator=draw) for name, view in views.items()}


def _cut_one(model: nn.Module, name: str, layer: Any, view: Turned, directions: list[int]) -> list[Replacement]:
    old_a, old_b = factors(layer)
    outward_RS, inward_SR = view.kept(directions)
    new_a, new_b = (inward_SR @ old_a.double()).float(), (old_b.double() @ outward_RS).float()
    put_a, put_b = _put(model, name, layer, new_a, new_b)
    return [Replacement(old_a, put_a, left=outward_RS.T), Replacement(old_b, put_b, right=inward_SR.T)]


def _put(
    model: Any, name: str, layer: Any, a_SI: Tensor, b_OS: Tensor
) -> tuple[nn.Parameter, nn.Parameter] | tuple[None, None]:
    """Give a module these factors; without a direction, take its adapter off."""
    rank = a_SI.shape[0]
    if rank == 0:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_base_model().get_submodule(parent), leaf, layer.base_layer)
        return None, None
    inner, outer = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    inner.weight, outer.weight = nn.Parameter(a_SI), nn.Parameter(b_OS)
    inner.out_features = outer.in_features = rank
    layer.r[ADAPTER] = rank
    layer.lora_alpha[ADAPTER] = layer.scaling[ADAPTER] * rank  # the scale itself stays
    return inner.weight, outer.weight


def _saved_ranks(folder: Path) -> dict[str, tuple[int, float]]:
    path = folder / CONFIG_FILE
    try:
        return ranks_of_config(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            given=f"{path} does not belong to this model and recipe: it has no rank for each module ({error})",
            allowed="a checkpoint that a run of method dynamic wrote",
            do="use the model and the recipe that it was trained with",
        ) from None
