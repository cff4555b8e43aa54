"""A small 4-bit model twice: whole, and as a shell with its layers' slabs, for tests of streaming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from thriftune.data import Example
from thriftune.engine.hosted import Hosted, stream
from thriftune.engine.program import Program
from thriftune.engine.read import read_program
from thriftune.engine.residency import Streaming
from thriftune.kernels.slab import Matrix, SlabLayout, Tables
from thriftune.measure import random_model
from thriftune.models.shell import empty_shell, fill, finish_shell
from thriftune.recipe import QuantRecipe

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class MemorySlabs:
    """Slabs that a test made itself, in place of a store."""

    layouts: list[SlabLayout]
    kept: list[Tensor]
    known: Tables

    def tables(self, device: torch.device) -> Tables:
        return self.known.to(device)

    def read(self, index: int, slab: Tensor, say: Callable[[str], None]) -> None:
        slab.copy_(self.kept[index])

    def read_again(self, index: int, slab: Tensor) -> None:
        slab.copy_(self.kept[index])


@dataclass
class Pair:
    """`whole` and `shell` are the same model with the same adapter."""

    whole: nn.Module
    shell: nn.Module
    slabs: MemorySlabs

    def resident(self, fp8: bool = False) -> Program:
        return _program(self.whole, fp8)

    def streamed(self, resident: Sequence[int], slots: int = 2, fp8: bool = False) -> tuple[Program, Streaming]:
        program = read_program(self.shell, longest=64, rank_multiple=16 if fp8 else 8, fp8=fp8)
        streaming = stream(program, Hosted(self.slabs, CPU, print), resident, slots)
        program.copy_masters()
        return program, streaming


def _program(model: nn.Module, fp8: bool = False) -> Program:
    program = read_program(model, longest=64, rank_multiple=16 if fp8 else 8, fp8=fp8)
    program.copy_masters()
    return program


def make_pair(
    kind: str = "llama",
    quant: QuantRecipe | None = None,
    targets: Sequence[str] = ALL,
    dropout: float = 0.0,
    **sizes: Any,
) -> Pair:
    quant = quant or QuantRecipe()
    config = {"model_type": kind, **SIZES, **sizes}
    whole = random_model(config, device=CPU, dtype=torch.float32, attention="sdpa", quant=quant).model
    for parameter in whole.parameters():
        if parameter.is_floating_point() and parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    built = AutoConfig.for_model(kind, **{key: value for key, value in config.items() if key != "model_type"})
    shell = empty_shell(built, device=CPU, dtype=torch.float32, attention="sdpa", quant=quant)
    tied = bool(config["tie_word_embeddings"])
    for name, parameter in whole.named_parameters():
        if not hasattr(parameter, "quant_state"):
            fill(shell, name, parameter.data.clone(), CPU, tied)
    finish_shell(shell, CPU)
    models = [_adapted(model, targets, dropout) for model in (whole, shell)]
    slabs = _slabs(_program(models[0]), quant)
    return Pair(models[0], models[1], slabs)


def _adapted(model: nn.Module, targets: Sequence[str], dropout: float) -> nn.Module:
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 5, "lora_dropout": dropout, "target_modules": list(targets)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    draw = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    return adapted.eval()


def _slabs(program: Program, quant: QuantRecipe) -> MemorySlabs:
    layouts, kept, known = [], [], None
    for layer in program.layers:
        weights = [weight for stack in layer.stacks for weight in stack.packed]
        matrices = tuple(Matrix(name, w.rows, w.columns) for name, w in zip(ALL, weights, strict=True))
        layout = SlabLayout(matrices, weights[0].block, quant.bnb_4bit_use_double_quant)
        slab = torch.zeros(layout.bytes, dtype=torch.uint8)
        for place, weight in enumerate(weights):
            layout.write(slab, place, weight)
        layouts.append(layout)
        kept.append(slab)
        known = Tables(weights[0].values, weights[0].scale_values)
    assert known is not None
    return MemorySlabs(layouts, kept, known)


def examples(lengths: Sequence[int], vocabulary: int = 97) -> list[Example]:
    drawn = np.random.default_rng(1)
    found = []
    for index, length in enumerate(lengths):
        trained = drawn.random(length) < 0.6
        trained[-1] = True
        found.append(Example(drawn.integers(0, vocabulary, length, dtype=np.int32), trained, index))
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
