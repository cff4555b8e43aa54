"""From a config.json to a shape: the table of families, the text part of a larger model, and the estimate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from thriftune.errors import ModelError
from thriftune.shapes.blocks import (
    KINDS,
    Part,
    assemble,
    attention_part,
    experts_part,
    gated_mlp,
    read_experts,
    read_heads,
)
from thriftune.shapes.delta import qwen3_5, qwen3_5_moe
from thriftune.shapes.dense import DENSE
from thriftune.shapes.experts import gpt_oss, llama4, mixtral, olmoe, qwen2_moe, qwen3_moe
from thriftune.shapes.fields import Fields
from thriftune.shapes.gemma4 import gemma4
from thriftune.shapes.latent import deepseek_v3
from thriftune.shapes.older import gpt2, gpt_neox
from thriftune.shapes.shape import ModelShape
from thriftune.shapes.sight import with_sight

# transformers' model_type -> what builds its shape. Every one of them is compared with transformers in
# tests/parity/test_shapes_parity.py; a model_type that is not here is estimated.
FAMILIES: dict[str, Callable[[Fields], ModelShape]] = {
    **DENSE,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "qwen3_vl_moe_text": qwen3_moe,
    "qwen3_5_text": qwen3_5,
    "qwen3_5_moe_text": qwen3_5_moe,
    "gpt_oss": gpt_oss,
    "llama4_text": llama4,
    "deepseek_v3": deepseek_v3,
    "gemma4_text": gemma4,
}
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
UNCOUNTED_KEYS = (
    *("hybrid_override_pattern", "linear_attn_config", "linear_num_key_heads", "mamba_d_state", "mamba_num_heads"),
    "ssm_state_size",
)
OTHER_SENSES = ("vision_config", "audio_config", "vision_tower")


def from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape of a causal language model from its config.json; `name` stands in the shape and in messages.

    A model with more than a text part is taken by that part, and a model_type that is not in FAMILIES is estimated as a
    decoder of the usual kind; the shape's notes say so. Raises ModelError that names every missing or wrong field.
    """
    if not isinstance(config, Mapping):
        raise ModelError(
            given=f"the config of {name} is {type(config).__name__}, not an object",
            allowed="a config.json whose outermost value is an object",
            do="download the model again",
        )
    fields, model_type = _text_part(config, name)
    family = FAMILIES.get(model_type)
    shape = with_sight((family or _estimate)(fields), fields)
    _note_other_senses(config, shape, fields)
    if family is None and model_type:
        fields.notes.append(
            f"model_type {model_type!r} is not in the table of known families: sizes are estimated as those of a "
            f"{'mixture-of-experts' if _names_experts(fields) else 'dense'} decoder with a gated MLP"
        )
    for values in (fields.values, fields.outer):
        stored = values.get("quantization_config")
        if isinstance(stored, Mapping):
            fields.notes.append(
                f"the weights are stored quantised ({stored.get('quant_method', 'in an unknown way')}); counts are of "
                "the unquantised model"
            )
    fields.check()
    return replace(
        shape,
        model_type=model_type,
        estimated=family is None,
        notes=tuple(fields.notes),
        part_of=str(fields.outer.get("model_type", "")),
        activation=str(fields.values.get("hidden_act") or "silu"),
        rope=_rope_type(fields.values),
    )


def _rope_type(values: Mapping[str, Any]) -> str:
    """Under the name that a config has for it, of which transformers has had three."""
    for key in ("rope_parameters", "rope_scaling"):
        found = values.get(key)
        if isinstance(found, Mapping):
            return str(found.get("rope_type") or found.get("type") or "default")
    return "default"


def _text_part(config: Mapping[str, Any], name: str) -> tuple[Fields, str]:
    """The values that describe the text model, and its model_type ('' and a problem when there is none)."""
    inner = config.get("text_config")
    outer_type = config.get("model_type")
    if inner is None or not isinstance(inner, Mapping):
        fields = Fields(config, name)
        if inner is not None:
            fields.wrong("text_config", "an object", inner)
    else:
        fields = Fields(inner, name, outer=config)
    model_type = fields.values.get("model_type")
    if model_type is None and isinstance(outer_type, str):
        model_type = f"{outer_type}_text" if f"{outer_type}_text" in FAMILIES else outer_type
    if not isinstance(model_type, str) or not model_type:
        fields.wrong("model_type", "the name of a family such as llama", model_type)
        return fields, ""
    return fields, model_type


def _note_other_senses(config: Mapping[str, Any], shape: ModelShape, fields: Fields) -> None:
    """What is said of a model's parts for images and sound."""
    if shape.sight:
        fields.notes.append(
            f"{shape.sight_parameters:,} of {fields.name}'s parameters are its part for images: training loads and "
            "holds them, and they are counted in memory; text does not pass them"
        )
        left_out = "sound" if isinstance(config.get("audio_config"), Mapping) else ""
    else:
        has_others = fields.outer or any(isinstance(config.get(key), Mapping) for key in OTHER_SENSES)
        left_out = "images or sound" if has_others else ""
    if left_out:
        fields.notes.append(f"{fields.name} is planned by its text part; what it has for {left_out} is not counted")


def _names_experts(fields: Fields) -> bool:
    return any(fields.has(key) for key in EXPERT_KEYS)


def _estimate(fields: Fields) -> ModelShape:
    """A decoder as most are: grouped-query attention, gated MLP or experts in every layer, two norms. One whose config
    names layers of another kind would be miscounted, several times over, and is refused."""
    other_kinds = [key for key in UNCOUNTED_KEYS if fields.has(key)]
    listed = fields.values.get("layer_types")
    if isinstance(listed, list) and any(KINDS.get(str(kind), "linear") == "linear" for kind in listed):
        other_kinds.append("layer_types")
    if other_kinds:
        fields.conflicts.append(
            f"{', '.join(other_kinds)}: layers of a kind (state-space, linear attention, convolution) that no formula "
            "here counts"
        )
    sizes = read_heads(fields)
    bias = fields.flag("attention_bias")
    if _names_experts(fields):
        mixture = read_experts(fields, *(key for key in EXPERT_KEYS if fields.has(key)), active=1)
        width = fields.whole("moe_intermediate_size", "intermediate_size")
        mlp = experts_part(sizes.hidden, width, mixture) + Part(others=mixture.count * sizes.hidden)
    else:
        mlp = gated_mlp(sizes.hidden, fields.whole("intermediate_size"))
    part = attention_part(sizes, qkv_bias=bias, output_bias=bias) + mlp + Part(norms=2 * sizes.hidden)
    return assemble(
        fields,
        [part.layer(sizes.attention(("full", None)))] * fields.layer_count(),
        hidden=sizes.hidden,
        vocabulary=fields.whole("vocab_size"),
        tied=fields.tied(False),
        norms=sizes.hidden,
    )
