"""What a model is made of, without its weights: every linear by name and size, layer by layer.

Counts are parameters; sizes are elements. A `Layer` that repeats is stored once, with the layers it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

AttentionKind = Literal["full", "sliding", "linear", "none"]


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix. `path` is its name within the layer ('self_attn.q_proj'); within the model for the head.

    `copies` counts equal matrices (experts) and `active` how many of them a token goes through. `is_module` is False
    for experts that the architecture stacks into one tensor: 4-bit loading does not reach those, and LoRA only in some
    families (stacked.py).
    """

    path: str
    in_features: int
    out_features: int
    bias: bool = False
    copies: int = 1
    active: int = 1
    is_module: bool = True

    @property
    def name(self) -> str:
        return self.path.rsplit(".", 1)[-1]

    @property
    def weights(self) -> int:
        """Elements of the matrices, biases not counted."""
        return self.copies * self.in_features * self.out_features

    @property
    def parameters(self) -> int:
        return self.weights + (self.copies * self.out_features if self.bias else 0)


@dataclass(frozen=True, slots=True)
class Attention:
    """How tokens of a row meet. `window` is the reach of sliding attention in tokens. Sizes are per head."""

    kind: AttentionKind
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. `norms` are elements of normalisation weights and `others` every remaining parameter (routers
    that are no linear, convolutions, sinks): together with the linears, the whole layer."""

    linears: tuple[Linear, ...]
    attention: Attention
    norms: int
    others: int = 0
    gated: bool = True  # the MLP multiplies an activated gate with a second product

    @property
    def parameters(self) -> int:
        return sum(linear.parameters for linear in self.linears) + self.norms + self.others


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A causal language model: its text part, and what is loaded beside it. `layers` holds (layer, its indices).

    `head` is the output projection, also when it shares the embedding's weights (`tied`); `others` are parameters
    outside the layers that are neither embedding, head, norm nor `outer` (learned positions). `outer` are linears
    outside the layers and `tables` the embedding modules (rows in, width out, none of their elements counted twice):
    both by their path in the model. `sight` are the linears, by path, and `sight_others` the other parameters of a part
    for images, which text does not pass. `notes` say what was estimated or left out. `part_of` is the model_type of the
    whole where this is its text part; `activation` and `rope` are the MLP's function and the kind of rotary positions.
    """

    name: str
    model_type: str
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    layers: tuple[tuple[Layer, tuple[int, ...]], ...]
    embedding: int
    head: Linear
    tied: bool
    norms: int
    others: int = 0
    stored_dtype: str | None = None
    estimated: bool = False
    notes: tuple[str, ...] = ()
    layer_prefix: str = "model.layers"
    outer: tuple[Linear, ...] = ()
    tables: tuple[Linear, ...] = ()
    sight: tuple[Linear, ...] = ()
    sight_others: int = 0
    part_of: str = ""
    activation: str = "silu"
    rope: str = "default"

    @property
    def num_layers(self) -> int:
        return sum(len(indices) for _, indices in self.layers)

    def linears(self) -> Iterator[tuple[str, Linear, int]]:
        """(the layer's indices joined, linear, repeats) of all decoder layers, then the `outer` ones without an index;
        the head is not among them."""
        for layer, indices in self.layers:
            for linear in layer.linears:
                yield ",".join(map(str, indices)), linear, len(indices)
        for linear in self.outer:
            yield "", linear, 1

    def full_path(self, linear: Linear, index: int) -> str:
        """The name of a layer's linear in the model: 'model.layers.3.self_attn.q_proj'."""
        return f"{self.layer_prefix}.{index}.{linear.path}"

    @property
    def total_parameters(self) -> int:
        """All parameters, tied ones once: what `sum(p.numel() for p in model.parameters())` gives."""
        inside = sum(layer.parameters * len(indices) for layer, indices in self.layers)
        head = self.head.parameters if not self.tied else (self.head.out_features if self.head.bias else 0)
        outside = sum(linear.parameters for linear in self.outer)
        return inside + outside + self.embedding + head + self.norms + self.others + self.sight_parameters

    @property
    def sight_parameters(self) -> int:
        return sum(linear.parameters for linear in self.sight) + self.sight_others

    def sum_over_linears(self, count: Callable[[Linear], int]) -> int:
        return sum(count(linear) * repeats for _, linear, repeats in self.linears())

    @property
    def linear_weights(self) -> int:
        """Elements of the decoder's matrices that are modules of their own: what a step in 4 bits unpacks."""
        return self.sum_over_linears(lambda linear: linear.weights if linear.is_module else 0)

    @property
    def quantised_weights(self) -> int:
        """Elements that 4-bit loading quantises: those, and the matrices of the part for images."""
        return self.linear_weights + sum(linear.weights for linear in self.sight)

    @property
    def active_weights(self) -> int:
        """Elements of the decoder's matrices that one token is multiplied with."""
        return self.sum_over_linears(lambda linear: linear.active * linear.in_features * linear.out_features)

    @property
    def norm_parameters(self) -> int:
        return self.norms + sum(layer.norms * len(indices) for layer, indices in self.layers)
