"""Whether a run goes through the engine, and the path when it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from thriftune.engine.attention import Attention, CpuAttention, FlashAttention
from thriftune.engine.hosted import Slabs
from thriftune.engine.layer import Layer
from thriftune.engine.offload import Demand
from thriftune.engine.path import EnginePath
from thriftune.engine.read import base_of, read_program, why_not
from thriftune.engine.room import Room
from thriftune.engine.sizes import RANK_MULTIPLE, RECOMPUTING, rank_multiple
from thriftune.engine.streamed_path import StreamedPath, streamed_path
from thriftune.engine.takes import why_not_fp8, why_not_heads, why_not_method
from thriftune.engine.trust import why_not_trusted
from thriftune.engine.warm import Warming, start_warming
from thriftune.kernels.launch import has_triton
from thriftune.recipe import Recipe


def why_not_here(model: nn.Module, recipe: Recipe, device: torch.device) -> str | None:
    """Why a run does not go through the engine; None when it does."""
    if reason := why_not_method(recipe, recipe.method):
        return reason
    if device.type not in RANK_MULTIPLE:
        return f"it runs on CUDA and on CPUs, not on {device.type}"
    if device.type == "cuda" and not has_triton():
        return "Triton is not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "this GPU has no bfloat16 products"
    if device.type == "cuda" and base_of(model).get_input_embeddings().weight.dtype.itemsize > 2:
        return "its attention kernels take 16-bit numbers, and the model is loaded in float32"
    if reason := why_not(model):
        return reason
    if device.type == "cuda" and (reason := why_not_heads(_head_size(base_of(model).config))):
        return reason
    if recipe.precision == "fp8":
        return _why_not_fp8_here(model, device)
    return None


def _why_not_fp8_here(model: nn.Module, device: torch.device) -> str | None:
    config = base_of(model).config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = _head_size(config)
    sides = (config.hidden_size, config.intermediate_size, heads * size, groups * size)
    if device.type == "cuda" and base_of(model).get_input_embeddings().weight.dtype != torch.bfloat16:
        return "fp8 products take and give bfloat16, and the model is loaded in another type"
    return why_not_fp8(torch.cuda.get_device_capability(device) if device.type == "cuda" else None, sides)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def warm_up(config: Mapping[str, Any], recipe: Recipe, device: torch.device, four_bit: bool) -> Warming:
    """Compile the kernels beside the loader, where the engine may be taken."""
    if why_not_method(recipe, recipe.method):
        return Warming(None)
    fp8 = recipe.precision == "fp8"
    return start_warming(config, device, four_bit, fp8, recipe.lora.dropout, rank_multiple("cuda", fp8))


def engine_path(
    model: nn.Module,
    device: torch.device,
    lengths: Sequence[int],
    step_tokens: int,
    later_bytes: int,
    checkpointing: Literal["auto", "on", "off"],
    fp8: bool,
) -> EnginePath:
    """The path of a run, where nothing speaks against it. `lengths` are the examples' in tokens, `step_tokens` those of
    the largest step, `later_bytes` what gradients and optimizer will take. The model's linears become views, or with
    `fp8` products stay as they are."""
    longest = max(lengths)
    program = read_program(model, longest, rank_multiple(device.type, fp8), fp8)
    room = Room(program, device, step_tokens, longest, later_bytes)
    most, least = RECOMPUTING[checkpointing]
    return EnginePath(program, device, choose_attention(device, program.layers), room, most, least)


def streaming_path(
    model: nn.Module, slabs: Slabs, device: torch.device, demand: Demand, fp8: bool, say: Callable[[str], None]
) -> StreamedPath:
    """The path of a run whose model is a shell and whose layers are streamed from `slabs`."""
    program = read_program(model, demand.longest, rank_multiple(device.type, fp8), fp8)
    return streamed_path(program, slabs, device, choose_attention(device, program.layers), demand, say)


def choose_attention(device: torch.device, layers: Sequence[Layer]) -> Attention:
    """On CUDA cuDNN's ragged attention where its frontend is installed and found right for these layers, else
    FlashAttention."""
    if device.type != "cuda":
        return CpuAttention()
    try:
        import cudnn  # noqa: F401
    except ImportError:
        return FlashAttention()
    from thriftune.engine.cudnn_attention import CudnnAttention

    attention = CudnnAttention()
    remark = why_not_trusted(attention, layers, device)
    return attention if remark is None else FlashAttention(f"flash ({remark})")
