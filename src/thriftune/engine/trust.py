"""An attention kernel is asked once, on the layout that a run has, for what FlashAttention gives too.

Libraries change under us: with cudnn-frontend 1.32 the gradient of the queries was wrong wherever it lay in other
strides than the queries, without an error. A kernel that disagrees is not used, and the run says so.

Shape legend: as in attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thriftune.engine.attention import Attention, FlashAttention, Kind, ReferenceAttention
from thriftune.engine.layer import Layer
from thriftune.engine.packing import Segments
from thriftune.errors import first_line

LENGTHS = (150, 1, 37, 64)
WINDOW = 40  # in the place of a window, so that short rows show it
FURTHEST = 0.02  # relative; two kernels in 16 bits are 0.3 to 0.5 % apart


def why_not_trusted(attention: Attention, layers: Sequence[Layer], device: torch.device) -> str | None:
    """What `attention` gets wrong for one of the kinds of layers, in words; None when it gets all right."""
    asked = set()
    for layer in layers:
        windowed = layer.attention.window is not None
        key = (layer.heads, layer.groups, layer.head_size, layer.o.rank, windowed)
        if key in asked:
            continue
        asked.add(key)
        kind = Kind(layer.attention.scale, WINDOW if windowed else None)
        try:
            judge = FlashAttention() if device.type == "cuda" else ReferenceAttention()
            found, wanted = (_outputs(each, layer, kind, device) for each in (attention, judge))
        except RuntimeError as error:  # cuDNN's refusal of a layout
            return f"{attention.name} refuses this layout: {first_line(error, 120)}"
        for name, ours, theirs in zip(("the result", "dq", "dk", "dv"), found, wanted, strict=True):
            off = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
            if not off < FURTHEST:
                return f"{attention.name} is {off:.0%} off in {name} here"
    return None


def _outputs(attention: Attention, layer: Layer, kind: Kind, device: torch.device) -> list[Tensor]:
    """The result and the gradients of queries, keys and values, of random numbers laid out as a layer lays them out."""
    starts = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()
    segments = Segments(LENGTHS, starts)
    drawn = torch.Generator(device).manual_seed(0)
    example = torch.empty(segments.tokens, 0, dtype=torch.bfloat16, device=device)
    by_head = (layer.heads, layer.head_size)
    heads, gradients = layer.heads_alone(example), layer.heads_alone(example)
    out_THK = layer.o.input_buffer(example)[:, : layer.o.size_in].unflatten(1, by_head)
    dout_THK = torch.empty(segments.tokens, layer.o.size_in, dtype=example.dtype, device=device).unflatten(1, by_head)
    for place in (*heads, dout_THK):
        place.copy_(torch.randn(place.shape, generator=drawn, device=device))
    kept = attention.forward(*heads, segments, kind, out_THK)
    attention.backward(dout_THK, *heads, out_THK, kept, segments, kind, gradients)
    return [out_THK, *gradients]
