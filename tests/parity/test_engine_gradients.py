"""The engine against autograd through transformers and PEFT: losses and every gradient."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from thriftune.data import Example
from thriftune.data.batches import micro_batches
from thriftune.engine import sizes
from thriftune.engine.attention import ReferenceAttention
from thriftune.engine.layer import Keep
from thriftune.engine.packing import cut_by_tokens, pack
from thriftune.engine.read import read_program, why_not
from thriftune.train.loss import loss_sum

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama 3.1 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama, one group, wide heads": ("llama", {"num_key_value_heads": 1, "head_dim": 10}),
    "mistral, window": ("mistral", {"sliding_window": 5, "head_dim": 6}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2, window on some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3, window": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(family: str, dtype: torch.dtype = torch.float64, **lora: Any) -> nn.Module:
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, changes = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for parameter in base.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.2)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ALL, **lora}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    if dtype == torch.float64:
        norms_in_double(base)
    return model.eval()


def norms_in_double(base: nn.Module) -> None:
    """transformers' norms compute in float32 even for float64: for exact comparison these instances compute in it."""
    for module in base.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_norm, module)


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon))


def examples(lengths: tuple[int, ...], vocabulary: int = 61) -> list[Example]:
    drawn = np.random.default_rng(1)
    found = []
    for index, length in enumerate(lengths):
        trained = drawn.random(length) < 0.6
        trained[-1] = True
        found.append(Example(drawn.integers(0, vocabulary, length, dtype=np.int32), trained, index))
    return found


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def by_autograd(model: nn.Module, rows: list[Example], scale: float) -> tuple[float, dict[str, torch.Tensor]]:
    """One example at a time, so that neither padding nor packing plays a part."""
    total = 0.0
    for row in rows:
        (batch,) = micro_batches([row], 1)
        loss = loss_sum(model, batch, True)
        (loss * scale).backward()
        total += float(loss.detach())
    return total, gradients(model)


def by_engine(
    model: nn.Module, rows: list[Example], scale: float, keep: Keep = Keep.ALL
) -> tuple[float, dict[str, torch.Tensor]]:
    program = read_program(model, longest=64, rank_multiple=8, fp8=False)
    program.copy_masters()
    batch = pack(rows, torch.device("cpu"))
    loss = program.add_gradients(batch, scale, [keep] * len(program.layers), ReferenceAttention())
    return float(loss), gradients(model)


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < tolerance, (name, float(error))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient(family: str) -> None:
    model, rows = build(family), examples((9, 2, 17, 5))
    assert why_not(model) is None
    loss, wanted = by_autograd(model, rows, 0.1)
    found_loss, found = by_engine(model, rows, 0.1)
    assert found_loss == pytest.approx(loss, rel=1e-12)
    assert_close(found, wanted, 1e-9)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj"]},
        {"target_modules": ["o_proj", "gate_proj"]},
        {"use_rslora": True, "r": 5},
        {"r": 4, "rank_pattern": {"k_proj": 1, "layers.1.mlp.up_proj": 9}, "alpha_pattern": {"v_proj": 3}},
        {"layers_to_transform": [0, 2]},
    ],
    ids=lambda lora: " ".join(lora),
)
def test_adapters_of_every_form(lora: dict[str, Any]) -> None:
    model, rows = build("qwen3", **lora), examples((9, 2, 17, 5))
    assert why_not(model) is None
    loss, wanted = by_autograd(model, rows, 0.1)
    found_loss, found = by_engine(model, rows, 0.1)
    assert found_loss == pytest.approx(loss, rel=1e-12)
    assert_close(found, wanted, 1e-9)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("keep", [Keep.NO_MLP, Keep.RESIDUALS, Keep.INPUT])
def test_what_is_computed_again_is_the_same_bit_for_bit(family: str, keep: Keep) -> None:
    model, rows = build(family, dtype=torch.float32), examples((9, 2, 17, 5))
    loss, wanted = by_engine(model, rows, 0.1)
    found_loss, found = by_engine(model, rows, 0.1, keep)
    assert found_loss == loss
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name


def test_no_uninitialised_memory_is_read() -> None:
    """torch fills new tensors with NaN here, as it does for deterministic algorithms."""
    model, rows = build("qwen3", target_modules=["q_proj", "down_proj"]), examples((9, 2, 17, 5))
    _, wanted = by_engine(model, rows, 0.1)
    torch.use_deterministic_algorithms(True)
    try:
        loss, found = by_engine(model, rows, 0.1, Keep.RESIDUALS)
    finally:
        torch.use_deterministic_algorithms(False)
    assert np.isfinite(loss)
    assert_close(found, wanted, 1e-12)


def test_parts_of_a_step_add_up() -> None:
    model, rows = build("llama"), examples((9, 2, 17, 5, 30, 1, 3))
    loss, wanted = by_engine(model, rows, 0.1)
    program = read_program(model, longest=64, rank_multiple=8, fp8=False)
    program.copy_masters()
    total = 0.0
    for group in cut_by_tokens(rows, 20):
        assert len(group) == 1 or sum(map(len, group)) <= 20
        batch = pack(group, torch.device("cpu"))
        total += float(program.add_gradients(batch, 0.1, [Keep.ALL] * 3, ReferenceAttention()))
    assert total == pytest.approx(loss, rel=1e-12)
    assert_close(gradients(model), wanted, 1e-11)


def test_the_models_own_linears_go_on_working_and_masters_are_taken_over() -> None:
    """After `read_program` the linears are views of the buffers; a changed master shows after `copy_masters`."""
    model, rows = build("llama"), examples((9, 4))
    before, _ = by_autograd(model, rows, 1.0)
    program = read_program(model, longest=64, rank_multiple=8, fp8=False)
    assert by_autograd(model, rows, 1.0)[0] == pytest.approx(before, rel=1e-13)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)
    program.copy_masters()
    changed, _ = by_autograd(model, rows, 1.0)
    batch = pack(rows, torch.device("cpu"))
    assert abs(changed - before) > 1e-3
    assert float(program.loss(batch, ReferenceAttention())) == pytest.approx(changed, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "lora", "reason"),
    [
        ({"hidden_act": "gelu"}, {}, "activation is gelu"),
        ({}, {"use_dora": True}, "a variant of LoRA"),
        ({}, {"bias": "all"}, "bias"),
        ({}, {"lora_bias": True}, "a bias of the adapter"),
        ({}, {"modules_to_save": ["lm_head"]}, "lm_head"),
        ({}, {"target_modules": ["q_proj", "lm_head"]}, "an adapter on lm_head"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            {},
            "rope of type dynamic",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_it_cannot_do_is_said(changes: dict[str, Any], lora: dict[str, Any], reason: str) -> None:
    FAMILIES["changed"] = ("llama", {"attention_bias": True, **changes})
    try:
        assert reason in (why_not(build("changed", **lora)) or "")
    finally:
        del FAMILIES["changed"]


def test_packing_keeps_rows_apart_and_predicts_no_first_token() -> None:
    rows = examples((3, 1, 4))
    batch = pack(rows, torch.device("cpu"))
    assert batch.tokens_T.tolist() == [int(token) for row in rows for token in row.tokens]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert (batch.segments.lengths, batch.segments.starts_S1.tolist()) == ((3, 1, 4), [0, 3, 4, 8])
    wanted = [
        (start + place - 1, int(row.tokens[place]))
        for start, row in zip((0, 3, 4), rows, strict=True)
        for place in range(1, len(row))
        if row.trained[place]
    ]
    assert list(zip(batch.predicting_N.tolist(), batch.targets_N.tolist(), strict=True)) == wanted
    assert sum(row.num_targets for row in rows) == len(wanted)
    assert all(bool(row.trained[-1]) for row in rows), "the rows themselves must not be changed"


@pytest.mark.parametrize(
    ("held", "lora"), [(0, {}), (1, {}), (3, {}), (0, {"rank_pattern": {"layers.1.self_attn.q_proj": 1}})]
)
def test_four_bit_weights(held: int, lora: dict[str, Any]) -> None:
    """Against the same model with the 4-bit weights unpacked, however many layers keep theirs unpacked."""
    import bitsandbytes

    model, rows = build("llama", dtype=torch.float32, **lora), examples((9, 2, 17, 5))
    base = model.get_base_model()
    for layer in base.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name in set(ALL) & {name for name, _ in parent.named_children()}:
                wrapped = getattr(parent, name)
                packed = bitsandbytes.nn.Params4bit(
                    wrapped.base_layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
                )._quantize(torch.device("cpu"))
                four_bit = bitsandbytes.nn.Linear4bit(
                    wrapped.in_features, wrapped.out_features, bias=False, compute_dtype=torch.float32
                )
                four_bit.weight = packed
                plain = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
                wrapped.base_layer.weight.data = plain
                wrapped.four_bit = four_bit
    loss, wanted = by_autograd(model, rows, 0.1)
    for module in base.modules():
        if hasattr(module, "four_bit"):
            module.base_layer = module.four_bit
    program = read_program(model, longest=64, rank_multiple=8, fp8=False)
    for layer in program.layers[:held]:
        layer.hold()
    program.copy_masters()
    keep = [Keep.INPUT, Keep.ALL, Keep.NO_MLP]
    found_loss = program.add_gradients(pack(rows, torch.device("cpu")), 0.1, keep, ReferenceAttention())
    assert float(found_loss) == pytest.approx(loss, rel=1e-6)
    assert_close({name: g for name, g in gradients(model).items() if "four_bit" not in name}, wanted, 2e-5)


class LogitsAlive(TorchDispatchMode):
    """How many products of the head's width were there when another one was made."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.made, self.most = vocabulary, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default and found.shape[-1] == self.vocabulary:
            self.most = max(self.most, sum(one() is not None for one in self.made))
            self.made.append(weakref.ref(found.untyped_storage()))
        return found


def test_logits_of_one_chunk_are_gone_before_the_next_are_made(monkeypatch) -> None:
    """They are the largest thing that the head makes, and the plan counts them once."""
    monkeypatch.setattr(sizes, "FEWEST_ROWS", 8)
    monkeypatch.setattr(sizes, "CHUNK_BYTES", 1)
    with LogitsAlive(SIZES["vocab_size"]) as watched:
        by_engine(build("llama"), examples((20, 30)), 0.1)
    assert len(watched.made) > 2 and watched.most == 0
