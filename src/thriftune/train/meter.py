"""Time, memory and energy of a run, read where the driver tells and left out where it does not."""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Callable

import psutil
import torch

ENERGY_EVERY_S = 0.25  # a reading takes the driver up to 7 ms where processes share a GPU: a tenth of a small step


class Meter:
    """Memory is the allocator's on a GPU and the process's resident set on a CPU. Energy is the GPU's own counter, left
    out with `energy=False`."""

    def __init__(self, device: torch.device, energy: bool = True) -> None:
        self._device = device
        self._process = psutil.Process()
        self._energy_counter = _energy_counter(device) if energy else None
        self._energy_at_start = self._energy_counter() if self._energy_counter else 0.0
        self._energy_read, self._read_at = self._energy_at_start, time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.started = time.perf_counter()

    def memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.memory_allocated(self._device))
        return int(self._process.memory_info().rss)

    def peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def energy_j(self, now: bool = False) -> float | None:
        """Joules since the start, as of `now` or ENERGY_EVERY_S ago at most; None where the driver has no counter."""
        if self._energy_counter is None:
            return None
        if now or time.perf_counter() - self._read_at >= ENERGY_EVERY_S:
            self._energy_read, self._read_at = self._energy_counter(), time.perf_counter()
        return self._energy_read - self._energy_at_start

    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started


@functools.cache
def _energy_counter(device: torch.device) -> Callable[[], float] | None:
    """A function giving the GPU's total energy in joules, or None without NVML (extra `gpu`) or its counter."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        identifier = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(identifier if identifier.startswith("GPU-") else f"GPU-{identifier}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000.0
