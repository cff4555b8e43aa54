"""Families whose layers are all attention with q, k and v of its own and one MLP: the table of how they differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from thriftune.shapes.blocks import (
    HeadNorms,
    Heads,
    Part,
    Reach,
    assemble,
    attention_part,
    every_nth_full,
    everywhere_full,
    fused_gated_mlp,
    gated_mlp,
    plain_mlp,
    read_heads,
    same_window,
    switched_window,
)
from thriftune.shapes.fields import Fields
from thriftune.shapes.shape import Linear, ModelShape

Switch = bool | tuple[str, bool]  # always or never, or the key that says, with its default


@dataclass(frozen=True, slots=True)
class Dense:
    """One row of the table. `layer_norms` are norms of the hidden size in each layer; `norm_width` is 2 for norms with
    a bias, 1 for those without and 0 for those without weights. The numbers stand in for keys that are not there."""

    qkv_bias: Switch = False
    output_bias: Switch = False
    mlp_bias: Switch = False
    head_norms: HeadNorms = "none"
    layer_norms: int = 2
    norm_width: int = 1
    mlp: Literal["gated", "fused", "plain"] = "gated"
    mlp_names: tuple[str, str] = ("mlp.up_proj", "mlp.down_proj")  # of a plain one
    fused_attention: bool = False
    output: str = "o_proj"
    head_bias: bool = False
    tied: bool = False
    reach: Callable[[Fields, int], list[Reach]] = everywhere_full
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    vocabulary: int | None = None

    def __call__(self, fields: Fields) -> ModelShape:
        sizes = read_heads(fields, heads=self.heads, kv_heads=self.kv_heads, dim=self.head_dim)
        width = fields.whole("intermediate_size")
        norms = Part(norms=self.layer_norms * self.norm_width * sizes.hidden)
        part = self._attention(fields, sizes) + self._mlp(fields, sizes.hidden, width) + norms
        gated = self.mlp != "plain"
        reaches = self.reach(fields, fields.layer_count())
        return assemble(
            fields,
            [part.layer(sizes.attention(reach), gated=gated) for reach in reaches],
            hidden=sizes.hidden,
            vocabulary=fields.whole("vocab_size", default=self.vocabulary),
            tied=fields.tied(self.tied),
            norms=self.norm_width * sizes.hidden,
            head_bias=self.head_bias,
        )

    def _attention(self, fields: Fields, sizes: Heads) -> Part:
        if self.fused_attention:
            queries, keys = sizes.heads * sizes.dim, sizes.kv_heads * sizes.dim
            return Part(
                (
                    Linear("self_attn.qkv_proj", sizes.hidden, queries + 2 * keys),
                    Linear(f"self_attn.{self.output}", queries, sizes.hidden),
                )
            )
        qkv_bias, output_bias = _is_on(fields, self.qkv_bias), _is_on(fields, self.output_bias)
        return attention_part(
            sizes, qkv_bias=qkv_bias, output_bias=output_bias, head_norms=self.head_norms, output=self.output
        )

    def _mlp(self, fields: Fields, hidden: int, width: int) -> Part:
        bias = _is_on(fields, self.mlp_bias)
        if self.mlp == "plain":
            return plain_mlp(hidden, width, self.mlp_names, bias=bias)
        return fused_gated_mlp(hidden, width) if self.mlp == "fused" else gated_mlp(hidden, width, bias=bias)


def _is_on(fields: Fields, switch: Switch) -> bool:
    return switch if isinstance(switch, bool) else fields.flag(switch[0], switch[1])


BY_KEY: Switch = ("attention_bias", False)
MLP_BY_KEY: Switch = ("mlp_bias", False)
LLAMA = Dense(qkv_bias=BY_KEY, output_bias=BY_KEY, mlp_bias=MLP_BY_KEY)
QWEN2 = Dense(qkv_bias=True, reach=switched_window)

DENSE: dict[str, Dense] = {
    "llama": LLAMA,
    "granite": LLAMA,
    "smollm3": Dense(qkv_bias=BY_KEY, output_bias=BY_KEY, mlp_bias=MLP_BY_KEY, kv_heads=4, tied=True),
    "arcee": Dense(qkv_bias=BY_KEY, output_bias=BY_KEY, mlp_bias=MLP_BY_KEY, mlp="plain"),
    "mistral": Dense(reach=same_window(4096), kv_heads=8),
    "ministral3": Dense(reach=same_window(None), kv_heads=8, head_dim=128),
    "qwen2": QWEN2,
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen3": Dense(
        qkv_bias=BY_KEY, output_bias=BY_KEY, head_norms="each", kv_heads=32, head_dim=128, reach=switched_window
    ),
    "qwen3_vl_text": Dense(qkv_bias=BY_KEY, output_bias=BY_KEY, head_norms="each", kv_heads=32, head_dim=128),
    "seed_oss": Dense(
        qkv_bias=("attention_bias", True),
        output_bias=("attention_out_bias", False),
        mlp_bias=MLP_BY_KEY,
        kv_heads=8,
        head_dim=128,
    ),
    "gemma": Dense(qkv_bias=BY_KEY, output_bias=BY_KEY, tied=True, kv_heads=16, head_dim=256),
    "gemma2": Dense(
        qkv_bias=BY_KEY,
        output_bias=BY_KEY,
        layer_norms=4,
        tied=True,
        kv_heads=4,
        head_dim=256,
        reach=every_nth_full(2, 4096),
    ),
    "gemma3_text": Dense(
        qkv_bias=BY_KEY,
        output_bias=BY_KEY,
        head_norms="each",
        layer_norms=4,
        tied=True,
        heads=8,
        kv_heads=4,
        head_dim=256,
        vocabulary=262_208,
        reach=every_nth_full(6, 4096),
    ),
    "phi3": Dense(fused_attention=True, mlp="fused", reach=same_window(None)),
    "phi": Dense(
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        layer_norms=1,
        norm_width=2,
        mlp="plain",
        mlp_names=("mlp.fc1", "mlp.fc2"),
        output="dense",
        head_bias=True,
    ),
    "olmo": Dense(qkv_bias=BY_KEY, output_bias=BY_KEY, norm_width=0),
    "olmo2": Dense(qkv_bias=BY_KEY, output_bias=BY_KEY, head_norms="whole"),
    "olmo3": Dense(qkv_bias=BY_KEY, output_bias=BY_KEY, head_norms="whole", reach=every_nth_full(4, 4096)),
    "starcoder2": Dense(
        qkv_bias=("use_bias", True),
        output_bias=("use_bias", True),
        mlp_bias=("use_bias", True),
        norm_width=2,
        mlp="plain",
        mlp_names=("mlp.c_fc", "mlp.c_proj"),
        tied=True,
        kv_heads=2,
        reach=same_window(None),
    ),
    "cohere2": Dense(qkv_bias=BY_KEY, output_bias=BY_KEY, layer_norms=1, tied=True, reach=every_nth_full(4, 4096)),
    "glm": Dense(qkv_bias=("attention_bias", True), mlp="fused", kv_heads=2, head_dim=128),
    "glm4": Dense(qkv_bias=("attention_bias", True), mlp="fused", layer_norms=4, kv_heads=2, head_dim=128),
}
