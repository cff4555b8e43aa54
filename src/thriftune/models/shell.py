"""A model without the weights of its layers' linears: what an engine that streams them needs beside the store.

Norms, biases and the head lie on the device. For training the linears are bitsandbytes' own with nothing in them, so
PEFT puts its adapters on them as on any 4-bit model; the input embedding lies on the host unless it is the head too,
and whoever calls the model itself is refused. For use they are ordinary linears, which get their weights while their
layer runs, and the embedding lies on the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thriftune.errors import ModelError
from thriftune.model_files import tensor_shapes, weight_files
from thriftune.models.load import (
    LoadedModel,
    check_vocabulary,
    describe_model,
    load_tokenizer,
    refuse_unfilled,
)
from thriftune.models.outline import build_empty, generation_config_of
from thriftune.models.surgery import keep_four_bit_weights_as_they_are
from thriftune.recipe import ModelRecipe, QuantRecipe


def load_shell(
    model: ModelRecipe, *, device: torch.device, dtype: torch.dtype, quant: QuantRecipe | None
) -> LoadedModel:
    """Load all of a model but its layers' linears: for training with the way of quantising, for use with None. Raises
    ModelError as `load_model` does."""
    from transformers import AutoConfig

    started = time.perf_counter()
    description = describe_model(model)
    tokenizer = load_tokenizer(model, description.folder)
    config = AutoConfig.from_pretrained(description.folder, local_files_only=True)
    network: Any = empty_shell(config, device=device, dtype=dtype, attention=model.attn_implementation, quant=quant)
    on_device = quant is None or bool(config.tie_word_embeddings)
    for name, tensor in _others(network, description.folder):
        fill(network, name, tensor.to(dtype) if tensor.is_floating_point() else tensor, device, on_device)
    finish = settle if quant is None else finish_shell
    finish(network, device)
    network.generation_config = generation_config_of(network, description.folder)
    missing = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    refuse_unfilled({"missing_keys": missing}, description)
    check_vocabulary(network, tokenizer, description.folder)
    return LoadedModel(
        model=network,
        tokenizer=tokenizer,
        description=description,
        device=device,
        base_dtype=dtype,
        four_bit=True,
        load_s=time.perf_counter() - started,
    )


def empty_shell(
    config: Any, *, device: torch.device, dtype: torch.dtype, attention: str, quant: QuantRecipe | None
) -> nn.Module:
    """The model of a configuration with nothing in it, its layers' linears as they stay."""
    network = build_empty(config, dtype, attention)
    head = network.get_output_embeddings()
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            empty = _plain(module, device, dtype) if quant is None else _without_weight(module, device, dtype, quant)
            network.set_submodule(name, empty)
    result: nn.Module = network
    return result


def fill(network: Any, name: str, tensor: Tensor, device: torch.device, embedding_on_device: bool) -> None:
    """Put a tensor in its place, the input embedding on the host unless it belongs on the device."""
    path, _, leaf = name.rpartition(".")
    owner = network.get_submodule(path)
    on_host = owner is network.get_input_embeddings() and not embedding_on_device
    place = torch.device("cpu") if on_host else device
    setattr(owner, leaf, nn.Parameter(tensor.to(place), requires_grad=False))


def finish_shell(network: Any, device: torch.device) -> None:
    """What a shell for training needs after it is filled, the refusal to be called among it."""
    settle(network, device)
    network.is_loaded_in_4bit = True
    keep_four_bit_weights_as_they_are(network)
    network.register_forward_pre_hook(_refuse_to_be_called)


def settle(network: Any, device: torch.device) -> None:
    """Buffers (positions' frequencies) to the device, and ties."""
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    network.tie_weights()
    network.requires_grad_(False)
    network.eval()


def _without_weight(module: nn.Linear, device: torch.device, dtype: torch.dtype, quant: QuantRecipe) -> nn.Module:
    """A weight of the right shape whose elements are one and the same byte: it takes no memory, and bitsandbytes'
    product refuses it, for it has no scales."""
    import bitsandbytes

    how = {"compress_statistics": quant.bnb_4bit_use_double_quant, "quant_type": quant.bnb_4bit_quant_type}
    four_bit = bitsandbytes.nn.Linear4bit(
        module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=dtype, device="meta", **how
    )
    nothing = torch.zeros(1, 1, dtype=torch.uint8, device=device).expand(module.out_features, module.in_features)
    four_bit.weight = bitsandbytes.nn.Params4bit(nothing, requires_grad=False, bnb_quantized=True, **how)
    result: nn.Module = four_bit
    return result


def _plain(module: nn.Linear, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """An ordinary linear whose weight is one element that is no number: it takes no memory, and whoever computes with
    it before it has a weight sees that."""
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta", dtype=dtype)
    nothing = torch.full((1, 1), float("nan"), dtype=dtype, device=device).expand(linear.weight.shape)
    linear.weight = nn.Parameter(nothing, requires_grad=False)
    return linear


def _others(network: nn.Module, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """What the files hold for parameters that are still to be filled."""
    from safetensors import safe_open

    wanted = {name: parameter.shape for name, parameter in network.named_parameters() if parameter.is_meta}
    for path in weight_files(folder):
        names = [name for name in tensor_shapes(path) if name in wanted]
        with safe_open(path, framework="pt") as file:
            for name in names:
                tensor = file.get_tensor(name)
                if tensor.shape == wanted[name]:
                    yield name, tensor


def _refuse_to_be_called(*_: Any) -> None:
    raise ModelError(
        given="this model's layers are streamed: its own forward pass, and what generates with it, cannot be used",
        allowed="training, and the eval loss during training, through the engine",
        do="use the adapter that the run writes: thriftune eval, predict or chat with the run's folder",
    )
