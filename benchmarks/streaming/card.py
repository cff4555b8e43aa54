"""A GPU's memory as its driver sees it, and the cap on what one process takes of it."""

from __future__ import annotations

import subprocess
import threading
from dataclasses import dataclass, field

import torch

GIB = 1024**3
LIBRARIES_BYTES = 256 * 1024**2  # that libraries may still load after the context was measured


@dataclass
class Card:
    """The GPU's memory as the driver sees it; `before` is what others held before this process touched it."""

    device: torch.device
    before: int
    context: int = 0
    peak: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def untouched(cls, device: torch.device) -> Card:
        return cls(device, _used_by_driver() if device.type == "cuda" else 0)

    def used(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free) - self.before

    def measure_context(self) -> None:
        """What the driver and the libraries loaded so far hold outside PyTorch's allocator."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.context = max(self.context, self.used() - torch.cuda.memory_reserved(self.device))

    def hold_to(self, cap_gib: float | None, beside: int) -> None:
        if self.device.type != "cuda":
            return
        total = torch.cuda.mem_get_info(self.device)[1]
        allowed = total if cap_gib is None else int(cap_gib * GIB) - self.context - LIBRARIES_BYTES - beside
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), self.device)

    def watch(self) -> threading.Thread:
        """Sample the driver's number, for peaks that the allocator does not see."""
        self._stop.clear()
        self.peak = 0

        def sample() -> None:
            while not self._stop.wait(0.03):
                self.peak = max(self.peak, self.used())

        thread = threading.Thread(target=sample, daemon=True)
        if self.device.type == "cuda":
            thread.start()
        return thread

    def watched(self, thread: threading.Thread) -> int:
        self._stop.set()
        if thread.is_alive():
            thread.join()
        return self.peak


def _used_by_driver() -> int:
    """Asked of the driver's tool, because asking CUDA would make a context."""
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0]) * 1024**2
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return 0
