"""Changes to modules of one model instance, each reported. Nothing of anyone's class is patched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from thriftune.recipe import QuantRecipe


def keep_four_bit_weights_as_they_are(model: nn.Module) -> int:
    """Switch off bitsandbytes' in-place repacking of 4-bit weights on CPUs with avx512_bf16. Returns the layers found.

    There the first evaluation forward without gradients reorders the packed weights for a faster product. Gradients,
    merging and saving then read them in the old order and are silently wrong (bitsandbytes 0.50.2,
    `Linear4bit.forward`). The flag is an attribute of each layer.
    """
    changed = 0
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            changed += 1
    return changed


def dequantise(model: Any) -> nn.Module:
    """A 4-bit model's weights in its compute type, in layers of the class that the architecture has.

    GPT-2's linears are of transformers' Conv1D, which holds its matrix transposed; quantised they become ordinary ones
    and would be saved the wrong way round.
    """
    from transformers.pytorch_utils import Conv1D

    plain: nn.Module = model.dequantize()
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.device("meta"):
        reference = type(model)(config)
    for name, module in reference.named_modules():
        ours = plain.get_submodule(name)
        if isinstance(module, Conv1D) and isinstance(ours, nn.Linear):
            layer = Conv1D(module.nf, module.nx)
            layer.weight = nn.Parameter(ours.weight.detach().T.contiguous(), requires_grad=False)
            if ours.bias is not None:
                layer.bias = nn.Parameter(ours.bias.detach(), requires_grad=False)
            plain.set_submodule(name, layer.train(plain.training))
    return plain


def as_in_four_bits(weight_OI: Tensor, quant: QuantRecipe, device: torch.device) -> Tensor:
    """A matrix as it is in a model that is loaded in 4 bits: quantised on `device` and back, in its own type there."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    packed = Params4bit(
        weight_OI,
        requires_grad=False,
        compress_statistics=quant.bnb_4bit_use_double_quant,
        quant_type=quant.bnb_4bit_quant_type,
    )._quantize(device)
    value_OI: Tensor = dequantize_4bit(packed.data, packed.quant_state)
    return value_OI


def count_parameters(model: nn.Module) -> int:
    """All parameters, shared ones once; a 4-bit weight counts its logical elements (it stores two in a byte)."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            shape = state.shape
            count = 1
            for size in shape:
                count *= int(size)
            total += count
        else:
            total += parameter.numel()
    return total


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute each layer's activations in the backward pass, non-reentrant (right for frozen inputs too)."""
    arguments = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers >= 5.20 renamed it
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
