"""Where a fused kernel runs: on CUDA by Triton, elsewhere by its reference. Nothing here imports Triton before it is
needed, because a machine without a GPU need not have it."""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor


@functools.cache
def _interpreted() -> bool:
    """Triton's interpreter runs kernels on CPU tensors, slowly: for tests, when TRITON_INTERPRET=1 is set."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton(tensor: Tensor) -> bool:
    """Whether an operation on this tensor goes to Triton: bfloat16, float16 or float32 on CUDA."""
    if tensor.element_size() == 8:
        return False
    return has_triton() and (tensor.is_cuda or _interpreted())


def next_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
