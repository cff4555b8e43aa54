"""The rows of the catalogue: GPUs and prices, each with its source and date."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Literal

STALE_AFTER_DAYS = 180  # a price seen longer ago is flagged


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Rates are dense (no sparsity), per second, as the maker states them; None where the type is not there.

    `memory_bytes` is what the driver reports as total; `usable_bytes` what a process can allocate of it before its own
    context. `link_bytes_per_s` is one direction between host and GPU, as copies from pinned memory reach it.
    """

    key: str
    name: str
    memory_bytes: int
    usable_bytes: int
    bandwidth_bytes_per_s: float
    flops_bf16: float | None
    flops_fp16: float | None
    flops_fp8: float | None
    flops_fp32: float
    link_bytes_per_s: float
    power_w: float
    compute_capability: str | None
    unified_memory: bool
    gpu_class: str
    source: str
    date: datetime.date
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Price:
    """What one GPU costs an hour in US dollars at a provider. `usd_per_hour` is per GPU, also where the smallest offer
    has `min_gpus` of them."""

    gpu: str
    provider: str
    kind: Literal["on-demand", "spot"]
    usd_per_hour: float
    source: str
    date: datetime.date
    min_gpus: int = 1

    def is_stale(self, today: datetime.date) -> bool:
        return (today - self.date).days > STALE_AFTER_DAYS
