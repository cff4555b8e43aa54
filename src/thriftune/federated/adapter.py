"""An adapter's factors read from a model and written into it; and a model that has an adapter but no weights.

The coordinator needs the adapter's names, shapes, start and files, and never the base: `hollow_model` builds the model
with every weight one number, seen in the weight's shape. The adapter's start is drawn as over the whole model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thriftune.errors import InputError
from thriftune.federated.aggregate import Adapter, Factors
from thriftune.methods import METHODS
from thriftune.models import LoadedModel, describe_model, load_tokenizer
from thriftune.recipe import Recipe


@dataclass(frozen=True)
class Place:
    """Where one pair of factors lives in a model: `a` is rank x in, `b` out x rank."""

    a: nn.Parameter
    b: nn.Parameter


@dataclass(frozen=True)
class Places:
    """Every pair of factors by its module's name, in the model's order, all of rank `rank` and with one `scale`."""

    by_name: Mapping[str, Place]
    rank: int
    scale: float

    def read(self) -> dict[str, Factors]:
        """Copies on the CPU, float32."""
        return {
            name: Factors(place.b.detach().cpu().clone(), place.a.detach().cpu().clone())
            for name, place in self.by_name.items()
        }

    def write(self, adapter: Adapter) -> None:
        with torch.no_grad():
            for name, place in self.by_name.items():
                place.b.copy_(adapter[name].b_OR)
                place.a.copy_(adapter[name].a_RI)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each matrix."""
        return {name: (place.b.shape[0], place.a.shape[1]) for name, place in self.by_name.items()}

    def fingerprint(self) -> str:
        """Equal where the same factors would be sent in the same order."""
        text = json.dumps([self.rank, self.scale, [[name, *shape] for name, shape in self.shapes().items()]])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_places(model: nn.Module) -> Places:
    """The factors of a model with a plain LoRA on it. Raises InputError when more than plain factors would be trained,
    or when ranks or scales differ from module to module."""
    found: dict[str, Place] = {}
    scales, ranks = set(), set()
    for name, module in model.named_modules():
        factors = getattr(module, "lora_A", None)
        if isinstance(factors, nn.ModuleDict) and "default" in factors:
            layer: Any = module
            place = Place(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            found[name.removeprefix("base_model.model.")] = place
            scales.add(float(layer.scaling["default"]))
            ranks.add(place.a.shape[0])
    known = {id(parameter) for place in found.values() for parameter in (place.a, place.b)}
    other = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in known
    ]
    if other or len(scales) != 1 or len(ranks) != 1:
        given = f"{other[0]} is trained too" if other else f"ranks {sorted(ranks)} and scales {sorted(scales)}"
        raise InputError(
            given=f"an adapter that sites cannot share: {given}",
            allowed="plain LoRA on linears, of one rank and one alpha: no DoRA, biases, modules_to_save, rank_pattern",
            do="drop those lora options; ranks by site are given with --ranks",
        )
    return Places(found, ranks.pop(), scales.pop())


def hollow_model(recipe: Recipe) -> LoadedModel:
    """The recipe's model with no weights of its own, for its names and shapes only. Reads config.json and the
    tokenizer. Raises ModelError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    description = describe_model(recipe.model)
    trusted = recipe.model.trust_remote_code
    config = AutoConfig.from_pretrained(description.folder, trust_remote_code=trusted, local_files_only=True)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(_one_number(parameter), requires_grad=False))
    tokenizer = load_tokenizer(recipe.model, description.folder)
    return LoadedModel(network, tokenizer, description, torch.device("cpu"), torch.float32, False, 0.0)


def start_of(recipe: Recipe) -> tuple[LoadedModel, nn.Module]:
    """(the hollow base, the same with the recipe's adapter at its start)."""
    loaded = hollow_model(recipe)
    model = METHODS["lora"].attach(loaded, recipe)
    return loaded, model


def _one_number(parameter: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32).expand(parameter.shape)
