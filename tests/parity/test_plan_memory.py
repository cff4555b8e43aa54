"""The planner's activation formula against what autograd really keeps: every saved tensor of a layer, counted once."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from thriftune.methods import METHODS
from thriftune.models import LoadedModel
from thriftune.models.load import ModelDescription
from thriftune.plan.adapter import adapter_of
from thriftune.plan.memory import Setup, layer_saved
from thriftune.recipe import Recipe
from thriftune.shapes import from_config

ROWS, LENGTH = 2, 96
SIZES = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 672,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def kept_bytes(kind: str, layers: int, method: str, lora: dict[str, object]) -> int:
    """Bytes that a forward pass under bfloat16 autocast keeps for its backward pass, parameters not among them."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, num_hidden_layers=layers, **SIZES), dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    network.requires_grad_(False)
    description = ModelDescription(
        folder=None,
        model_type=kind,
        total_parameters=0,
        linear_parameters=0,
        linear_sides=0,
        hidden_size=256,
        intermediate_size=672,
        num_layers=layers,
        vocab_size=320,
        max_positions=256,
        stored_dtype="BF16",
    )
    loaded = LoadedModel(network, None, description, torch.device("cpu"), torch.bfloat16, False, 0.0)
    model = METHODS[method].attach(loaded, Recipe(method=method, lora=lora)).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    own |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    weights = {tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim == 2}
    kept: dict[
        int, torch.UntypedStorage
    ] = {}  # the storages themselves, so that none is freed and its place used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_cast_weight = tuple(tensor.shape) in weights or tuple(tensor.T.shape if tensor.ndim == 2 else ()) in weights
        if storage.data_ptr() not in own and not is_cast_weight:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(4, 320, (ROWS, LENGTH))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ):
        if method == "full":
            model(input_ids=tokens, use_cache=False)
        else:
            from peft.helpers import disable_input_dtype_casting

            with disable_input_dtype_casting(model):
                model(input_ids=tokens, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("method", "lora"),
    [
        ("lora", {}),
        ("lora", {"r": 64}),
        ("lora", {"target_modules": ["q_proj", "v_proj"]}),
        ("lora", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
        ("full", {}),
    ],
)
def test_a_layer_keeps_what_the_formula_says(kind, method, lora):
    recipe = Recipe(method=method, lora=lora)
    shape = from_config({"model_type": kind, "num_hidden_layers": 2, **SIZES}, kind)
    adapter = adapter_of(shape, recipe.lora, method)
    setup = Setup(
        method=method,
        checkpointing=False,
        optimizer="adamw_torch",
        value_bytes=2,
        double_quant=True,
        dropout=0.0,
        eager_attention=False,
        fp8=False,
    )
    layer, _ = shape.layers[0]
    planned = layer_saved(layer, 256, adapter, setup, LENGTH) * ROWS * LENGTH
    found = (kept_bytes(kind, 5, method, lora) - kept_bytes(kind, 3, method, lora)) / 2
    assert planned == pytest.approx(found, rel=0.02)
