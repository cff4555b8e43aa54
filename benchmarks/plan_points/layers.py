"""Seconds of a step measured on this machine: a few layers of the real model at their real sizes, with random weights.

Time does not depend on the weights' values, so nothing is downloaded or read. Two short models are timed through the
loop's own step, and the line through them is followed to the model's number of layers.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from thriftune.data import Example
from thriftune.errors import DoesNotFitError, ModelError
from thriftune.methods import METHODS
from thriftune.methods.lora import is_out_of_memory
from thriftune.models import LoadedModel
from thriftune.models.load import ModelDescription
from thriftune.models.surgery import enable_checkpointing
from thriftune.plan.values import Work
from thriftune.recipe import MethodName, Recipe
from thriftune.train import StopRequest, TrainJob
from thriftune.train.distributed import Processes
from thriftune.train.loop import train_step
from thriftune.train.optim import build_optimizer
from thriftune.train.recover import Recovery

SHORT, LONGER = 2, 6  # layers of the two models that are timed
WARM_UP, TIMED = 2, 6  # steps
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers")


def measure_step_s(
    config: Mapping[str, Any], recipe: Recipe, method: MethodName, checkpointing: bool, work: Work, device: torch.device
) -> float:
    """Seconds of one optimizer step of the whole model on `device`.

    Raises ModelError when transformers cannot build the architecture, DoesNotFitError when even two layers do not fit.
    """
    layers = _number_of_layers(config)
    short, longer = min(SHORT, layers), min(LONGER, layers)
    try:
        short_s = _step_s(config, short, recipe, method, checkpointing, work, device)
        if longer == short:
            return short_s
        longer_s = _step_s(config, longer, recipe, method, checkpointing, work, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFitError(
            given=f"{longer} layers of this model do not fit on {device}: {str(error).splitlines()[0][:200]}",
            allowed="enough free memory for a few layers and a step's activations",
            do="plan without --measure, or with a smaller max_length or per_device_train_batch_size",
        ) from None
    return short_s + (layers - short) * max(0.0, longer_s - short_s) / (longer - short)


def _number_of_layers(config: Mapping[str, Any]) -> int:
    for key in LAYER_KEYS:
        if isinstance(config.get(key), int):
            return int(config[key])
    raise ModelError(
        given="a config that does not say how many layers the model has",
        allowed=f"one of {', '.join(LAYER_KEYS)}",
        do="plan without --measure",
    )


def _step_s(
    config: Mapping[str, Any],
    layers: int,
    recipe: Recipe,
    method: MethodName,
    checkpointing: bool,
    work: Work,
    device: torch.device,
) -> float:
    """Median seconds of a step of the model cut to so many layers."""
    loaded = random_model(config, four_bit=METHODS[method].four_bit, device=device, layers=layers)
    fixed = recipe.replace(
        method=method,
        train={"per_device_train_batch_size": work.rows, "gradient_accumulation_steps": work.micro_batches},
    )
    model = METHODS[method].attach(loaded, fixed)
    model.train()
    network = loaded.model
    examples = _examples(work, loaded.description.vocab_size)
    job = TrainJob(
        model=model,
        method=METHODS[method],
        recipe=fixed,
        train_examples=examples,
        place_of=lambda index: f"row {index + 1}",
        eval_examples=[],
        processes=Processes(0, 1, device),
        output=Path(),
        autocast_dtype=torch.bfloat16 if loaded.base_dtype == torch.bfloat16 else None,
        enable_checkpointing=partial(enable_checkpointing, network),
        checkpointing=checkpointing,
        identity={},
        resume_command="",
    )
    if checkpointing:
        job.enable_checkpointing()
    optimizer, _, _ = build_optimizer(model, fixed.resolved(method, ""), device)
    taken = []
    for _ in range(WARM_UP + TIMED):
        started = time.perf_counter()
        with job.product_types():
            train_step(
                job, optimizer, Recovery(work.rows, checkpointing, None), 0, 1e-6, StopRequest(), _nothing_to_say
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    del job, optimizer, model, network, loaded
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return statistics.median(taken[WARM_UP:])


def _examples(work: Work, vocabulary: int) -> list[Example]:
    """Rows of the mean padded length, with the mean number of targets at their end."""
    count = work.rows * work.micro_batches
    length = max(2, round(work.padded_tokens_per_step / count))
    targets = max(1, min(length - 1, round(work.targets_per_step / count)))
    drawn = np.random.default_rng(0)
    trained = np.zeros(length, dtype=bool)
    trained[length - targets :] = True
    return [Example(drawn.integers(4, vocabulary, length, dtype=np.int32), trained, index) for index in range(count)]


def random_model(
    config: Mapping[str, Any], *, four_bit: bool, device: torch.device, layers: int | None = None
) -> LoadedModel:
    """A frozen model in eval mode on `device`, as the loader leaves one; weights have standard deviation 0.02.

    `layers` cuts it short. Raises ModelError when transformers has no such architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    started = time.perf_counter()
    sizes = cut_short(config, layers) if layers is not None else dict(config)
    kind = str(sizes.pop("model_type", ""))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        built = AutoConfig.for_model(kind, **sizes)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(built, dtype=dtype, attn_implementation="sdpa")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            given=f"transformers builds no causal language model of type {kind!r}: {str(error).splitlines()[0][:200]}",
            allowed="architectures of the installed transformers",
            do="plan without --measure",
        ) from None
    generator = torch.Generator(device).manual_seed(0)
    for name, module in list(network.named_modules()):
        if four_bit and isinstance(module, nn.Linear) and name != "lm_head":
            network.set_submodule(name, _four_bit(module, device, dtype, generator))
        else:
            _fill(module, device, generator)
    for module in network.modules():  # position frequencies are buffers, computed when their module is made
        if hasattr(module, "inv_freq"):
            fresh = type(module)(built).to(device)
            module.inv_freq, module.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq
    network.tie_weights()
    network.requires_grad_(False)
    network.eval()
    if four_bit:
        network.is_loaded_in_4bit = True
    return LoadedModel(
        model=network,
        tokenizer=None,
        description=_description(kind, network),
        device=device,
        base_dtype=dtype,
        four_bit=four_bit,
        load_s=time.perf_counter() - started,
    )


def cut_short(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The same config with fewer layers; lists with an entry for each layer are cut too."""
    whole = _number_of_layers(config)
    cut = {
        key: value[:layers] if isinstance(value, list) and len(value) == whole else value
        for key, value in config.items()
    }
    return cut | {key: layers for key in LAYER_KEYS if key in config}


def _fill(module: nn.Module, device: torch.device, generator: torch.Generator) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if parameter.ndim > 1:
            values.normal_(0.0, 0.02, generator=generator)
        else:
            values.fill_(1.0 if "norm" in type(module).__name__.lower() else 0.0)
        setattr(module, name, nn.Parameter(values, requires_grad=False))


def _four_bit(module: nn.Linear, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    import bitsandbytes

    four_bit = bitsandbytes.nn.Linear4bit(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    values = torch.empty(module.weight.shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
    weight = bitsandbytes.nn.Params4bit(values, requires_grad=False, compress_statistics=True, quant_type="nf4")
    weight.module = four_bit
    four_bit.weight = weight._quantize(device)
    if module.bias is not None:
        four_bit.bias = nn.Parameter(torch.zeros(module.bias.shape, dtype=dtype, device=device), requires_grad=False)
    result: nn.Module = four_bit
    return result


def _description(kind: str, network: nn.Module) -> ModelDescription:
    embedding = network.get_input_embeddings().weight
    return ModelDescription(
        folder=Path(kind),
        model_type=kind,
        total_parameters=0,
        linear_parameters=0,
        linear_sides=0,
        hidden_size=embedding.shape[1],
        intermediate_size=0,
        num_layers=0,
        vocab_size=embedding.shape[0],
        max_positions=None,
        stored_dtype=None,
    )


def _nothing_to_say(text: str) -> None:
    """Nobody listens: a step that does not fit raises."""
