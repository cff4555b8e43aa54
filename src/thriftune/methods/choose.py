"""Which method, when the recipe says auto: the first of lora, qlora whose bytes fit in free memory.

A simple sum, weights + adapter with its gradients and moments + a fixed allowance for activations; the planner
replaces it.
"""

from __future__ import annotations

import psutil
import torch

from thriftune.errors import DoesNotFitError
from thriftune.models.load import ModelDescription
from thriftune.recipe import MethodName, Recipe
from thriftune.units import GIB, format_bytes

NF4_BITS_PER_WEIGHT = 4.127  # 4 bits, one 8-bit scale per 64 weights, one float32 per 256 scales
ADAPTER_BYTES_PER_PARAMETER = 16  # float32 weight, gradient and two moments


def free_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def bytes_needed(method: MethodName, description: ModelDescription, recipe: Recipe, weight_bytes: int) -> int:
    """Weights, adapter and a tenth of the weights plus half a GiB for what the step needs beside them."""
    linear, other = description.linear_parameters, description.total_parameters - description.linear_parameters
    if method == "full":
        return description.total_parameters * 16
    if method == "qlora":
        weights = linear * NF4_BITS_PER_WEIGHT / 8 + other * weight_bytes
    else:
        weights = description.total_parameters * weight_bytes
    adapter = recipe.lora.r * description.linear_sides * ADAPTER_BYTES_PER_PARAMETER
    return int(weights * 1.1 + adapter + GIB // 2)


def choose_method(
    recipe: Recipe, description: ModelDescription, device: torch.device, weight_bytes: int
) -> tuple[MethodName, str]:
    """The method and the reason in words. Raises DoesNotFitError when not even qlora fits."""
    if recipe.method != "auto":
        return recipe.method, "asked for"
    free = free_memory_bytes(device)
    needs = {}
    candidates: tuple[MethodName, ...] = ("lora", "qlora")
    for method in candidates:
        needs[method] = bytes_needed(method, description, recipe, weight_bytes)
        if needs[method] <= free:
            return method, f"needs about {format_bytes(needs[method])} of {format_bytes(free)} free on {device}"
    raise DoesNotFitError(
        given=f"{recipe.model.name} needs about {format_bytes(needs['qlora'])} even with qlora; {device} has "
        f"{format_bytes(free)} free",
        allowed="a model whose 4-bit weights and adapter fit in free memory",
        do="close other programs, take a smaller model, or name the method yourself to try all the same",
    )


def needs_checkpointing(
    description: ModelDescription, rows_at_once: int, longest: int, device: torch.device, value_bytes: int
) -> bool:
    """Whether a micro-batch's activations would take more than 80 % of the memory that is free after loading.

    Saved a token and layer: about 14 vectors of the hidden and 5 of the intermediate size; then the targets' logits and
    their gradient. Read from transformers' Llama with LoRA on all linears; the recovery corrects what this misses.
    """
    tokens = rows_at_once * longest
    a_layer = 14 * description.hidden_size + 5 * description.intermediate_size
    activations = tokens * (description.num_layers * a_layer + 2 * description.vocab_size) * value_bytes
    return activations > 0.8 * free_memory_bytes(device)
