"""The pieces that families share: grouped-query attention, MLPs, experts, the reach of attention, the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from thriftune.shapes.fields import Fields
from thriftune.shapes.shape import Attention, AttentionKind, Layer, Linear, ModelShape

HeadNorms = Literal["none", "each", "whole"]
Reach = tuple[AttentionKind, int | None]  # the kind and, for sliding attention, its window in tokens
KINDS: dict[str, AttentionKind] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "sliding",
    "linear_attention": "linear",
}


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a layer: its linears, and how many parameters are norms and others."""

    linears: tuple[Linear, ...] = ()
    norms: int = 0
    others: int = 0

    def __add__(self, more: Part) -> Part:
        return Part(self.linears + more.linears, self.norms + more.norms, self.others + more.others)

    def layer(self, attention: Attention, *, gated: bool = True) -> Layer:
        return Layer(self.linears, attention, norms=self.norms, others=self.others, gated=gated)


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes of grouped-query attention, in elements and heads."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int

    def attention(self, reach: Reach) -> Attention:
        kind, window = reach
        return Attention(kind, self.heads, self.kv_heads, self.dim, self.dim, window if kind == "sliding" else None)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts of a layer, and how many of them each token goes through."""

    count: int
    active: int


def read_heads(
    fields: Fields, *, heads: int | None = None, kv_heads: int | None = None, dim: int | None = None
) -> Heads:
    """The attention's sizes. The arguments stand in for keys that are not there; null means the usual derivation."""
    hidden = fields.whole("hidden_size")
    count = fields.whole("num_attention_heads", default=heads)
    groups = fields.maybe_whole("num_key_value_heads", kv_heads) or count
    size = fields.maybe_whole("head_dim", dim) or hidden // count
    if size == 0:
        fields.conflicts.append(f"hidden_size {hidden} is less than num_attention_heads {count}")
    if count % groups:
        fields.conflicts.append(f"num_key_value_heads {groups} does not divide num_attention_heads {count}")
    return Heads(hidden, count, groups, max(1, size))


def attention_part(
    sizes: Heads,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    head_norms: HeadNorms = "none",
    output: str = "o_proj",
    query_copies: int = 1,
) -> Part:
    """Separate q, k and v. `query_copies` is 2 where q_proj also makes an output gate."""
    queries, keys = sizes.heads * sizes.dim, sizes.kv_heads * sizes.dim
    norms = {"none": 0, "each": 2 * sizes.dim, "whole": queries + keys}[head_norms]
    linears = (
        Linear("self_attn.q_proj", sizes.hidden, query_copies * queries, bias=qkv_bias),
        Linear("self_attn.k_proj", sizes.hidden, keys, bias=qkv_bias),
        Linear("self_attn.v_proj", sizes.hidden, keys, bias=qkv_bias),
        Linear(f"self_attn.{output}", queries, sizes.hidden, bias=output_bias),
    )
    return Part(linears, norms=norms)


def gated_mlp(hidden: int, width: int, *, path: str = "mlp", bias: bool = False) -> Part:
    return Part(
        (
            Linear(f"{path}.gate_proj", hidden, width, bias=bias),
            Linear(f"{path}.up_proj", hidden, width, bias=bias),
            Linear(f"{path}.down_proj", width, hidden, bias=bias),
        )
    )


def fused_gated_mlp(hidden: int, width: int) -> Part:
    return Part((Linear("mlp.gate_up_proj", hidden, 2 * width), Linear("mlp.down_proj", width, hidden)))


def plain_mlp(hidden: int, width: int, names: tuple[str, str], *, bias: bool = True) -> Part:
    first, second = names
    return Part((Linear(first, hidden, width, bias=bias), Linear(second, width, hidden, bias=bias)))


def experts_part(hidden: int, width: int, mixture: Mixture, *, path: str = "mlp.experts", bias: bool = False) -> Part:
    """Gated experts that transformers keeps as two stacked tensors, so no linear of them is a module."""
    copies, active = mixture.count, mixture.active
    return Part(
        (
            Linear(f"{path}.gate_up_proj", hidden, 2 * width, bias, copies, active, is_module=False),
            Linear(f"{path}.down_proj", width, hidden, bias, copies, active, is_module=False),
        )
    )


def read_experts(
    fields: Fields, *names: str, active: int | None = None, chosen: str = "num_experts_per_tok"
) -> Mixture:
    """How many experts a layer has, by the first of `names`, and how many a token goes through."""
    count = fields.whole(*names)
    taken = fields.whole(chosen, default=active)
    if taken > count:
        fields.conflicts.append(f"{chosen} {taken} is more than {names[0]} {count}")
    return Mixture(count, taken)


def group(layers: Sequence[Layer]) -> tuple[tuple[Layer, tuple[int, ...]], ...]:
    """Equal layers once, each with its indices, in the order in which they first appear."""
    places: dict[Layer, list[int]] = {}
    for index, layer in enumerate(layers):
        places.setdefault(layer, []).append(index)
    return tuple((layer, tuple(indices)) for layer, indices in places.items())


def everywhere_full(fields: Fields, count: int) -> list[Reach]:
    return [("full", None)] * count


def same_window(default: int | None) -> Callable[[Fields, int], list[Reach]]:
    """Every layer slides when `sliding_window` is set; `default` where the key is not there."""

    def reach(fields: Fields, count: int) -> list[Reach]:
        window = fields.maybe_whole("sliding_window", default)
        return [("sliding" if window else "full", window)] * count

    return reach


def switched_window(fields: Fields, count: int) -> list[Reach]:
    """The Qwen way: a switch, and the first `max_window_layers` stay full."""
    window = fields.maybe_whole("sliding_window", 4096) if fields.flag("use_sliding_window") else None
    first = fields.whole("max_window_layers", default=28, least=0)
    return listed_or(fields, window, ["full" if window is None or i < first else "sliding" for i in range(count)])


def every_nth_full(period: int, window: int) -> Callable[[Fields, int], list[Reach]]:
    """Each `sliding_window_pattern`-th layer is full and the others slide, unless `layer_types` says otherwise."""

    def reach(fields: Fields, count: int) -> list[Reach]:
        step = fields.whole("sliding_window_pattern", default=period)
        span = fields.maybe_whole("sliding_window", window)
        return listed_or(fields, span, ["sliding" if (i + 1) % step else "full" for i in range(count)])

    return reach


def listed_or(fields: Fields, window: int | None, usual: Sequence[AttentionKind]) -> list[Reach]:
    """The kinds of `layer_types`, else the usual ones; a layer slides only where there is a window."""
    words = fields.word_list("layer_types", KINDS, len(usual))
    kinds = [KINDS[word] for word in words] if words is not None else list(usual)
    return [("full", None) if kind == "sliding" and window is None else (kind, window) for kind in kinds]


def assemble(
    fields: Fields,
    layers: Sequence[Layer],
    *,
    hidden: int,
    vocabulary: int,
    tied: bool,
    norms: int,
    head_bias: bool = False,
    embedding: str = "model.embed_tokens",
    layer_prefix: str = "model.layers",
) -> ModelShape:
    """The model around its layers: one embedding and one head of vocabulary x hidden."""
    return ModelShape(
        name=fields.name,
        model_type=str(fields.values.get("model_type")),
        hidden_size=hidden,
        vocab_size=vocabulary,
        max_positions=fields.maybe_whole("max_position_embeddings"),
        layers=group(layers),
        embedding=vocabulary * hidden,
        head=Linear("lm_head", hidden, vocabulary, bias=head_bias),
        tied=tied,
        norms=norms,
        stored_dtype=fields.stored_dtype(),
        layer_prefix=layer_prefix,
        tables=(Linear(embedding, vocabulary, hidden),),
    )
