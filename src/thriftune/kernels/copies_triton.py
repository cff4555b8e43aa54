"""The kernel of copies.py: one program a block of one matrix. The two example tensors only tell the types."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_all(table_ptr, factors_ptr, source_example, place_example, BLOCK: tl.constexpr):
    entry = table_ptr + tl.program_id(0) * 5
    elements, columns, stride = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    element = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    source = tl.load(entry).to(source_example.dtype)
    place = tl.load(entry + 1).to(place_example.dtype)
    value = tl.load(source + element, mask=inside, other=0.0) * tl.load(factors_ptr + tl.program_id(0))
    target = place + (element // columns) * stride + element % columns
    tl.store(target, value.to(place_example.dtype.element_ty), mask=inside)
