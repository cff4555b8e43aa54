"""Qwen3.5: three layers of linear attention (a gated delta net) to one of full attention with an output gate."""

from __future__ import annotations

from thriftune.shapes.blocks import (
    Part,
    assemble,
    attention_part,
    experts_part,
    gated_mlp,
    listed_or,
    read_experts,
    read_heads,
)
from thriftune.shapes.experts import gated_shared_expert
from thriftune.shapes.fields import Fields
from thriftune.shapes.shape import Attention, AttentionKind, Linear, ModelShape


def qwen3_5(fields: Fields) -> ModelShape:
    hidden = fields.whole("hidden_size")
    return _model(fields, gated_mlp(hidden, fields.whole("intermediate_size")), kv_heads=4)


def qwen3_5_moe(fields: Fields) -> ModelShape:
    hidden = fields.whole("hidden_size")
    mixture = read_experts(fields, "num_experts", active=8)
    sparse = experts_part(hidden, fields.whole("moe_intermediate_size", default=512), mixture)
    shared = gated_shared_expert(hidden, fields.whole("shared_expert_intermediate_size", default=512))
    return _model(fields, sparse + shared + Part(others=mixture.count * hidden), kv_heads=2)


def _model(fields: Fields, mlp: Part, kv_heads: int) -> ModelShape:
    sizes = read_heads(fields, kv_heads=kv_heads, dim=256)
    bias = fields.flag("attention_bias")
    rest = mlp + Part(norms=2 * sizes.hidden)
    full = rest + attention_part(sizes, qkv_bias=bias, output_bias=bias, head_norms="each", query_copies=2)
    linear, linear_attention = _delta_net(fields, sizes.hidden)
    linear += rest
    interval = fields.whole("full_attention_interval", default=4)
    count = fields.layer_count()
    usual: list[AttentionKind] = ["linear" if (index + 1) % interval else "full" for index in range(count)]
    return assemble(
        fields,
        [
            linear.layer(linear_attention) if reach[0] == "linear" else full.layer(sizes.attention(reach))
            for reach in listed_or(fields, None, usual)
        ],
        hidden=sizes.hidden,
        vocabulary=fields.whole("vocab_size"),
        tied=fields.tied(False),
        norms=sizes.hidden,
    )


def _delta_net(fields: Fields, hidden: int) -> tuple[Part, Attention]:
    key_dim = fields.whole("linear_key_head_dim", default=128)
    value_dim = fields.whole("linear_value_head_dim", default=128)
    key_heads = fields.whole("linear_num_key_heads", default=16)
    value_heads = fields.whole("linear_num_value_heads", default=32)
    kernel = fields.whole("linear_conv_kernel_dim", default=4)
    values = value_heads * value_dim
    mixed = 2 * key_heads * key_dim + values
    part = Part(
        (
            Linear("linear_attn.in_proj_qkv", hidden, mixed),
            Linear("linear_attn.in_proj_z", hidden, values),
            Linear("linear_attn.in_proj_b", hidden, value_heads),
            Linear("linear_attn.in_proj_a", hidden, value_heads),
            Linear("linear_attn.out_proj", values, hidden),
        ),
        norms=value_dim,
        others=mixed * kernel + 2 * value_heads,  # the convolution, a decay and a time step for each head
    )
    return part, Attention("linear", value_heads, key_heads, key_dim, value_dim)
