"""GPT-2 and GPT-NeoX: one projection for q, k and v, biases, and names of their own."""

from __future__ import annotations

from dataclasses import replace

from thriftune.shapes.blocks import Heads, Part, assemble, plain_mlp
from thriftune.shapes.fields import Fields
from thriftune.shapes.shape import Linear, ModelShape


def gpt2(fields: Fields) -> ModelShape:
    """Its linears are transformers' Conv1D, which keep (in, out) the other way round and which PEFT adapts all the
    same. Positions are learned."""
    hidden = fields.whole("n_embd", "hidden_size")
    width = fields.whole("n_inner", "intermediate_size", default=4 * hidden)
    sizes = _equal_heads(fields, hidden, fields.whole("n_head", "num_attention_heads"))
    attention = Part(
        (Linear("attn.c_attn", hidden, 3 * hidden, bias=True), Linear("attn.c_proj", hidden, hidden, bias=True)),
        norms=4 * hidden,
    )
    part = attention + plain_mlp(hidden, width, ("mlp.c_fc", "mlp.c_proj"))
    layer = part.layer(sizes.attention(("full", None)), gated=False)
    positions = fields.whole("n_positions", "max_position_embeddings")
    shape = assemble(
        fields,
        [layer] * fields.layer_count("n_layer", "num_hidden_layers"),
        hidden=hidden,
        vocabulary=fields.whole("vocab_size"),
        tied=fields.tied(True),
        norms=2 * hidden,
        embedding="transformer.wte",
        layer_prefix="transformer.h",
    )
    learned = Linear("transformer.wpe", positions, hidden)
    return replace(shape, max_positions=positions, others=learned.weights, tables=(*shape.tables, learned))


def gpt_neox(fields: Fields) -> ModelShape:
    hidden = fields.whole("hidden_size")
    sizes = _equal_heads(fields, hidden, fields.whole("num_attention_heads"))
    bias = fields.flag("attention_bias", True)
    attention = Part(
        (
            Linear("attention.query_key_value", hidden, 3 * hidden, bias=bias),
            Linear("attention.dense", hidden, hidden, bias=bias),
        ),
        norms=4 * hidden,
    )
    width = fields.whole("intermediate_size")
    part = attention + plain_mlp(hidden, width, ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"))
    return assemble(
        fields,
        [part.layer(sizes.attention(("full", None)), gated=False)] * fields.layer_count(),
        hidden=hidden,
        vocabulary=fields.whole("vocab_size"),
        tied=fields.tied(False),
        norms=2 * hidden,
        embedding="gpt_neox.embed_in",
        layer_prefix="gpt_neox.layers",
    )


def _equal_heads(fields: Fields, hidden: int, heads: int) -> Heads:
    if hidden % heads:
        fields.conflicts.append(f"the number of attention heads {heads} does not divide the hidden size {hidden}")
    return Heads(hidden, heads, heads, max(1, hidden // heads))
