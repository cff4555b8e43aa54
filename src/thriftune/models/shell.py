"""A model without the weights of its layers' linears: what an engine that streams them needs beside the store.

Norms, biases and the head lie on the device, the input embedding on the host unless it is the head too. The linears
are bitsandbytes' own with nothing in them, so PEFT puts its adapters on them as on any 4-bit model; whoever calls the
model itself is refused.
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
from thriftune.models.outline import build_empty
from thriftune.models.surgery import keep_four_bit_weights_as_they_are
from thriftune.recipe import ModelRecipe, QuantRecipe


def load_shell(model: ModelRecipe, *, device: torch.device, dtype: torch.dtype, quant: QuantRecipe) -> LoadedModel:
    """Load all of a model but its layers' linears. Raises ModelError as `load_model` does."""
    from transformers import AutoConfig

    started = time.perf_counter()
    description = describe_model(model)
    tokenizer = load_tokenizer(model, description.folder)
    config = AutoConfig.from_pretrained(description.folder, local_files_only=True)
    network = empty_shell(config, device=device, dtype=dtype, attention=model.attn_implementation, quant=quant)
    tied = bool(config.tie_word_embeddings)
    for name, tensor in _others(network, description.folder):
        fill(network, name, tensor.to(dtype) if tensor.is_floating_point() else tensor, device, tied)
    finish_shell(network, device)
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
    config: Any, *, device: torch.device, dtype: torch.dtype, attention: str, quant: QuantRecipe
) -> nn.Module:
    """The model of a configuration with nothing in it, its layers' linears as they stay."""
    network = build_empty(config, dtype, attention)
    head = network.get_output_embeddings()
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            network.set_submodule(name, _without_weight(module, device, dtype, quant))
    result: nn.Module = network
    return result


def fill(network: Any, name: str, tensor: Tensor, device: torch.device, tied: bool) -> None:
    """Put a tensor in its place, on the host if it is an input embedding that is not the head too."""
    path, _, leaf = name.rpartition(".")
    owner = network.get_submodule(path)
    on_host = owner is network.get_input_embeddings() and not tied
    place = torch.device("cpu") if on_host else device
    setattr(owner, leaf, nn.Parameter(tensor.to(place), requires_grad=False))


def finish_shell(network: Any, device: torch.device) -> None:
    """Buffers (positions' frequencies) to the device, ties, and the refusal to be called."""
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    network.tie_weights()
    network.requires_grad_(False)
    network.eval()
    network.is_loaded_in_4bit = True
    keep_four_bit_weights_as_they_are(network)
    network.register_forward_pre_hook(_refuse_to_be_called)


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
        do="use the adapter that the run writes with a model that is loaded whole",
    )
