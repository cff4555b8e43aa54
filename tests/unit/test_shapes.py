"""Shapes from configs: counts that were checked against transformers, bad configs, notes, adapters. No torch needed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thriftune.catalog.models import CatalogModel, all_models, find_model
from thriftune.errors import InputError, ModelError
from thriftune.shapes import FAMILIES, ModelShape, adapted_linears, from_config, lora_parameters, saved_parameters
from thriftune.shapes.fields import LARGEST, MOST_LAYERS

COUNTED = [model for model in all_models() if model.parameters is not None]
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "vocab_size": 11,
}
REQUIRED = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def shape_of(name: str) -> ModelShape:
    row = find_model(name)
    assert row is not None
    return from_config(row.config, row.name)


@pytest.mark.parametrize("model", COUNTED, ids=lambda model: model.name)
def test_the_count_is_what_transformers_builds(model: CatalogModel) -> None:
    shape = from_config(model.config, model.name)
    assert shape.total_parameters == model.parameters
    assert not shape.estimated
    assert shape.model_type == model.model_type
    assert shape.max_positions == model.max_positions
    assert shape.stored_dtype == model.stored_dtype


@pytest.mark.parametrize("model", all_models(), ids=lambda model: model.name)
def test_a_shape_is_consistent(model: CatalogModel) -> None:
    shape = from_config(model.config, model.name)
    indices = sorted(index for _, indices in shape.layers for index in indices)
    assert indices == list(range(shape.num_layers))
    assert len({layer for layer, _ in shape.layers}) == len(shape.layers)
    assert shape.head.out_features == shape.vocab_size
    assert shape.tables[0].weights == shape.embedding == shape.vocab_size * shape.hidden_size
    assert shape.active_weights > 0
    all_weights = shape.sum_over_linears(lambda linear: linear.weights)
    assert shape.active_weights <= all_weights
    assert (shape.active_weights == all_weights) == (shape.linear_weights == all_weights)  # but for experts
    for layer, _ in shape.layers:
        assert (layer.attention.window is not None) == (layer.attention.kind == "sliding")
        assert layer.attention.heads % layer.attention.kv_heads == 0


def test_the_one_that_transformers_does_not_know_is_estimated() -> None:
    shape = shape_of("MiMo-7B-Base")
    assert shape.estimated
    assert "'mimo'" in shape.notes[0] and "estimated" in shape.notes[0]
    assert 7.5e9 < shape.total_parameters < 7.7e9


def test_every_part_of_a_count() -> None:
    shape = from_config(LLAMA, "small")
    layer = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 20 + 2 * 8
    assert shape.total_parameters == 3 * layer + 8 + 2 * 8 * 11
    assert from_config({**LLAMA, "tie_word_embeddings": True}, "small").total_parameters == 3 * layer + 8 + 8 * 11
    biased = from_config({**LLAMA, "attention_bias": True, "mlp_bias": True}, "small")
    assert biased.total_parameters == shape.total_parameters + 3 * (8 + 4 + 4 + 8 + 20 + 20 + 8)
    assert shape.norm_parameters == 3 * 2 * 8 + 8
    assert shape.linear_weights == shape.active_weights == 3 * (layer - 16)
    ((only, indices),) = shape.layers
    assert indices == (0, 1, 2)
    assert shape.full_path(only.linears[0], 2) == "model.layers.2.self_attn.q_proj"
    assert [linear.name for linear in only.linears][:4] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (only.attention.heads, only.attention.kv_heads, only.attention.head_dim) == (4, 2, 2)


def test_experts_are_counted_whole_and_worked_in_part() -> None:
    shape = from_config(MIXTRAL, "small")
    attention, expert = 8 * 8 * 2 + 8 * 4 * 2, 3 * 8 * 20
    assert shape.linear_weights == 3 * attention
    assert shape.active_weights == 3 * (attention + 2 * expert)
    assert shape.sum_over_linears(lambda linear: linear.weights) == 3 * (attention + 4 * expert)
    assert 12.6e9 < shape_of("Mixtral-8x7B").active_weights < 12.9e9  # a model of "13 billion active"


def test_how_far_attention_reaches() -> None:
    def reach(name: str) -> list[tuple[str, int | None]]:
        found = {}
        for layer, indices in shape_of(name).layers:
            found.update(dict.fromkeys(indices, (layer.attention.kind, layer.attention.window)))
        return [found[index] for index in sorted(found)]

    full = ("full", None)
    assert reach("gemma-2-2b")[:4] == [("sliding", 4096), full] * 2
    assert reach("gemma-3-1b-it")[:7] == [*[("sliding", 512)] * 5, full, ("sliding", 512)]
    assert set(reach("Mistral-7B-v0.1")) == {("sliding", 4096)}
    assert set(reach("Mistral-7B-Instruct-v0.3")) == {full}
    assert set(reach("Qwen2.5-7B")) == {full}
    assert reach("gpt-oss-20b")[:2] == [("sliding", 128), full]
    assert reach("Qwen3.5-27B")[:4] == [*[("linear", None)] * 3, full]
    assert reach("Llama-4-Scout-17B-16E")[:4] == [*[("sliding", 8192)] * 3, full]


@pytest.mark.parametrize("field", REQUIRED)
@pytest.mark.parametrize("value", ["absent", None, 0, -3, 2.5, 4096.0, True, "4096", [1], 10**13, float("nan")])
def test_a_missing_or_wrong_field_is_named(field: str, value: object) -> None:
    config = {**LLAMA, field: value}
    if value == "absent":
        del config[field]
    with pytest.raises(ModelError, match="small") as caught:
        from_config(config, "small")
    problems = re.findall(r"\n    - (.*)", caught.value.given)
    assert len(problems) == 1
    assert problems[0].startswith(f"{field} ")


def test_all_wrong_fields_are_named_at_once() -> None:
    config = {
        "model_type": "qwen3",
        "hidden_size": 0,
        "vocab_size": True,
        "tie_word_embeddings": "yes",
        "head_dim": "x",
    }
    with pytest.raises(ModelError) as caught:
        from_config(config, "small")
    problems = re.findall(r"\n    - (\w+)", caught.value.given)
    assert sorted(problems) == sorted([*REQUIRED, "tie_word_embeddings", "head_dim"])


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"num_attention_heads": 16, "num_key_value_heads": 16}, "hidden_size 8 is less than"),
        ({"num_hidden_layers": MOST_LAYERS + 1}, "num_hidden_layers is above 10,000"),
        ({"vocab_size": LARGEST + 1}, "vocab_size must be"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"model_type": None}, "model_type must be"),
        ({"model_type": ["llama"]}, "model_type must be"),
        ({"text_config": [LLAMA]}, "text_config must be an object"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types must be a list of 3"),
        ({"model_type": "gemma2", "layer_types": ["full_attention", {}, "x"]}, "layer_types must be a list of 3"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok 3 is more"),
        ({"model_type": "gpt2", "num_attention_heads": 3, "n_positions": 4}, "3 does not divide the hidden size 8"),
        ({"model_type": "llama4_text", "num_local_experts": 2, "no_rope_layers": [1]}, "no_rope_layers must be"),
        ({"model_type": "gemma4_text", "per_layer_config": {"2": {"head_dim": "wide"}}}, "per_layer_config head_dim"),
        ({"model_type": "gemma4_text", "per_layer_config": [1]}, "per_layer_config must be"),
    ],
)
def test_values_that_make_no_model(changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ModelError, match=re.escape(wanted)):
        from_config({**LLAMA, **changes}, "small")


def test_a_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(ModelError, match="not an object"):
        from_config(["llama"], "small")  # type: ignore[arg-type]


KEYS = [
    *sorted({key for model in all_models() for key in model.config} - {"model_type"}),
    *["layer_types", "text_config", "moe_layers", "no_rope_layers", "mlp_only_layers", "per_layer_config"],
    *["attention_bias", "use_sliding_window", "decoder_sparse_step", "sliding_window_pattern", "num_kv_shared_layers"],
]
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 64) | st.floats() | st.sampled_from(["", "full_attention", "yes"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "0"]), inner, max_size=3),
    max_leaves=6,
)


@given(
    model_type=st.sampled_from([*FAMILIES, "unheard-of"]),
    base=st.booleans(),
    values=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 12) | ANY_JSON, max_size=12),
)
def test_any_json_gives_a_shape_or_one_error(model_type: str, base: bool, values: dict[str, Any]) -> None:
    config = {**(LLAMA if base else {}), **values, "model_type": model_type}
    try:
        shape = from_config(json.loads(json.dumps(config)), "any")
    except ModelError:
        return
    assert shape.total_parameters > 0
    assert shape.num_layers >= 1
    assert shape.estimated == (shape.model_type not in FAMILIES)


def test_a_larger_model_is_planned_by_its_text_part() -> None:
    text = {**LLAMA, "model_type": "qwen3_vl_text"}
    outer = {"model_type": "qwen3_vl", "text_config": text, "vision_config": {}, "torch_dtype": "torch.bfloat16"}
    shape = from_config({**outer, "tie_word_embeddings": True}, "seeing")
    assert shape.model_type == "qwen3_vl_text"
    assert shape.tied
    assert shape.stored_dtype == "bfloat16"
    assert not shape.estimated
    assert "text part" in shape.notes[0]
    del text["model_type"]
    assert from_config(outer, "seeing").model_type == "qwen3_vl_text"
    text["tie_word_embeddings"] = False
    assert not from_config({**outer, "tie_word_embeddings": True}, "seeing").tied


def test_what_is_wrong_in_a_part_for_images_is_named() -> None:
    text = {**LLAMA, "model_type": "gemma4_text", "hidden_size_per_layer_input": 0}
    with pytest.raises(ModelError, match="vision_config: hidden_size must be") as caught:
        from_config({"model_type": "gemma4", "text_config": text, "vision_config": {"hidden_size": 0}}, "small")
    assert "vision_config: num_hidden_layers is missing" in caught.value.given
    blind = from_config({"model_type": "gemma4", "text_config": text, "vision_config": None}, "small")
    assert not blind.sight and "images or sound is not counted" in blind.notes[0]


def test_an_unknown_family_is_estimated_as_the_usual_decoder() -> None:
    known = from_config(LLAMA, "small")
    unknown = from_config({**LLAMA, "model_type": "unheard-of"}, "small")
    assert unknown.total_parameters == known.total_parameters
    assert unknown.estimated
    assert "'unheard-of'" in unknown.notes[0] and "dense" in unknown.notes[0]
    experts = from_config({**MIXTRAL, "model_type": "unheard-of"}, "small")
    assert experts.total_parameters == from_config(MIXTRAL, "small").total_parameters
    assert "mixture-of-experts" in experts.notes[0]


UNCOUNTED = {
    **dict.fromkeys(("ssm_state_size", "hybrid_override_pattern", "linear_attn_config", "linear_num_key_heads"), 16),
    "layer_types": ["conv", "full_attention"],
}


@pytest.mark.parametrize("key", UNCOUNTED)
def test_layers_of_a_kind_that_is_not_counted_are_refused_and_not_guessed(key: str) -> None:
    with pytest.raises(ModelError, match=f"{key}: layers of a kind"):
        from_config({**LLAMA, "model_type": "unheard-of", key: UNCOUNTED[key]}, "small")
    assert not from_config({**LLAMA, key: UNCOUNTED[key]}, "small").estimated


def test_kinds_of_attention_that_a_decoder_lists_are_no_reason_to_refuse_it() -> None:
    listed = ["sliding_attention", "full_attention"]
    assert from_config({**LLAMA, "model_type": "unheard-of", "layer_types": listed}, "small").estimated


def test_quantised_storage_is_noted() -> None:
    shape = from_config({**LLAMA, "quantization_config": {"quant_method": "fp8"}}, "small")
    assert "stored quantised (fp8)" in shape.notes[0]
    assert not from_config(LLAMA, "small").notes


def test_adapters_of_a_real_model() -> None:
    shape = shape_of("Llama-3.1-8B")
    assert lora_parameters(shape, 16, "all-linear") == 41_943_040
    assert lora_parameters(shape, 8, "all-linear") == 20_971_520
    adapted = adapted_linears(shape, 16, ["q_proj", "v_proj"])
    assert [(part.linear.name, part.rank, part.repeats) for part in adapted] == [("q_proj", 16, 32), ("v_proj", 16, 32)]
    assert sum(part.parameters for part in adapted) == 32 * 16 * (8192 + 5120)
    halves = adapted_linears(shape, 16, ["q_proj"], rank_pattern={r"layers\.[0-3]\.self_attn\.q_proj": 4})
    assert [(part.rank, part.repeats) for part in halves] == [(4, 4), (16, 28)]
    assert [part.repeats for part in adapted_linears(shape, 2, ["q_proj"], layers_to_transform=[1, 5])] == [2]


def test_adapters_follow_names_and_expressions() -> None:
    shape = from_config(LLAMA, "small")

    def paths(targets: str | list[str], **options: Any) -> list[tuple[str, int]]:
        return [(part.linear.path, part.repeats) for part in adapted_linears(shape, 2, targets, **options)]

    assert paths("model.layers.1.self_attn.q_proj") == [("self_attn.q_proj", 1)]
    assert paths("q_proj, up_proj") == [("self_attn.q_proj", 3), ("mlp.up_proj", 3)]
    assert paths("q_proj") == [("self_attn.q_proj", 3)]
    assert paths(["lm_head", "embed_tokens"]) == [("model.embed_tokens", 1), ("lm_head", 1)]
    assert paths("ALL-linear", modules_to_save=["mlp"]) == paths(["q_proj", "k_proj", "v_proj", "o_proj"])
    assert len(paths("all-linear")) == 7
    assert lora_parameters(shape, 2, ["lm_head"], use_dora=True) == 2 * (8 + 11) + 11


@pytest.mark.parametrize(
    ("targets", "options", "wanted"),
    [
        (["q_porj"], {}, r"'q_porj' matches no linear of small \(did you mean q_proj\?\)"),
        ("q_proj,nonsense", {}, "'nonsense' matches no linear"),
        (["mlp"], {}, "'mlp' matches no linear"),
        ([], {}, "empty"),
        ("", {}, "empty"),
        ("(q_proj", {}, "no regular expression"),
        ("all-linear", {"layers_to_transform": [0]}, "layers_to_transform beside"),
        (["q_proj"], {"layers_to_transform": [7]}, "leave no module"),
        (["q_proj"], {"exclude_modules": ["self_attn.q_proj"]}, "leave no module"),
        (["q_proj"], {"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        (["q_proj"], {"rank_pattern": {"q_proj": True}}, "rank_pattern"),
        (["q_proj"], {"rank_pattern": {"(": 3}}, "no regular expression"),
    ],
)
def test_targets_that_cannot_be_used(targets: str | list[str], options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(InputError, match=wanted):
        adapted_linears(from_config(LLAMA, "small"), 4, targets, **options)


def test_stacked_experts_where_peft_adapts_them() -> None:
    shape = from_config(MIXTRAL, "small")
    parts = {part.linear.path: part.parameters for part in adapted_linears(shape, 2, "all-linear")}
    assert parts["mlp.experts.down_proj"] == 3 * 4 * 2 * (20 + 8)
    assert parts["mlp.experts.gate_up_proj"] == 3 * 4 * (2 * 2) * (8 + 40)
    assert parts["mlp.gate.weight"] == 3 * 2 * (8 + 4)
    assert len(parts) == 7
    with pytest.raises(InputError, match="w1 and w3 together"):
        adapted_linears(shape, 2, ["w1"])
    with pytest.raises(InputError, match="use_dora"):
        lora_parameters(shape, 2, "all-linear", use_dora=True)
    assert lora_parameters(shape, 2, ["q_proj"], use_dora=True) == 3 * (2 * 16 + 8)


def test_modules_that_are_trained_whole() -> None:
    shape = from_config(LLAMA, "small")
    assert saved_parameters(shape, ["lm_head", "embed_tokens"]) == (2 * 88, ())
    assert saved_parameters(shape, ["lm_head", "norm"]) == (88, ("norm",))
    assert saved_parameters(shape, ["k_proj", "self_attn.k_proj"]) == (3 * 32, ())
