"""A target opened for use: loaded whole, or, where its 4-bit base does not fit, with its layers streamed.

The run's own recipe decides, as in training: `offload` and, on a GPU, `max_memory`; the command line may change them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from thriftune.data import stop_token_ids
from thriftune.engine.passing import Wanted, bytes_of_token, pass_over
from thriftune.engine.room import free_bytes
from thriftune.engine.takes import FAMILIES
from thriftune.errors import DoesNotFitError, InputError
from thriftune.models import describe_model
from thriftune.models.load import ModelDescription, choose_dtype
from thriftune.models.shell import load_shell
from thriftune.models.store import Store
from thriftune.plan.memory import NF4_BYTES
from thriftune.recipe import Recipe
from thriftune.run_path import hold_memory
from thriftune.target import OpenedTarget, Target, attach_adapter, open_target
from thriftune.units import format_bytes

LEAST_BESIDE_BYTES = 1024**3  # for a row's cache, what is computed with, and what the allocator cannot use

Say = Callable[[str], None]


def open_for_use(target: Target, recipe: Recipe, device: torch.device, *, alone: bool, say: Say) -> OpenedTarget:
    """Open a target whole where that fits, else with its layers streamed; `say` is told then.

    `recipe` is the target's with what the command line changed. `alone`: one row at a time will be answered, so as many
    layers stay as fit beside it; else half of what is free is for rows. What is opened is to be closed. Raises what
    loading raises, and DoesNotFitError where host memory holds too little to stream from.
    """
    hold_memory(device, recipe, 0)
    if not target.four_bit:
        return open_target(target, device)
    description = describe_model(target.base)
    if not _streams(target, recipe, description, device):
        return open_target(target, device)
    dtype = choose_dtype(target.base, device)
    store = Store.of(description.folder, description.num_layers, target.recipe.quant, dtype, device)
    store.make(say)
    tokens = recipe.data.max_length + recipe.generation.max_new_tokens
    tokens = min(tokens, description.max_positions or tokens)
    try:
        loaded = load_shell(target.base, device=device, dtype=dtype, quant=None)
        base: Any = loaded.model
        model = attach_adapter(base, target.adapter) if target.adapter else base
        token_bytes = bytes_of_token(base.config, dtype.itemsize)
        wanted = Wanted(recipe.resident_layers, token_bytes, tokens if alone else None)
        passing = pass_over(base, store, device, wanted, say)
    except torch.OutOfMemoryError:
        raise DoesNotFitError(
            given=f"{target.base.name} with its head, embedding and the layers that stay on {device} runs out of "
            f"memory; a layer takes {format_bytes(store.bytes // description.num_layers)}",
            allowed="as many layers on the device as fit beside the head and the embedding",
            do="name fewer with offload='{resident_layers: N}', or close other programs",
        ) from None
    resident, layers = len(passing.streaming.resident), description.num_layers
    say(f"offload: {resident} of {layers} layers stay on the device, {layers - resident} are streamed at each token")
    stops = stop_token_ids(loaded.tokenizer, base.generation_config)
    tokenizer, close = loaded.tokenizer, passing.close
    return OpenedTarget(target, model.eval(), tokenizer, loaded, stops, passing.rows_at_once, layers - resident, close)


def _streams(target: Target, recipe: Recipe, description: ModelDescription, device: torch.device) -> bool:
    """Whether the recipe has layers streamed, or does not forbid it and the 4-bit model does not fit.

    Raises InputError where the recipe names layers that stay and the model is none that can be streamed."""
    kind = description.model_type
    can = kind in FAMILIES
    if recipe.resident_layers is not None and not can:
        raise InputError(
            given=f"offload={recipe.offload} and a model of type {kind}",
            allowed=f"streamed layers of {', '.join(FAMILIES)}",
            do="use offload=off on a device that holds the model",
        )
    if not can or recipe.offload == "off":
        return False
    free = free_bytes(device)
    return recipe.resident_layers is not None or (free is not None and four_bit_bytes(target, description) > free)


def four_bit_bytes(target: Target, description: ModelDescription) -> int:
    """What the model takes on a GPU when it is loaded whole in 4 bits, with the least beside it."""
    each = NF4_BYTES[target.recipe.quant.bnb_4bit_use_double_quant]
    others = description.total_parameters - description.linear_parameters
    return round(description.linear_parameters * each) + 2 * others + LEAST_BESIDE_BYTES
