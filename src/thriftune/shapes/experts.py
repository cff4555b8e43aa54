"""Mixtures of experts. transformers stacks a layer's experts into two tensors, which are no linears to LoRA or to 4-bit
loading; most routers are bare parameters as well."""

from __future__ import annotations

from thriftune.shapes.blocks import (
    HeadNorms,
    Heads,
    Part,
    Reach,
    assemble,
    attention_part,
    every_nth_full,
    everywhere_full,
    experts_part,
    gated_mlp,
    listed_or,
    read_experts,
    read_heads,
    same_window,
)
from thriftune.shapes.fields import Fields
from thriftune.shapes.shape import Linear, ModelShape


def mixtral(fields: Fields) -> ModelShape:
    sizes = read_heads(fields, kv_heads=8)
    mixture = read_experts(fields, "num_local_experts", active=2)
    mlp = experts_part(sizes.hidden, fields.whole("intermediate_size"), mixture)
    part = attention_part(sizes) + mlp + _norms_and_router(sizes.hidden, mixture.count)
    reaches = same_window(None)(fields, fields.layer_count())
    return _model(fields, sizes, [part] * len(reaches), reaches)


def olmoe(fields: Fields) -> ModelShape:
    sizes = read_heads(fields)
    mixture = read_experts(fields, "num_experts", active=8)
    mlp = experts_part(sizes.hidden, fields.whole("intermediate_size"), mixture)
    part = _attention(fields, sizes, "whole") + mlp + _norms_and_router(sizes.hidden, mixture.count)
    reaches = everywhere_full(fields, fields.layer_count())
    return _model(fields, sizes, [part] * len(reaches), reaches)


def qwen3_moe(fields: Fields) -> ModelShape:
    sizes = read_heads(fields, kv_heads=4)
    mixture = read_experts(fields, "num_experts", "num_local_experts", active=8)
    sparse = experts_part(sizes.hidden, fields.whole("moe_intermediate_size", default=768), mixture)
    attention = _attention(fields, sizes, "each")
    layers = _sparse_or_dense(fields, sizes, attention, sparse + Part(others=mixture.count * sizes.hidden))
    window = fields.maybe_whole("sliding_window", 4096) if fields.flag("use_sliding_window") else None
    reach: Reach = ("full" if window is None else "sliding", window)
    return _model(fields, sizes, layers, [reach] * len(layers))


def qwen2_moe(fields: Fields) -> ModelShape:
    sizes = read_heads(fields, kv_heads=16)
    mixture = read_experts(fields, "num_experts", active=4)
    sparse = experts_part(sizes.hidden, fields.whole("moe_intermediate_size", default=1408), mixture)
    shared = gated_shared_expert(sizes.hidden, fields.whole("shared_expert_intermediate_size", default=5632))
    attention = attention_part(sizes, qkv_bias=fields.flag("qkv_bias", True))
    layers = _sparse_or_dense(fields, sizes, attention, sparse + shared + Part(others=mixture.count * sizes.hidden))
    return _model(fields, sizes, layers, everywhere_full(fields, len(layers)))


def gated_shared_expert(hidden: int, width: int) -> Part:
    """The expert that every token goes through, and the linear that weighs it."""
    return gated_mlp(hidden, width, path="mlp.shared_expert") + Part((Linear("mlp.shared_expert_gate", hidden, 1),))


def gpt_oss(fields: Fields) -> ModelShape:
    """A sink for each head, biases on attention, router and experts; every other layer slides."""
    sizes = read_heads(fields, kv_heads=8, dim=64)
    bias = fields.flag("attention_bias", True)
    mixture = read_experts(fields, "num_local_experts", "num_experts", active=4)
    mlp = experts_part(sizes.hidden, fields.whole("intermediate_size"), mixture, bias=True)
    sinks_and_router_bias = Part(others=sizes.heads + mixture.count)
    attention = attention_part(sizes, qkv_bias=bias, output_bias=bias)
    part = attention + mlp + _norms_and_router(sizes.hidden, mixture.count) + sinks_and_router_bias
    reaches = every_nth_full(2, 128)(fields, fields.layer_count())
    return _model(fields, sizes, [part] * len(reaches), reaches)


def llama4(fields: Fields) -> ModelShape:
    """Its router is a linear, which PEFT adapts with the rest. Chunks of attention count as a window of their size."""
    sizes = read_heads(fields, kv_heads=8, dim=128)
    count = fields.layer_count()
    mixture = read_experts(fields, "num_local_experts", active=1)
    width = fields.whole("intermediate_size")
    sparse = experts_part(sizes.hidden, width, mixture, path="feed_forward.experts")
    shared = gated_mlp(sizes.hidden, width, path="feed_forward.shared_expert")
    router = Part((Linear("feed_forward.router", sizes.hidden, mixture.count),))
    dense = gated_mlp(sizes.hidden, fields.whole("intermediate_size_mlp", default=16_384), path="feed_forward")
    step = fields.whole("interleave_moe_layer_step", default=1)
    with_experts = fields.whole_list("moe_layers")
    chosen = set(range(step - 1, count, step) if with_experts is None else with_experts)
    attention = _attention(fields, sizes, "none") + Part(norms=2 * sizes.hidden)
    layers = [attention + (sparse + shared + router if index in chosen else dense) for index in range(count)]
    interval = fields.whole("no_rope_layer_interval", default=4)
    rotated = fields.whole_list("no_rope_layers") or [(index + 1) % interval for index in range(count)]
    if len(rotated) != count:
        fields.wrong("no_rope_layers", f"a list of {count} entries", rotated)
        rotated = [0] * count
    chunk = fields.maybe_whole("attention_chunk_size", 8192)
    return _model(fields, sizes, layers, listed_or(fields, chunk, ["sliding" if it else "full" for it in rotated]))


def _attention(fields: Fields, sizes: Heads, head_norms: HeadNorms) -> Part:
    bias = fields.flag("attention_bias")
    return attention_part(sizes, qkv_bias=bias, output_bias=bias, head_norms=head_norms)


def _norms_and_router(hidden: int, experts: int) -> Part:
    return Part(norms=2 * hidden, others=experts * hidden)


def _sparse_or_dense(fields: Fields, sizes: Heads, attention: Part, sparse: Part) -> list[Part]:
    """The Qwen way of saying which layers have experts: a step, and a list of those that have none."""
    step = fields.whole("decoder_sparse_step", default=1)
    without = set(fields.whole_list("mlp_only_layers") or [])
    indices = range(fields.layer_count())
    has_experts = [(index + 1) % step == 0 and index not in without for index in indices]
    dense = sparse if all(has_experts) else gated_mlp(sizes.hidden, fields.whole("intermediate_size"))
    norms = Part(norms=2 * sizes.hidden)
    return [attention + (sparse if here else dense) + norms for here in has_experts]


def _model(fields: Fields, sizes: Heads, layers: list[Part], reaches: list[Reach]) -> ModelShape:
    return assemble(
        fields,
        [part.layer(sizes.attention(reach)) for part, reach in zip(layers, reaches, strict=True)],
        hidden=sizes.hidden,
        vocabulary=fields.whole("vocab_size"),
        tied=fields.tied(False),
        norms=sizes.hidden,
    )
