"""What this machine has and lacks for fine-tuning: one line a finding, each with what it means."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from thriftune.hub import hub_endpoint, hub_is_offline
from thriftune.units import format_bytes


class Finding(BaseModel):
    verdict: Literal["ok", "note", "warn"]
    subject: str
    text: str


def examine() -> list[Finding]:
    """Every finding, in the order they are printed. Imports torch; takes some seconds; changes nothing."""
    return [*_python_and_packages(), *_processor(), *_gpus(), *_four_bit(), *_disk(), *_limits(), *_hub()]


def _python_and_packages() -> list[Finding]:
    from thriftune.machine import versions

    found = versions()
    missing = [name for name, number in found.items() if number.startswith("not installed") and name != "thriftune"]
    listed = ", ".join(f"{name} {number}" for name, number in found.items())
    if missing:
        return [Finding(verdict="warn", subject="packages", text=f"missing: {', '.join(missing)} ({listed})")]
    return [Finding(verdict="ok", subject="packages", text=listed)]


def _processor() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    text = (
        f"{platform.machine()}, {os.cpu_count()} cores, {format_bytes(memory.total)} memory, "
        f"{format_bytes(memory.available)} available"
    )
    return [Finding(verdict="ok", subject="processor", text=text)]


def _gpus() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = "has CUDA, but the driver shows no GPU" if torch.version.cuda else "is a build without CUDA"
        return [
            Finding(verdict="note", subject="GPU", text=f"none: torch {torch.__version__} {built}; runs use the CPU")
        ]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = (
            f"{properties.name}, compute {properties.major}.{properties.minor}, {format_bytes(free)} of "
            f"{format_bytes(total)} free"
        )
        in_use = total - free > total // 10
        findings.append(Finding(verdict="note" if in_use else "ok", subject=f"GPU {index}", text=text))
        if properties.major < 8:
            findings.append(
                Finding(
                    verdict="warn", subject=f"GPU {index}", text="no fast bfloat16 before compute 8.0: expect it slow"
                )
            )
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError:
        findings.append(Finding(verdict="note", subject="energy", text="not measured: pip install 'thriftune[gpu]'"))
    except pynvml.NVMLError as error:
        findings.append(Finding(verdict="note", subject="energy", text=f"not measured: the driver says {error}"))
    return findings


def _four_bit() -> list[Finding]:
    """Quantise and de-quantise one small matrix for real."""
    try:
        import torch
        from bitsandbytes import functional

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).to(device)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        error = float((functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm())
    except (ImportError, RuntimeError, OSError, AttributeError) as problem:
        return [Finding(verdict="warn", subject="NF4", text=f"bitsandbytes does not work here: {problem}")]
    verdict: Literal["ok", "warn"] = "ok" if error < 0.12 else "warn"
    return [
        Finding(verdict=verdict, subject="NF4", text=f"works on {device}; a random matrix comes back {error:.1%} off")
    ]


def _disk() -> list[Finding]:
    findings = []
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for subject, folder in (("disk here", Path.cwd()), ("model cache", cache)):
        place = folder
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        verdict: Literal["ok", "warn"] = "ok" if free > 20 * 1024**3 else "warn"
        findings.append(Finding(verdict=verdict, subject=subject, text=f"{format_bytes(free)} free at {folder}"))
    return findings


def _limits() -> list[Finding]:
    if sys.platform == "win32":
        return []
    import resource  # not on Windows

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return [Finding(verdict="ok", subject="pinned memory", text="no limit (ulimit -l)")]
    return [Finding(verdict="note", subject="pinned memory", text=f"limited to {format_bytes(soft)} by ulimit -l")]


def _hub() -> list[Finding]:
    from thriftune.errors import InputError
    from thriftune.hub import ensure_hub_reachable

    if hub_is_offline():
        return [Finding(verdict="note", subject="hub", text="HF_HUB_OFFLINE is set: only local files and the cache")]
    try:
        ensure_hub_reachable("the hub")
    except InputError:
        return [Finding(verdict="note", subject="hub", text=f"{hub_endpoint()} cannot be reached: local files only")]
    token = "HF_TOKEN is set" if os.environ.get("HF_TOKEN") else "no HF_TOKEN: gated models need one"
    return [Finding(verdict="ok", subject="hub", text=f"{hub_endpoint()} answers; {token}")]
