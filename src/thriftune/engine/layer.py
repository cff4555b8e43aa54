"""A decoder layer of the Llama kind as a program: its forward pass, and its backward pass by hand.

Shape legend: T tokens, D width, Q heads of queries times their size, N = Q + 2 keys' or values', F width of the MLP,
R padded rank of a stack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thriftune.engine.attention import Attention, Kind
from thriftune.engine.packing import PackedBatch
from thriftune.engine.sizes import Keep, LayerSizes
from thriftune.engine.weights import Outgoing, Stack
from thriftune.kernels.dropout import Draw
from thriftune.kernels.rms_norm import rms_norm, rms_norm_backward
from thriftune.kernels.rope import Heads, turn
from thriftune.kernels.swiglu import swiglu, swiglu_backward


@dataclass(frozen=True)
class Norm:
    weight_D: Tensor  # noqa: N815
    epsilon: float


@dataclass(frozen=True)
class Layer:
    """A layer's frozen parts. `query_norm` and `key_norm` are Qwen3's, of each head."""

    input_norm: Norm
    qkv: Stack
    query_norm: Norm | None
    key_norm: Norm | None
    o: Stack
    mlp_norm: Norm
    gate_up: Stack
    down: Stack
    heads: int
    groups: int
    head_size: int
    attention: Kind

    @property
    def stacks(self) -> list[Stack]:
        return [self.qkv, self.o, self.gate_up, self.down]

    @property
    def sizes(self) -> LayerSizes:
        norms = self.query_norm is not None
        qkv, o, gate_up, down = (stack.sizes for stack in self.stacks)
        drops = any(stack.drops for stack in self.stacks)
        return LayerSizes(qkv, o, gate_up, down, self.heads, self.groups, norms, drops)

    @property
    def columns(self) -> tuple[slice, slice, slice]:
        """Of queries, keys and values in the product of `qkv`."""
        q, kv = self.heads * self.head_size, self.groups * self.head_size
        return slice(0, q), slice(q, q + kv), slice(q + kv, q + 2 * kv)

    def heads_of(self, rows_TN: Tensor) -> Heads:
        """Queries (T, heads, size), keys and values (T, groups, size): views."""
        q, k, v = (rows_TN[:, columns].unflatten(1, (-1, self.head_size)) for columns in self.columns)
        return q, k, v

    def heads_alone(self, like_TN: Tensor) -> Heads:
        """Uninitialised places of the same shapes, with nothing between their tokens: what cuDNN adds up a gradient in
        is as large as the gradient's tokens lie apart, and it takes queries and their gradient to lie alike."""
        tokens, size = like_TN.shape[0], self.head_size
        q, k, v = (like_TN.new_empty(tokens, count, size) for count in (self.heads, self.groups, self.groups))
        return q, k, v

    def acquire_forward(self) -> None:
        """Have what the forward pass multiplies with in its memory. 4-bit layers share it: one layer at a time."""
        for stack in self.stacks:
            stack.acquire(forward=True, backward=False)

    def acquire_backward(self, keep: Keep) -> None:
        """The same for the backward pass of a layer that kept this much."""
        again = {Keep.ALL: (), Keep.NO_MLP: (self.gate_up,), Keep.RESIDUALS: (self.qkv, self.gate_up),
                 Keep.INPUT: (self.qkv, self.o, self.gate_up)}[keep]  # fmt: skip
        for stack in self.stacks:
            stack.acquire(forward=any(stack is found for found in again), backward=True)

    def hold(self) -> None:
        for stack in self.stacks:
            stack.hold()


@dataclass(frozen=True)
class Step:
    """What all layers share in one pass: where tokens stand, the angles, the attention kernel, and what the masks of
    dropout are drawn by (None: there is no dropout)."""

    batch: PackedBatch
    cos_PC: Tensor  # noqa: N815
    sin_PC: Tensor  # noqa: N815
    attention: Attention
    draw: Draw | None = None


@dataclass
class Saved:
    """What the backward pass finds. None is computed again. Sides are the inputs' products with the adapters' A."""

    x_TD: Tensor  # noqa: N815
    qkv: _Qkv | None = None
    attended: _Attended | None = None
    middle_TD: Tensor | None = None  # noqa: N815
    gate_up: _GateUp | None = None
    down_side_TR: Tensor | None = None  # noqa: N815


@dataclass(frozen=True)
class _Qkv:
    """`heads` are queries, keys and values as attention reads them; the last two are there where these have norms."""

    rstd_T1: Tensor  # noqa: N815
    side_TR: Tensor | None  # noqa: N815
    heads: Heads
    product_TN: Tensor | None  # noqa: N815
    rstd_heads: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class _Attended:
    out_TX: Tensor  # noqa: N815
    kept: Any
    side_TR: Tensor | None  # noqa: N815


@dataclass(frozen=True)
class _GateUp:
    """The product lies where its gradient is written, over it."""

    rstd_T1: Tensor  # noqa: N815
    side_TR: Tensor | None  # noqa: N815
    place: Outgoing


def forward(layer: Layer, x_TD: Tensor, step: Step, keep: Keep) -> tuple[Tensor, Saved]:
    qkv = _project(layer, x_TD, step)
    attended = _attend(layer, qkv, step)
    middle_TD, side_o_TR = layer.o.forward(attended.out_TX, x_TD, step.draw)
    attended = _Attended(attended.out_TX, attended.kept, side_o_TR)
    gate_up = _gate_up(layer, middle_TD, step)
    h_TX = layer.down.input_buffer(x_TD)
    swiglu(gate_up.place.gradient_TO, h_TX[:, : layer.down.size_in])
    y_TD, side_down_TR = layer.down.forward(h_TX, middle_TD, step.draw)
    saved = Saved(x_TD, down_side_TR=side_down_TR)
    if keep <= Keep.RESIDUALS:
        saved.middle_TD = middle_TD
    if keep <= Keep.NO_MLP:
        saved.qkv, saved.attended = qkv, attended
    if keep == Keep.ALL:
        saved.gate_up = gate_up
    return y_TD, saved


def _project(layer: Layer, x_TD: Tensor, step: Step) -> _Qkv:
    """Norm, queries, keys and values, their norms and their rotation."""
    normed_TX = layer.qkv.input_buffer(x_TD)
    rstd_T1 = rms_norm(x_TD, layer.input_norm.weight_D, layer.input_norm.epsilon, normed_TX[:, : layer.qkv.size_in])
    product_TN, side_TR = layer.qkv.forward(normed_TX, None, step.draw)
    heads, sources = layer.heads_alone(product_TN), layer.heads_of(product_TN)
    turning = (step.cos_PC, step.sin_PC, step.batch.positions_T)
    if layer.query_norm is None or layer.key_norm is None:
        turn(sources, heads, *turning, inverse=False)
        return _Qkv(rstd_T1, side_TR, heads, None, None)
    q, k = heads[0].flatten(1), heads[1].flatten(1)
    rstd_heads = (
        rms_norm(sources[0].flatten(1), layer.query_norm.weight_D, layer.query_norm.epsilon, q, layer.heads),
        rms_norm(sources[1].flatten(1), layer.key_norm.weight_D, layer.key_norm.epsilon, k, layer.groups),
    )
    turn((*heads[:2], sources[2]), heads, *turning, inverse=False)
    return _Qkv(rstd_T1, side_TR, heads, product_TN, rstd_heads)


def _attend(layer: Layer, qkv: _Qkv, step: Step) -> _Attended:
    out_TX = layer.o.input_buffer(qkv.heads[0])
    out_THK = out_TX[:, : layer.o.size_in].unflatten(1, (layer.heads, layer.head_size))
    kept = step.attention.forward(*qkv.heads, step.batch.segments, layer.attention, out_THK)
    return _Attended(out_TX, kept, None)


def _gate_up(layer: Layer, middle_TD: Tensor, step: Step) -> _GateUp:
    normed_TX = layer.gate_up.input_buffer(middle_TD)
    norm = layer.mlp_norm
    rstd_T1 = rms_norm(middle_TD, norm.weight_D, norm.epsilon, normed_TX[:, : layer.gate_up.size_in])
    place = layer.gate_up.output_buffer(middle_TD)
    _, side_TR = layer.gate_up.forward(normed_TX, None, step.draw, place.gradient_TO)
    return _GateUp(rstd_T1, side_TR, place)


def _compute_again(layer: Layer, saved: Saved, step: Step) -> None:
    """Fill what was not kept, by the same operations on the same numbers."""
    if saved.qkv is None:
        saved.qkv = _project(layer, saved.x_TD, step)
    if saved.attended is None:
        saved.attended = _attend(layer, saved.qkv, step)
        if saved.middle_TD is None:
            saved.middle_TD, side_TR = layer.o.forward(saved.attended.out_TX, saved.x_TD, step.draw)
        else:
            side_TR = layer.o.side(saved.attended.out_TX[:, : layer.o.size_in], step.draw)
        saved.attended = _Attended(saved.attended.out_TX, saved.attended.kept, side_TR)
    assert saved.middle_TD is not None
    if saved.gate_up is None:
        saved.gate_up = _gate_up(layer, saved.middle_TD, step)


def backward(layer: Layer, dy: Outgoing, saved: Saved, step: Step, below: Layer | None) -> Outgoing | None:
    """Add the adapters' gradients to their masters and return that of the layer's input, where the layer `below` wants
    it (None where there is none). `dy` is this layer's own such place; it and `saved` are used up."""
    _compute_again(layer, saved, step)
    qkv, attended, gate_up, middle_TD = saved.qkv, saved.attended, saved.gate_up, saved.middle_TD
    assert qkv is not None and attended is not None and gate_up is not None and middle_TD is not None

    # -- the MLP -------------------------------------------------------------------------------------------------
    dh_TF = layer.down.backward(dy, True, step.draw)
    assert dh_TF is not None
    dgate_up = gate_up.place
    swiglu_backward(dgate_up.gradient_TO, dh_TF, dgate_up.gradient_TO, dh_TF if layer.down.rank else None)
    layer.down.add_gradients(dy, dh_TF, saved.down_side_TR, step.draw)  # dh_TF is the MLP's input by now
    del dh_TF
    normed_TD = _normed_again(layer.mlp_norm, middle_TD) if layer.gate_up.rank else None
    dnormed_TD = layer.gate_up.backward(dgate_up, True, step.draw)
    assert dnormed_TD is not None
    layer.gate_up.add_gradients(dgate_up, normed_TD, gate_up.side_TR, step.draw)
    dmiddle = layer.o.output_buffer(dnormed_TD)
    rms_norm_backward(
        dnormed_TD, middle_TD, layer.mlp_norm.weight_D, gate_up.rstd_T1, dy.gradient_TO, dmiddle.gradient_TO
    )
    saved.gate_up = None
    del dgate_up, dnormed_TD, normed_TD, gate_up, dy

    # -- attention -----------------------------------------------------------------------------------------------
    out_TQ = attended.out_TX[:, : layer.o.size_in]
    dout_TQ = layer.o.backward(dmiddle, True, step.draw)
    assert dout_TQ is not None
    layer.o.add_gradients(dmiddle, out_TQ, attended.side_TR, step.draw)
    by_head = (layer.heads, layer.head_size)
    dheads = layer.heads_alone(dout_TQ)
    step.attention.backward(
        dout_TQ.unflatten(1, by_head),
        *qkv.heads,
        out_TQ.unflatten(1, by_head),
        attended.kept,
        step.batch.segments,
        layer.attention,
        dheads,
    )
    dqkv = layer.qkv.output_buffer(dout_TQ)
    parts = layer.heads_of(dqkv.gradient_TO)
    turn(dheads, parts, step.cos_PC, step.sin_PC, step.batch.positions_T, inverse=True)
    if layer.query_norm is not None and layer.key_norm is not None and qkv.rstd_heads is not None:
        assert qkv.product_TN is not None
        norms = zip(layer.columns[:2], (layer.query_norm, layer.key_norm), qkv.rstd_heads, strict=True)
        for columns, norm, rstd_TG in norms:
            part_TN = dqkv.gradient_TO[:, columns]
            rms_norm_backward(part_TN, qkv.product_TN[:, columns], norm.weight_D, rstd_TG, None, part_TN)
    saved.attended = None
    normed_TD = _normed_again(layer.input_norm, saved.x_TD) if layer.qkv.rank else None
    dnormed_TD = layer.qkv.backward(dqkv, below is not None, step.draw)
    layer.qkv.add_gradients(dqkv, normed_TD, qkv.side_TR, step.draw)
    if dnormed_TD is None or below is None:
        return None
    dx = below.down.output_buffer(dnormed_TD)
    rms_norm_backward(
        dnormed_TD, saved.x_TD, layer.input_norm.weight_D, qkv.rstd_T1, dmiddle.gradient_TO, dx.gradient_TO
    )
    return dx


def _normed_again(norm: Norm, x_TD: Tensor) -> Tensor:
    out_TD = torch.empty_like(x_TD)
    rms_norm(x_TD, norm.weight_D, norm.epsilon, out_TD)
    return out_TD
