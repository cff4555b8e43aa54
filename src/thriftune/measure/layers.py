"""A model of the right sizes with random weights, whole or cut to a few layers. Nothing is downloaded or read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thriftune.errors import ModelError, first_line
from thriftune.models import LoadedModel
from thriftune.models.load import ModelDescription
from thriftune.models.surgery import keep_four_bit_weights_as_they_are
from thriftune.recipe import QuantRecipe
from thriftune.shapes import from_config

LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
SHORT, LONGER = (2, 3, 4), (6, 7, 8, 9, 10)  # layers of the two models whose difference is some layers' time
WITHOUT = "plan without --measure"


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the text model, with its model_type: what a step on text goes through."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return dict(config)
    return {**inner, "model_type": from_config(config, "the model").model_type}


def number_of_layers(config: Mapping[str, Any]) -> int:
    """Raises ModelError for a config that does not say it under a name of LAYER_KEYS."""
    for key in LAYER_KEYS:
        if isinstance(config.get(key), int):
            return int(config[key])
    raise ModelError(
        given="a config that does not say how many layers the model has",
        allowed=f"one of {', '.join(LAYER_KEYS)}",
        do=WITHOUT,
    )


def cut_short(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The same config with fewer layers; lists with an entry for each layer are cut too."""
    whole = number_of_layers(config)
    cut = {
        key: value[:layers] if isinstance(value, list) and len(value) == whole else value
        for key, value in config.items()
    }
    return cut | {key: layers for key in LAYER_KEYS if key in config}


def two_cuts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers of layers to time, so that what the longer model has beside the shorter one is mixed (of sliding and
    full attention, of dense layers and experts) as nearly as can be like all that the whole model has beside it.

    Both are the model's own number where that is small: then the whole model is timed.
    """
    layers = number_of_layers(config)
    if layers <= LONGER[0]:
        return layers, layers
    whole = _kinds(config)
    pairs = [(short, longer) for longer in LONGER if longer <= layers for short in SHORT]
    kinds = {number: _kinds(cut_short(config, number)) for pair in pairs for number in pair}

    def mismatch(pair: tuple[int, int]) -> float:
        """Layers of the whole model that the line through the two takes for another kind."""
        short, longer = (kinds[number] for number in pair)
        times = (layers - pair[0]) / (pair[1] - pair[0])
        names = whole.keys() | short.keys() | longer.keys()
        return round(sum(abs((longer[n] - short[n]) * times - (whole[n] - short[n])) for n in names) / 2, 6)

    return min(pairs, key=mismatch)  # of equally good ones the first: the fewest layers


def _kinds(config: Mapping[str, Any]) -> Counter[Any]:
    return Counter({layer: len(indices) for layer, indices in from_config(config, "the model").layers})


def random_model(
    config: Mapping[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    quant: QuantRecipe | None,
    layers: int | None = None,
) -> LoadedModel:
    """A frozen model in eval mode on `device`, as the loader leaves one; weights have standard deviation 0.02.

    `layers` cuts it short; `quant` holds its linears in 4 bits. Raises ModelError when transformers cannot build it.
    """
    from transformers.pytorch_utils import Conv1D

    started = time.perf_counter()
    sizes = cut_short(config, layers) if layers is not None else dict(config)
    kind = str(sizes.pop("model_type", ""))
    network = _empty_network(kind, sizes, dtype, attention)
    generator = torch.Generator(device).manual_seed(0)
    head = network.get_output_embeddings()
    for name, module in list(network.named_modules()):
        if quant is not None and isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            network.set_submodule(name, _four_bit(module, device, dtype, generator, quant))
        else:
            _fill(module, device, generator)
    network.tie_weights()
    network.requires_grad_(False)
    network.eval()
    if quant is not None:
        network.is_loaded_in_4bit = True
        keep_four_bit_weights_as_they_are(network)
    return LoadedModel(
        model=network,
        tokenizer=None,
        description=_description(kind, network),
        device=device,
        base_dtype=dtype,
        four_bit=quant is not None,
        load_s=time.perf_counter() - started,
    )


def _empty_network(kind: str, sizes: dict[str, Any], dtype: torch.dtype, attention: str) -> Any:
    """The model with parameters that take no memory; buffers (position frequencies) are computed, on the CPU."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        built = AutoConfig.for_model(kind, **sizes)
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(built, dtype=dtype, attn_implementation=attention)
    except Exception as error:  # a wrong value raises whatever its model's class stumbles over
        raise ModelError(
            given=f"transformers builds no causal language model of type {kind!r} from this config: "
            f"{first_line(error, 200)}",
            allowed="architectures of the installed transformers",
            do=WITHOUT,
        ) from None


def _fill(module: nn.Module, device: torch.device, generator: torch.Generator) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if parameter.ndim > 1:
            values.normal_(0.0, 0.02, generator=generator)
        else:
            values.fill_(1.0 if "norm" in type(module).__name__.lower() else 0.0)
        setattr(module, name, nn.Parameter(values, requires_grad=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, buffer.to(device))


def _four_bit(
    module: Any, device: torch.device, dtype: torch.dtype, generator: torch.Generator, quant: QuantRecipe
) -> nn.Module:
    """In the place of a linear, or of GPT-2's Conv1D, which holds its matrix the other way round."""
    import bitsandbytes

    outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else reversed(module.weight.shape)
    how = {"compress_statistics": quant.bnb_4bit_use_double_quant, "quant_type": quant.bnb_4bit_quant_type}
    bias = module.bias is not None
    four_bit = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=bias, compute_dtype=dtype, device="meta", **how)
    values = torch.empty((outputs, inputs), dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
    weight = bitsandbytes.nn.Params4bit(values, requires_grad=False, **how)
    weight.module = four_bit
    four_bit.weight = weight._quantize(device)
    if bias:
        four_bit.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype, device=device), requires_grad=False)
    result: nn.Module = four_bit
    return result


def _description(kind: str, network: nn.Module) -> ModelDescription:
    rows, width = network.get_input_embeddings().weight.shape
    return ModelDescription(
        folder=Path(kind),
        model_type=kind,
        total_parameters=0,
        linear_parameters=0,
        linear_sides=0,
        hidden_size=width,
        intermediate_size=0,
        num_layers=0,
        vocab_size=rows,
        max_positions=None,
        stored_dtype=None,
    )
