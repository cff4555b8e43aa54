"""Whether a run goes through the engine, and the path when it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from thriftune.engine.attention import Attention, FlashAttention, ReferenceAttention
from thriftune.engine.hosted import Slabs
from thriftune.engine.offload import Demand
from thriftune.engine.path import EnginePath
from thriftune.engine.read import read_program, why_not
from thriftune.engine.room import Room
from thriftune.engine.sizes import RANK_MULTIPLE, RECOMPUTING
from thriftune.engine.streamed_path import StreamedPath, streamed_path
from thriftune.engine.takes import why_not_method
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
    return why_not(model)


def warm_up(config: Mapping[str, Any], recipe: Recipe, device: torch.device, four_bit: bool) -> Warming:
    """Compile the kernels beside the loader, where the engine may be taken."""
    if why_not_method(recipe, recipe.method):
        return Warming(None)
    return start_warming(config, device, four_bit, RANK_MULTIPLE["cuda"])


def engine_path(
    model: nn.Module,
    device: torch.device,
    lengths: Sequence[int],
    step_tokens: int,
    later_bytes: int,
    checkpointing: Literal["auto", "on", "off"],
) -> EnginePath:
    """The path of a run, where nothing speaks against it. `lengths` are the examples' in tokens, `step_tokens` those of
    the largest step, `later_bytes` what gradients and optimizer will take. The model's linears become views."""
    longest = max(lengths)
    program = read_program(model, longest, RANK_MULTIPLE[device.type])
    room = Room(program, device, step_tokens, longest, later_bytes)
    most, least = RECOMPUTING[checkpointing]
    return EnginePath(program, device, choose_attention(device), room, most, least)


def streaming_path(
    model: nn.Module, slabs: Slabs, device: torch.device, demand: Demand, say: Callable[[str], None]
) -> StreamedPath:
    """The path of a run whose model is a shell and whose layers are streamed from `slabs`."""
    program = read_program(model, demand.longest, RANK_MULTIPLE[device.type])
    return streamed_path(program, slabs, device, choose_attention(device), demand, say)


def choose_attention(device: torch.device) -> Attention:
    """On CUDA cuDNN's ragged attention where its frontend is installed, else FlashAttention; the reference on a CPU."""
    if device.type != "cuda":
        return ReferenceAttention()
    try:
        import cudnn  # noqa: F401
    except ImportError:
        return FlashAttention()
    from thriftune.engine.cudnn_attention import CudnnAttention

    return CudnnAttention()
