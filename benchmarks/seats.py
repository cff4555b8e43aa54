"""Which GPU each of several processes gets, and how they start and end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "4"}


def seat(place: int, gpus: int) -> str:
    """CUDA_VISIBLE_DEVICES of the process at `place`, of `gpus` GPUs in turn: of those that this process may see."""
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    number = place % gpus
    return seen[number] if number < len(seen) else str(number)


def start_shell(line: str, log: Path, place: int, gpus: int) -> subprocess.Popen[bytes]:
    """A shell with this line on its GPU (none: the CPU), one thread for products and four for the tokenizer; what it
    prints goes to `log`."""
    environment = {**os.environ, **THREADS, "HF_HUB_OFFLINE": "1"}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = seat(place, gpus)
    with log.open("wb") as file:
        return subprocess.Popen(["bash", "-c", line], stdout=file, stderr=file, env=environment, start_new_session=True)


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End shells and what they run, and wait for them."""
    running = list(processes)
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    for process in running:
        process.wait()
