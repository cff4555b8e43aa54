"""Bytes a token of a layer, counted from its own sizes: what it keeps, and what its backward pass works with."""

from __future__ import annotations

from thriftune.engine.layer import Keep, Layer

STATISTICS_BYTES = 4  # a float32 for each norm, and for each head's softmax


def kept_bytes(layer: Layer, keep: Keep, element: int) -> int:
    """Bytes a token that a layer keeps from its forward to its backward pass."""
    width, attended = layer.qkv.size_in, layer.o.size_in + layer.o.rank
    # The layer's input, and what the adapter of `down` made of its own.
    found = width * element + layer.down.rank * element
    if keep <= Keep.RESIDUALS:
        found += width * element
    if keep <= Keep.NO_MLP:
        twice = 2 if layer.query_norm is not None else 1
        found += (twice * layer.qkv.size_out + attended + layer.qkv.rank + layer.o.rank) * element
        found += (1 + layer.heads) * STATISTICS_BYTES
        found += (layer.heads + layer.groups) * STATISTICS_BYTES if layer.query_norm is not None else 0
    if keep == Keep.ALL:
        found += (layer.gate_up.size_out + layer.gate_up.rank) * element + STATISTICS_BYTES
    return found


def working_bytes(layer: Layer, keep: Keep, element: int) -> int:
    """Bytes a token that live at once, besides what is kept, while a layer runs backward: the largest moment of it."""
    missing = kept_bytes(layer, Keep.ALL, element) - kept_bytes(layer, keep, element)
    width, mlp = layer.qkv.size_in, layer.down.size_in
    queries = layer.heads * layer.head_size
    # dy with its side columns; the gate's and up's gradient; the MLP's input and its gradient, before and after it
    in_mlp = (width + layer.down.rank) + (layer.gate_up.size_out + layer.gate_up.rank) + 2 * mlp
    in_norm = (width + layer.down.rank) + (layer.gate_up.size_out + layer.gate_up.rank) + 3 * width + layer.o.rank
    # the gradient of attention's result and of queries, keys and values, and cuDNN's float32 sums of three of them
    in_attention = width + layer.o.rank + queries + layer.qkv.size_out + layer.qkv.rank + 6 * queries
    return missing + (max(in_mlp, in_norm, in_attention) + width) * element
