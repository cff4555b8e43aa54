"""DeepSeek-V3: keys and values from one latent vector (MLA), experts after the first dense layers."""

from __future__ import annotations

from thriftune.shapes.blocks import Part, assemble, experts_part, gated_mlp, read_experts
from thriftune.shapes.fields import Fields
from thriftune.shapes.shape import Attention, Linear, ModelShape


def deepseek_v3(fields: Fields) -> ModelShape:
    """The part that predicts more than the next token is not counted: transformers does not build it."""
    hidden = fields.whole("hidden_size")
    mixture = read_experts(fields, "n_routed_experts", active=8)
    width = fields.whole("moe_intermediate_size", default=2048)
    shared_width = width * fields.whole("n_shared_experts", default=1)
    sparse = experts_part(hidden, width, mixture) + gated_mlp(hidden, shared_width, path="mlp.shared_experts")
    sparse += Part(others=mixture.count * hidden)
    dense = gated_mlp(hidden, fields.whole("intermediate_size"))
    first = fields.whole("first_k_dense_replace", default=3, least=0)
    part, attention = _latent_attention(fields, hidden)
    part += Part(norms=2 * hidden)
    count = fields.layer_count()
    return assemble(
        fields,
        [(part + (dense if index < first else sparse)).layer(attention) for index in range(count)],
        hidden=hidden,
        vocabulary=fields.whole("vocab_size"),
        tied=fields.tied(False),
        norms=hidden,
    )


def _latent_attention(fields: Fields, hidden: int) -> tuple[Part, Attention]:
    heads = fields.whole("num_attention_heads")
    rotated = fields.whole("qk_rope_head_dim", default=64)
    plain = fields.whole("qk_nope_head_dim", default=128)
    value = fields.whole("v_head_dim", default=128)
    key_rank = fields.whole("kv_lora_rank", default=512)
    query_rank = fields.maybe_whole("q_lora_rank", 1536)
    bias = fields.flag("attention_bias")
    queries = heads * (plain + rotated)
    if query_rank is None:
        query = Part((Linear("self_attn.q_proj", hidden, queries),))
    else:
        down = Linear("self_attn.q_a_proj", hidden, query_rank, bias=bias)
        query = Part((down, Linear("self_attn.q_b_proj", query_rank, queries)), norms=query_rank)
    rest = Part(
        (
            Linear("self_attn.kv_a_proj_with_mqa", hidden, key_rank + rotated, bias=bias),
            Linear("self_attn.kv_b_proj", key_rank, heads * (plain + value)),
            Linear("self_attn.o_proj", heads * value, hidden, bias=bias),
        ),
        norms=key_rank,
    )
    return query + rest, Attention("full", heads, heads, plain + rotated, value)
