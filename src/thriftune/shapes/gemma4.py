"""Gemma 4's text part: wider heads where attention is full, keys used as values, shared keys, per-layer embeddings,
experts beside the MLP. Each layer is built by itself, because almost nothing is the same in all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from thriftune.shapes.blocks import (
    Heads,
    Mixture,
    Part,
    Reach,
    assemble,
    experts_part,
    gated_mlp,
    listed_or,
    read_experts,
    read_heads,
)
from thriftune.shapes.fields import Fields
from thriftune.shapes.shape import AttentionKind, Layer, Linear, ModelShape


@dataclass(frozen=True, slots=True)
class Options:
    """What decides how a layer looks, read once."""

    sizes: Heads
    wide: Heads  # of the layers with full attention
    width: int
    bias: bool
    keys_as_values: bool
    first_shared: int  # layers from here on use an earlier layer's keys and values
    double_shared: bool
    per_layer: int
    mixture: Mixture | None
    expert_width: int


def gemma4(fields: Fields) -> ModelShape:
    count = fields.layer_count()
    options = _read(fields, count)
    usual: list[AttentionKind] = ["sliding" if (index + 1) % 6 else "full" for index in range(count)]
    reaches = listed_or(fields, fields.maybe_whole("sliding_window", 512), usual)
    reaches[-1] = ("full", None)  # the last layer always is
    hidden = options.sizes.hidden
    shape = assemble(
        fields,
        [_layer(options, index, reach) for index, reach in enumerate(reaches)],
        hidden=hidden,
        vocabulary=fields.whole("vocab_size"),
        tied=fields.tied(True),
        norms=hidden,
    )
    if not options.per_layer:
        return shape
    rows = fields.whole("vocab_size_per_layer_input", default=262_144)
    table = Linear("model.embed_tokens_per_layer", rows, count * options.per_layer)
    projection = Linear("model.per_layer_model_projection", hidden, count * options.per_layer)
    return replace(
        shape,
        norms=hidden + options.per_layer,
        others=table.weights,
        outer=(projection,),
        tables=(*shape.tables, table),
    )


def _read(fields: Fields, count: int) -> Options:
    sizes = read_heads(fields, kv_heads=4, dim=256)
    keys_as_values = fields.flag("attention_k_eq_v")
    overrides = _written_out(fields)
    wide_dim = overrides.get("head_dim") or fields.whole("global_head_dim", default=512)
    wide_groups = overrides.get("num_key_value_heads")
    if wide_groups is None and keys_as_values and not overrides:
        wide_groups = fields.maybe_whole("num_global_key_value_heads")
    shared = fields.whole("num_kv_shared_layers", default=0, least=0)
    has_experts = fields.flag("enable_moe_block")
    return Options(
        sizes=sizes,
        wide=replace(sizes, dim=wide_dim, kv_heads=wide_groups or sizes.kv_heads),
        width=fields.whole("intermediate_size"),
        bias=fields.flag("attention_bias"),
        keys_as_values=keys_as_values,
        first_shared=count - shared,
        double_shared=fields.flag("use_double_wide_mlp"),
        per_layer=fields.whole("hidden_size_per_layer_input", default=256, least=0),
        mixture=read_experts(fields, "num_experts", chosen="top_k_experts") if has_experts else None,
        expert_width=fields.whole("moe_intermediate_size") if has_experts else 0,
    )


def _written_out(fields: Fields) -> dict[str, Any]:
    """What newer files say of the full layers under `per_layer_config`, by layer: the same for all of them."""
    value = fields.values.get("per_layer_config")
    entries = list(value.values()) if isinstance(value, dict) else []
    if value is not None and not (entries and all(isinstance(entry, dict) for entry in entries)):
        fields.wrong("per_layer_config", "an object with one object for each full layer", value)
        return {}
    keys = ("head_dim", "num_key_value_heads")
    found = {key: entry[key] for entry in entries for key in keys if entry.get(key) is not None}
    for key, size in found.items():
        if type(size) is not int or size < 1:
            fields.wrong(f"per_layer_config {key}", "a whole number of at least 1", size)
    return {key: size for key, size in found.items() if type(size) is int and size > 0}


def _layer(options: Options, index: int, reach: Reach) -> Layer:
    is_full = reach[0] == "full"
    sizes = options.wide if is_full else options.sizes
    shares = index >= options.first_shared
    part = _attention(options, sizes, has_keys=not shares, has_values=not (is_full and options.keys_as_values))
    hidden = sizes.hidden
    part += gated_mlp(hidden, options.width * (2 if options.double_shared and shares else 1))
    part += Part(norms=4 * hidden)
    if options.per_layer:
        gate = Linear("per_layer_input_gate", hidden, options.per_layer)
        part += Part((gate, Linear("per_layer_projection", options.per_layer, hidden)), norms=hidden)
    if options.mixture is not None:
        part += experts_part(hidden, options.expert_width, options.mixture, path="experts")
        router = Linear("router.proj", hidden, options.mixture.count)
        part += Part((router,), norms=3 * hidden, others=hidden + options.mixture.count)  # the router's two scales
    return part.layer(sizes.attention(reach))


def _attention(options: Options, sizes: Heads, *, has_keys: bool, has_values: bool) -> Part:
    queries, keys = sizes.heads * sizes.dim, sizes.kv_heads * sizes.dim
    linears = [Linear("self_attn.q_proj", sizes.hidden, queries, bias=options.bias)]
    if has_keys:
        linears.append(Linear("self_attn.k_proj", sizes.hidden, keys, bias=options.bias))
    if has_keys and has_values:
        linears.append(Linear("self_attn.v_proj", sizes.hidden, keys, bias=options.bias))
    linears.append(Linear("self_attn.o_proj", queries, sizes.hidden, bias=options.bias))
    return Part(tuple(linears), norms=sizes.dim * (2 if has_keys else 1))
