"""Triton compiles a kernel when it is first used, about a second each: here while the weights are being read.

Every kernel runs once on a few rows of the model's own sizes, in a thread beside the loader. What is compiled depends
on sizes and types, not on the number of tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from thriftune.engine.takes import FAMILIES
from thriftune.kernels.copies import Copies, Copy
from thriftune.kernels.cross_entropy import cross_entropy_
from thriftune.kernels.dropout import Draw, add_dropped, drop
from thriftune.kernels.four_bit import FourBit, unpack_four_bit
from thriftune.kernels.fp8 import E4M3, Side, Sides, quantise_rows, unpack_to_columns, unpack_to_rows
from thriftune.kernels.launch import has_triton
from thriftune.kernels.rms_norm import rms_norm, rms_norm_backward
from thriftune.kernels.rope import turn
from thriftune.kernels.swiglu import swiglu, swiglu_backward

ROWS = 16
_one_at_a_time = threading.Lock()  # in Triton's compiler


@dataclass
class Warming:
    """What runs beside the loader. `wait` ends with it, whatever became of it: the first step compiles what is left."""

    thread: threading.Thread | None

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()


def start_warming(
    config: Mapping[str, Any], device: torch.device, four_bit: bool, fp8: bool, dropout: float, rank_multiple: int
) -> Warming:
    """Start it for a model's config.json and an adapter's dropout, where the engine may take the model and runs on
    Triton there."""
    if device.type != "cuda" or not has_triton() or config.get("model_type") not in FAMILIES:
        return Warming(None)
    asked = (dict(config), device, four_bit, fp8, dropout, rank_multiple)
    thread = threading.Thread(target=_run_each_kernel, args=asked, name="warming", daemon=True)
    thread.start()
    return Warming(thread)


def _run_each_kernel(
    config: dict[str, Any], device: torch.device, four_bit: bool, fp8: bool, dropout: float, rank_multiple: int
) -> None:
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or width // heads
    epsilon = float(config.get("rms_norm_eps", 1e-6))
    stream = torch.cuda.Stream(device)
    with _one_at_a_time, torch.cuda.device(device), torch.cuda.stream(stream), torch.no_grad():

        def rows(columns: int) -> torch.Tensor:
            whole = torch.zeros(ROWS, columns + rank_multiple, dtype=torch.bfloat16, device=device)
            return whole[:, :columns]

        weight, x = torch.ones(width, dtype=torch.bfloat16, device=device), torch.zeros_like(rows(width).contiguous())
        rstd = rms_norm(x, weight, epsilon, rows(width))
        rms_norm_backward(x, x, weight, rstd, rows(width), rows(width))
        if config["model_type"] == "qwen3":
            of_head = torch.ones(size, dtype=torch.bfloat16, device=device)
            rstd = rms_norm(rows(heads * size), of_head, epsilon, rows(heads * size), heads)
            rms_norm_backward(rows(heads * size), rows(heads * size), of_head, rstd, None, rows(heads * size))
        angles = torch.zeros(ROWS, size // 2, dtype=torch.bfloat16, device=device)
        q, k, v = (rows(count * size).contiguous().unflatten(1, (count, size)) for count in (heads, groups, groups))
        for inverse in (False, True):
            turn((q, k, v), (q, k, v.clone()), angles, angles, torch.arange(ROWS, device=device), inverse)
        gate_up, h = rows(2 * inner).contiguous(), rows(inner).contiguous()
        swiglu(gate_up, rows(inner))
        swiglu_backward(gate_up, h, rows(2 * inner), h)
        logits = torch.zeros(ROWS, config["vocab_size"], dtype=torch.bfloat16, device=device)
        cross_entropy_(logits, torch.zeros(ROWS, dtype=torch.int64, device=device), 1.0)
        Copies([Copy(torch.zeros(ROWS, width, device=device), rows(width), 1.0)])()
        if dropout:
            tokens = torch.arange(ROWS, device=device)
            for columns in {width, inner, heads * size}:
                drop(rows(columns), Draw((0, 0), tokens, tokens), 0, dropout, rows(columns).contiguous())
                add_dropped(rows(columns).contiguous(), Draw((0, 0), tokens, tokens), 0, dropout, rows(columns))
        if four_bit and not fp8:
            unpack_four_bit(_packed(width, device), rows(width))
        if fp8:
            _run_each_fp8_kernel(x, inner, four_bit, rank_multiple)
        torch.cuda.current_stream(device).synchronize()


def _run_each_fp8_kernel(x: torch.Tensor, inner: int, four_bit: bool, rank: int) -> None:
    def eight(rows: int, columns: int) -> torch.Tensor:
        return torch.zeros(rows, columns, dtype=torch.uint8, device=x.device).view(E4M3)

    width, scales = x.shape[1], torch.ones(max(x.shape[1], inner), 1, device=x.device)
    side, side_scales = x[:, :rank], torch.ones(rank, device=x.device)
    for size in (width, inner, 2 * inner):  # blocks of these lengths
        rows = torch.zeros(ROWS, size, dtype=x.dtype, device=x.device)
        quantise_rows(rows, side, side_scales, eight(ROWS, size + 3 * rank))
    adapter, beside = torch.zeros(ROWS, rank, device=x.device), eight(ROWS, 3 * rank)
    Sides([Side(adapter, 1.0, scales, beside[:, :rank], rank, side_scales)])()
    if four_bit:
        unpack_to_rows(_packed(width, x.device), scales, eight(ROWS, width + 3 * rank)[:, :width])
        unpack_to_columns(_packed(width, x.device), scales, eight(width, ROWS + 3 * rank)[:, :ROWS])


def _packed(width: int, device: torch.device) -> FourBit:
    """`ROWS` rows as bitsandbytes packs them with double quantisation."""
    blocks = ROWS * width // 64
    return FourBit(
        packed=torch.zeros(ROWS * width // 2, 1, dtype=torch.uint8, device=device),
        values=torch.zeros(16, device=device),
        block=64,
        rows=ROWS,
        columns=width,
        scales=torch.zeros(blocks, dtype=torch.uint8, device=device),
        scale_values=torch.zeros(256, device=device),
        scale_scales=torch.zeros(-(-blocks // 256), device=device),
        scale_block=256,
        scale_offset=torch.zeros((), device=device),
    )
