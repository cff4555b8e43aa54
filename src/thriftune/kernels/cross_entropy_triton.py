"""The kernel of cross_entropy.py: one program a row, which it reads twice (largest and sum, then the gradient)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_place(logits_ptr, targets_ptr, loss_ptr, row_stride, scale, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits_ptr + row * row_stride
    target = tl.load(targets_ptr + row)
    wanted = tl.load(start + target).to(tl.float32)
    offsets = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, VOCABULARY, BLOCK):
        column = first + offsets
        x = tl.load(start + column, mask=column < VOCABULARY, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, x)
        # Where nothing but minus infinity has been seen the difference would be NaN.
        total = tl.where(higher == -float("inf"), 0.0, total * tl.exp(largest - higher) + tl.exp(x - higher))
        largest = higher
    top = tl.max(largest, 0)
    log_total = top + tl.log(tl.sum(tl.where(largest == -float("inf"), 0.0, total * tl.exp(largest - top)), 0))
    tl.store(loss_ptr + row, log_total - wanted)
    for first in range(0, VOCABULARY, BLOCK):
        column = first + offsets
        inside = column < VOCABULARY
        bits = tl.load(start + column, mask=inside, other=0.0)
        share = tl.exp(bits.to(tl.float32) - log_total)
        gradient = scale * tl.where(column == target, share - 1.0, share)
        tl.store(start + column, gradient.to(bits.dtype), mask=inside)
