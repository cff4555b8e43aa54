"""A model's architecture without its weights: its modules' names and shapes, and what describes it beside its weights.

Every parameter is one zero that stands for all its elements, so it takes no memory; PEFT puts adapters on it as on the
model itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thriftune.errors import ModelError, first_line


def outline(folder: Path, attention: str, device: torch.device) -> nn.Module:
    """The model of `folder`'s config.json, of type float32 on `device`. Raises ModelError when none can be built."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    network: Any = build_empty(config, torch.float32, attention)
    with torch.no_grad():
        for module in network.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                nothing = torch.zeros((1,) * parameter.ndim, device=device).expand(parameter.shape)
                setattr(module, name, nn.Parameter(nothing, requires_grad=False))
    network.tie_weights()
    network.generation_config = generation_config_of(network, folder)
    result: nn.Module = network.eval()
    return result


def build_empty(config: Any, dtype: torch.dtype, attention: str) -> Any:
    """A causal language model whose parameters are on the meta device; its buffers are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (ValueError, KeyError, ImportError) as error:
        raise ModelError(
            given=f"no causal language model can be built from this config: {first_line(error)}",
            allowed="architectures and attn_implementation of the installed transformers",
            do="check model_type in config.json, or use attn_implementation=sdpa",
        ) from None


def generation_config_of(network: Any, folder: Path) -> Any:
    """What `from_pretrained` gives a model: the folder's generation_config.json, else what its config says."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return network.generation_config
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # no JSON: so `from_pretrained` does too
        return network.generation_config
    except (ValueError, TypeError) as error:
        raise ModelError(
            given=f"{folder / 'generation_config.json'} cannot be used: {first_line(error)}",
            allowed="a generation_config.json as transformers writes it",
            do="download the model again",
        ) from None


def write_description(network: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """config.json, generation_config.json and the tokenizer's files, as `save_pretrained` writes them beside weights of
    type `dtype`."""
    config = network.config
    config.dtype, config.architectures = dtype, [type(network).__name__]
    config.save_pretrained(str(folder))
    network.generation_config.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


@dataclass(frozen=True)
class Weights:
    """The tensors that a model's files must have, by name: their shapes, which of them loading in 4 bits quantises, the
    names that are tied to others, and whether it has linears that hold their matrix transposed."""

    shapes: dict[str, list[int]]
    quantised: set[str]
    tied: set[str]
    transposed: bool

    @classmethod
    def of(cls, network: Any) -> Weights:
        from transformers.pytorch_utils import Conv1D
        from transformers.quantizers.base import get_keys_to_not_convert
        from transformers.quantizers.quantizers_utils import should_convert_module

        kept = get_keys_to_not_convert(network)
        modules = dict(network.named_modules())
        linears = [name for name, module in modules.items() if type(module) is nn.Linear]
        quantised = {f"{name}.weight" for name in linears if should_convert_module(name, kept)}
        parameters = dict(network.named_parameters())
        tied = {name for name, _ in network.named_parameters(remove_duplicate=False)} - parameters.keys()
        saved = {name: value for name, value in network.state_dict().items() if name not in tied}
        transposed = any(isinstance(module, Conv1D) for module in modules.values())
        return cls({name: list(value.shape) for name, value in saved.items()}, quantised, tied, transposed)
