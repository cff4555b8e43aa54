"""Which GPU each of several processes gets."""

from __future__ import annotations

import os


def seat(place: int, gpus: int) -> str:
    """CUDA_VISIBLE_DEVICES of the process at `place`, of `gpus` GPUs in turn: of those that this process may see."""
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    number = place % gpus
    return seen[number] if number < len(seen) else str(number)
