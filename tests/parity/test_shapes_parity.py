"""Shapes against what transformers builds and what PEFT trains: every linear's path, size and bias, every count.

Models are built on the meta device, so the 8-billion ones cost no memory either.
"""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.pytorch_utils import Conv1D

from thriftune.catalog.models import find_model
from thriftune.errors import InputError
from thriftune.shapes import FAMILIES, ModelShape, from_config, lora_parameters

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BIASED = {"attention_bias": True}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 3,
}
DEEPSEEK = {
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "head_dim": None,
}
GEMMA4 = {"global_head_dim": 32, "vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8}
GEMMA4_EXPERTS = {
    "top_k_experts": 2,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}

# (model_type, what differs from SIZES; None takes a key away)
SMALL: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"head_dim": None, "num_key_value_heads": None, "tie_word_embeddings": True, **BIASED, "mlp_bias": True}),
    ("mistral", {"head_dim": None}),
    ("ministral3", {}),
    ("qwen2", {"head_dim": None}),
    ("qwen3", BIASED),
    ("qwen3", {"num_key_value_heads": None, "head_dim": None, "num_attention_heads": 32, "hidden_size": 64}),
    ("gemma", {}),
    ("gemma2", BIASED),
    ("gemma3_text", {}),
    ("gemma3_text", {"num_attention_heads": None, "num_key_value_heads": None, "head_dim": None, "vocab_size": None}),
    ("phi3", {"head_dim": None}),
    ("phi", {"head_dim": None}),
    ("olmo", {"head_dim": None}),
    ("olmo2", {"head_dim": None}),
    ("olmo3", {"head_dim": None}),
    ("smollm3", {"head_dim": None}),
    ("granite", {"head_dim": None, "mlp_bias": True}),
    ("arcee", {}),
    ("starcoder2", {"head_dim": None}),
    ("starcoder2", {"head_dim": None, "use_bias": False}),
    ("cohere2", {"head_dim": None}),
    ("glm", {}),
    ("glm4", {}),
    ("seed_oss", {"attention_out_bias": True}),
    ("gpt2", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 32}),
    (
        "gpt2",
        {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 32, "n_inner": 100, "tie_word_embeddings": False},
    ),
    ("gpt_neox", {"head_dim": None}),
    ("gpt_neox", {"head_dim": None, "attention_bias": False, "tie_word_embeddings": True}),
    ("mixtral", {"num_local_experts": 5}),
    ("olmoe", {"head_dim": None, **EXPERTS}),
    ("qwen2_moe", {"head_dim": None, "shared_expert_intermediate_size": 56, "mlp_only_layers": [2], **EXPERTS}),
    ("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2}),
    ("qwen3_moe", {**EXPERTS, "num_experts_per_tok": None, "num_experts": 9}),
    ("gpt_oss", {"num_local_experts": 5}),
    ("llama4_text", {"num_local_experts": 5, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 72}),
    ("deepseek_v3", {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "head_dim": None}),
    ("deepseek_v3", {**DEEPSEEK, **BIASED, "q_lora_rank": "null"}),
    ("qwen3_5_text", DELTA),
    ("qwen3_5_text", {**DELTA, "layer_types": ["full_attention", "linear_attention"] * 2, **BIASED}),
    ("qwen3_5_moe_text", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 56}),
    ("gemma4_text", GEMMA4),
    ("gemma4_text", {**GEMMA4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "num_hidden_layers": 12}),
    ("gemma4_text", {**GEMMA4, **EXPERTS, **GEMMA4_EXPERTS, "num_hidden_layers": 7}),
]
REAL = ["Llama-3.1-8B", "Qwen2.5-7B", "Qwen3-8B", "Mistral-7B-v0.1", "gemma-2-9b", "Phi-4-mini", "gpt-oss-20b", "gpt2"]


def config_of(model_type: str, changes: dict[str, Any]) -> dict[str, Any]:
    merged = {"model_type": model_type, **(SIZES if model_type != "gpt2" else {"vocab_size": 96}), **changes}
    return {key: None if value == "null" else value for key, value in merged.items() if value is not None}


def build(config: dict[str, Any]) -> nn.Module:
    """The model on the meta device. transformers changes the dictionaries that it is given."""
    values = {key: value for key, value in copy.deepcopy(config).items() if key != "quantization_config"}
    made = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(made)
    return model


def built_linears(model: nn.Module) -> dict[str, tuple[int, int, bool]]:
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[path] = (module.in_features, module.out_features, module.bias is not None)
        elif isinstance(module, Conv1D):
            found[path] = (module.weight.shape[0], module.weight.shape[1], True)
    return found


def shape_linears(shape: ModelShape) -> dict[str, tuple[int, int, bool]]:
    found = {}
    for layer, indices in shape.layers:
        for linear in layer.linears:
            for index in indices if linear.is_module else ():
                found[shape.full_path(linear, index)] = (linear.in_features, linear.out_features, linear.bias)
    for linear in (*shape.outer, shape.head):
        found[linear.path] = (linear.in_features, linear.out_features, linear.bias)
    return found


def built_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def built_norms(model: nn.Module) -> int:
    return sum(
        parameter.numel()
        for module in model.modules()
        if "Norm" in type(module).__name__
        for parameter in module.parameters(recurse=False)
    )


def compare(shape: ModelShape, model: nn.Module) -> None:
    assert shape_linears(shape) == built_linears(model)
    assert shape.total_parameters == built_parameters(model)
    assert shape.norm_parameters == built_norms(model)
    tables = {
        path: (module.num_embeddings, module.embedding_dim)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    assert {table.path: (table.in_features, table.out_features) for table in shape.tables} == tables
    assert shape.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize(("model_type", "changes"), SMALL, ids=[f"{i}-{SMALL[i][0]}" for i in range(len(SMALL))])
def test_every_linear_and_count_of_a_small_model(model_type: str, changes: dict[str, Any]) -> None:
    config = config_of(model_type, changes)
    shape = from_config(config, "small")
    assert not shape.estimated
    model = build(config)
    compare(shape, model)
    written = from_config(model.config.to_dict(), "written")
    assert shape_linears(written) == shape_linears(shape)
    assert written.total_parameters == shape.total_parameters
    assert written.layers == shape.layers
    stacked = {
        f"{shape.full_path(linear, index)}": linear.weights
        for layer, indices in shape.layers
        for linear in layer.linears
        for index in indices
        if not linear.is_module
    }
    sizes = {path: parameter.numel() for path, parameter in model.named_parameters()}
    assert stacked == {path: sizes[path] for path in stacked}
    windows = [layer.attention.window for layer, indices in shape.layers for _ in indices]
    types = getattr(model.config, "layer_types", None)
    if types is not None:
        kinds = {index: layer.attention.kind for layer, indices in shape.layers for index in indices}
        words = {"full_attention": "full", "linear_attention": "linear"}
        assert [kinds[index] for index in sorted(kinds)] == [words.get(word, "sliding") for word in types]
    elif getattr(model.config, "sliding_window", None):
        assert windows == [model.config.sliding_window] * shape.num_layers


def test_every_family_is_compared() -> None:
    inside_others = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl_text", "qwen3_vl_moe_text"}
    assert {model_type for model_type, _ in SMALL} | inside_others == set(FAMILIES)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_the_text_part_of_a_model_that_sees(model_type: str) -> None:
    text = {**SIZES, **(EXPERTS if model_type.endswith("moe") else {})}
    if not model_type.startswith("qwen3"):
        del text["head_dim"]
    config = {"model_type": model_type, "text_config": text, "tie_word_embeddings": False}
    shape = from_config(config, "small")
    assert not shape.estimated
    assert "text part" in shape.notes[0]
    made = AutoConfig.for_model(**copy.deepcopy(config))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(made)
    part = "model.language_model."
    found = {path.replace(part, "model."): size for path, size in built_linears(model).items() if part in path}
    wanted = shape_linears(shape)
    assert wanted.pop("lm_head") == (48, 96, False)
    assert wanted == found
    counted = [p.numel() for path, p in model.named_parameters() if path.startswith((part, "lm_head"))]
    assert shape.total_parameters == sum(counted)


SIGHT = {
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 56,
    "patch_size": 4,
    "position_embedding_size": 20,
}


@pytest.mark.parametrize("experts", [False, True])
def test_gemma_4_is_loaded_with_its_part_for_images(experts: bool) -> None:
    """Every linear, every count, and what PEFT trains, of the class that training loads."""
    changes = {**GEMMA4, **EXPERTS, **GEMMA4_EXPERTS} if experts else GEMMA4
    text = config_of("gemma4_text", {**changes, "num_hidden_layers": 7})
    config = {"model_type": "gemma4", "text_config": text, "vision_config": SIGHT, "audio_config": None}
    shape = from_config(config, "small")
    model = build(config)
    assert type(model).__name__ == "Gemma4ForConditionalGeneration"
    linears = shape_linears(shape) | {
        linear.path: (linear.in_features, linear.out_features, linear.bias) for linear in shape.sight
    }
    assert linears == built_linears(model)
    assert shape.total_parameters == built_parameters(model)
    in_sight = [p.numel() for path, p in model.named_parameters() if "vision" in path]
    assert shape.sight_parameters == sum(in_sight) > 0
    assert f"{sum(in_sight):,} of small's parameters are its part for images" in shape.notes[0]
    assert shape.linear_weights == from_config(text, "text").linear_weights
    for targets in ("all-linear", r".*language_model.*\.(q|o)_proj"):
        counted = lora_parameters(shape, 4, targets)
        assert counted == trained_by_peft(build_small(config), r=4, target_modules=targets)


def test_gemma_4s_count_is_that_of_its_checkpoint() -> None:
    row = find_model("gemma-4-26B-A4B")
    assert row is not None
    shape = from_config(row.config, row.name)
    assert shape.total_parameters == row.parameters == 25_805_933_872 == built_parameters(build(row.config))


@pytest.mark.parametrize("name", REAL)
def test_a_real_model(name: str) -> None:
    row = find_model(name)
    assert row is not None
    model = build(row.config)
    compare(from_config(row.config, name), model)
    assert built_parameters(model) == row.parameters


LLAMA = ("llama", {"num_hidden_layers": 3})
GPT2 = ("gpt2", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 32})
QWEN3_5 = ("qwen3_5_text", DELTA)
ADAPTERS: list[tuple[tuple[str, dict[str, Any]], dict[str, Any]]] = [
    (LLAMA, {"r": 8, "target_modules": "all-linear"}),
    (LLAMA, {"r": 3, "target_modules": ["q_proj", "v_proj"]}),
    (LLAMA, {"r": 4, "target_modules": ["q_proj", "mlp.down_proj"]}),
    (LLAMA, {"r": 4, "target_modules": ["model.layers.1.self_attn.q_proj", "up_proj"]}),
    (LLAMA, {"r": 4, "target_modules": r"model\.layers\.(0|2)\.mlp\.(gate|up)_proj"}),
    (LLAMA, {"r": 4, "target_modules": r".*_proj"}),
    (LLAMA, {"r": 4, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 16}}),
    (LLAMA, {"r": 4, "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o": 9, r".*\.1\.self_attn\.o_proj": 7}}),
    (LLAMA, {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]}),
    (LLAMA, {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 1}),
    (LLAMA, {"r": 4, "target_modules": "all-linear", "exclude_modules": ["down_proj", "model.layers.0.mlp.up_proj"]}),
    (LLAMA, {"r": 4, "target_modules": "all-linear", "exclude_modules": r".*layers\.1\..*"}),
    (LLAMA, {"r": 4, "target_modules": "all-linear", "use_dora": True}),
    (LLAMA, {"r": 4, "target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    (LLAMA, {"r": 4, "target_modules": ["embed_tokens", "lm_head", "k_proj"], "use_dora": True}),
    (GPT2, {"r": 5, "target_modules": "all-linear"}),
    (GPT2, {"r": 5, "target_modules": ["c_proj", "wte", "wpe"], "use_dora": True}),
    (GPT2, {"r": 5, "target_modules": ["c_attn"], "rank_pattern": {"c_attn": 2}}),
    (QWEN3_5, {"r": 4, "target_modules": "all-linear"}),
    (QWEN3_5, {"r": 4, "target_modules": ["in_proj_qkv", "q_proj"], "use_dora": True}),
    (("phi3", {"head_dim": None}), {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    (("gemma4_text", GEMMA4), {"r": 4, "target_modules": "all-linear"}),
    (("llama4_text", {"num_local_experts": 5, "intermediate_size_mlp": 72}), {"r": 4, "target_modules": "all-linear"}),
    (("gpt_oss", {"num_local_experts": 5}), {"r": 4, "target_modules": "all-linear"}),
    (("mixtral", {"num_local_experts": 5}), {"r": 4, "target_modules": "all-linear"}),
    (("qwen2_moe", {"head_dim": None, **EXPERTS}), {"r": 4, "target_modules": "all-linear"}),
    (("mixtral", {"num_local_experts": 5}), {"r": 4, "target_modules": ["q_proj", "w1", "w3", "w2"]}),
    (("mixtral", {"num_local_experts": 5}), {"r": 4, "target_modules": r".*\.(q_proj|w1|w3|gate)"}),
    (("qwen3_moe", EXPERTS), {"r": 4, "target_modules": r".*layers\.1\..*(v|gate|up)_proj"}),
    (("qwen3_moe", EXPERTS), {"r": 4, "target_modules": ["k_proj", "gate"], "layers_to_transform": [1]}),
    (("qwen3_moe", EXPERTS), {"r": 4, "target_modules": "all-linear", "exclude_modules": ["q_proj"]}),
    (("qwen3_moe", EXPERTS), {"r": 4, "target_modules": "all-linear", "rank_pattern": {"down_proj": 3}}),
    (("qwen3_moe", EXPERTS), {"r": 4, "target_modules": "all-linear", "rank_pattern": {"gate_up_proj": 3}}),
    (("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2}), {"r": 4, "target_modules": "all-linear"}),
    (("olmoe", {"head_dim": None, **EXPERTS}), {"r": 4, "target_modules": ["down_proj", "mlp.gate_proj", "up_proj"]}),
    (("deepseek_v3", DEEPSEEK), {"r": 4, "target_modules": "all-linear"}),
    (("deepseek_v3", DEEPSEEK), {"r": 4, "target_modules": ["o_proj", "down_proj"]}),
    (("deepseek_v3", DEEPSEEK), {"r": 4, "target_modules": r".*\.0\..*down_proj|.*o_proj"}),
]


def trained_by_peft(model: nn.Module, **options: Any) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    trained, _ = adapted.get_nb_trainable_parameters()
    return int(trained)


def build_small(config: dict[str, Any]) -> nn.Module:
    """On the CPU, where DoRA can take the norm of the weights."""
    values = copy.deepcopy(config)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))


@pytest.mark.parametrize(("model", "options"), ADAPTERS, ids=range(len(ADAPTERS)))
def test_what_peft_would_train(model: tuple[str, dict[str, Any]], options: dict[str, Any]) -> None:
    config = config_of(*model)
    counted = lora_parameters(from_config(config, "small"), **options)
    assert counted == trained_by_peft(build_small(config), **options)


@pytest.mark.parametrize("number", range(len(SMALL)))
def test_what_peft_would_train_with_drawn_ranks_and_names(number: int) -> None:
    """Any rank, and any list of the linears that a family has, by last names or whole paths."""
    config, draw = config_of(*SMALL[number]), random.Random(number)
    shape, model = from_config(config, "small"), build_small(config)
    linears = {path: path.rpartition(".")[2] for path in built_linears(model) if path != shape.head.path}
    names, paths = sorted(set(linears.values())), sorted(linears)
    for _ in range(3):
        rank = draw.randint(1, 40)
        chosen = draw.sample(names, draw.randint(1, len(names))) + draw.sample(paths, draw.randint(0, 2))
        try:
            counted = lora_parameters(shape, rank, chosen)
        except InputError:  # one of two linears that lie in one tensor
            with pytest.raises(ValueError, match=r"up_proj|gate_proj|w1|w3"):
                trained_by_peft(copy.deepcopy(model), r=rank, target_modules=chosen)
            continue
        assert counted == trained_by_peft(copy.deepcopy(model), r=rank, target_modules=chosen), (rank, chosen)


def test_what_peft_would_train_in_a_real_model() -> None:
    row = find_model("Llama-3.1-8B")
    assert row is not None
    shape = from_config(row.config, row.name)
    assert lora_parameters(shape, 16, "all-linear") == 41_943_040
    assert trained_by_peft(build(row.config), r=16, target_modules="all-linear") == 41_943_040


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj", "w1"]}, {"target_modules": ["w2"], "use_dora": True}]
)
def test_peft_refuses_what_we_refuse_of_stacked_experts(options: dict[str, Any]) -> None:
    config = config_of("mixtral", {"num_local_experts": 5})
    with pytest.raises(ValueError, match=r"w1|use_dora"):
        trained_by_peft(build_small(config), r=4, **options)
    with pytest.raises(InputError, match=r"w1|use_dora"):
        lora_parameters(from_config(config, "small"), 4, **options)


def test_peft_refuses_layers_beside_a_text_as_we_do() -> None:
    config = config_of(*LLAMA)
    options: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "layers_to_transform": [1]}
    with pytest.raises(ValueError, match="layers_to_transform"):
        trained_by_peft(build_small(config), **options)
    with pytest.raises(InputError, match="layers_to_transform"):
        lora_parameters(from_config(config, "small"), **options)
