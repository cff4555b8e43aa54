"""The part for images that stands beside some text models: it is loaded with them and held, but text does not pass it.

Gemma 4's: transformers' class for its whole config has both parts, and training loads that class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from thriftune.shapes.fields import Fields
from thriftune.shapes.shape import Linear, ModelShape

TOWER = "model.vision_tower"
CHANNELS = 3  # of a picture


def with_sight(shape: ModelShape, fields: Fields) -> ModelShape:
    """The shape with the image part of the whole config (`fields.outer`), if that is Gemma 4's; paths as they are in
    the whole model. What is wrong in it is added to the fields' problems."""
    if fields.outer.get("model_type") != "gemma4":
        return shape
    vision = fields.outer.get("vision_config")
    linears, others = _tower(vision, fields, shape.hidden_size) if isinstance(vision, Mapping) else ((), 0)
    return replace(
        shape,
        layer_prefix=_inside(shape.layer_prefix),
        outer=tuple(replace(linear, path=_inside(linear.path)) for linear in shape.outer),
        tables=tuple(replace(table, path=_inside(table.path)) for table in shape.tables),
        sight=linears,
        sight_others=others,
    )


def _inside(path: str) -> str:
    return f"model.language_model.{path.removeprefix('model.')}"


def _tower(vision: Mapping[str, Any], whole: Fields, text_width: int) -> tuple[tuple[Linear, ...], int]:
    """Its linears by their paths, the projection into the text model's width last; and all its other parameters."""
    fields = Fields(vision, whole.name)
    hidden, count = fields.whole("hidden_size", default=768), fields.layer_count()
    dim, width = fields.whole("head_dim", default=64), fields.whole("intermediate_size", default=3072)
    queries = dim * fields.whole("num_attention_heads", default=12)
    keys = dim * fields.whole("num_key_value_heads", default=12)
    patch = fields.whole("patch_size", default=16)
    positions = fields.whole("position_embedding_size", default=10_240)
    sizes = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    linears = [Linear(f"{TOWER}.patch_embedder.input_proj", CHANNELS * patch**2, hidden)]
    for index in range(count):
        linears += [Linear(f"{TOWER}.encoder.layers.{index}.{name}.linear", *size) for name, size in sizes.items()]
    linears.append(Linear("model.embed_vision.embedding_projection", hidden, text_width))
    whole.problems += [f"vision_config: {problem}" for problem in fields.problems]
    return tuple(linears), 2 * positions * hidden + count * (4 * hidden + 2 * dim)
