"""The machine and the libraries a run meets: its device, what is written of it into records, and quiet libraries."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

VERSIONED = ("thriftune", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors")


def quiet_libraries() -> None:
    """No telemetry, no progress bars of libraries; the user's own settings win. The tokenizer may use several threads:
    said so, it neither stops using them nor warns when a library starts a process, and no process of ours that is
    forked has used it before."""
    for name, value in (
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("DO_NOT_TRACK", "1"),
        ("TOKENIZERS_PARALLELISM", "true"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
    ):
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|bitsandbytes")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def choose_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def hardware(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What the run ran on, for its record. `processes` train together, on a GPU each where there are GPUs."""
    found: dict[str, Any] = {
        "device": str(device),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch_threads": torch.get_num_threads(),
        "processes": processes,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
