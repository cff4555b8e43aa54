"""The GPUs: the catalogue's rows, finding one by any usual name, and those the driver of this machine shows."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from typing import Any

from thriftune.catalog.fields import RowReader, gpu_of, shown
from thriftune.catalog.rows import Gpu
from thriftune.catalog.user import config_folder, read_user_rows
from thriftune.errors import InputError
from thriftune.units import MIB, format_bytes

LIST_COMMAND = "thriftune gpus"
DRIVER_ANSWERS_WITHIN_S = 3.0
_DRIVER_FIELDS = ("index", "uuid", "name", "memory.total", "memory.free", "power.limit", "compute_cap")

# Words of a name that tell no two GPUs apart.
_NOISE = frozenset(("nvidia", "geforce", "tesla", "amd", "instinct", "apple", "generation", "gpu"))


@dataclass(frozen=True, slots=True)
class LocalGpu:
    """A GPU of this machine as its driver describes it; None for what the driver does not say.

    `gpu` is the catalogue's row with this card's memory, free memory (as `usable_bytes`) and power limit; None for a
    card that is not in the catalogue, and then `note` says so and what to do.
    """

    index: int  # the driver's number, in the order of the PCI bus
    uuid: str
    name: str
    total_bytes: int | None
    free_bytes: int | None
    power_limit_w: float | None
    compute_capability: str | None
    gpu: Gpu | None = None
    note: str | None = None


@lru_cache(maxsize=1)
def built_in_gpus() -> Mapping[str, Gpu]:
    """The rows of gpus.json by key, in the file's order. Not to be changed by callers."""
    text = resources.files("thriftune.catalog").joinpath("gpus.json").read_text(encoding="utf-8")
    problems: list[str] = []
    rows = {
        key: gpu_of(key, RowReader(f"gpus.json, {key}", fields, problems))
        for key, fields in json.loads(text)["gpus"].items()
    }
    if problems:
        raise AssertionError("; ".join(problems))  # a fault of the package, which its tests find
    return {key: gpu for key, gpu in rows.items() if gpu is not None}


def gpus() -> dict[str, Gpu]:
    """Every GPU by its key: the built-in rows, replaced and followed by the user's. Raises InputError on a user's row
    that is wrong."""
    built_in = built_in_gpus()
    return {**built_in, **read_user_rows(built_in).gpus}


def find_gpu(text: str, user_rows: Mapping[str, Gpu] | None = None) -> Gpu:
    """The GPU that `text` names: a key, a name, an alias or what the driver calls it, in any case and punctuation.

    `user_rows` are searched before the built-in ones; None reads the user's files. Raises InputError for a name that
    fits several GPUs (with their keys) and for an unknown one (with the nearest keys).
    """
    built_in = built_in_gpus()
    own = read_user_rows(built_in).gpus if user_rows is None else user_rows
    rows = {**built_in, **own}
    wanted = _plain(text)
    found = _named(wanted, own.values()) or _named(wanted, (gpu for gpu in rows.values() if gpu.key not in own))
    if len(found) == 1:
        return found[0]
    candidates = found or _containing(text, rows.values())
    if len(candidates) > 1:
        raise InputError(
            given=f"the GPU {shown(text)} can be any of {len(candidates)}: {_listed(candidates)}",
            allowed="one of these keys",
            do=f"write the one you mean; `{LIST_COMMAND}` shows how they differ",
        )
    raise _unknown(text, candidates or _nearest(wanted, rows.values()))


def _match_driver_name(name: str, total_bytes: int | None, rows: Mapping[str, Gpu]) -> Gpu | None:
    """The row of a GPU that the driver calls `name`, whose total memory agrees; None when there is none.

    Drivers print the same name for a card of 8 and of 16 GB, and the whole card's name for a slice of it. Error
    correction takes up to 6.3 % of a card's memory and can be switched.
    """
    wanted = _plain(name)
    candidates = _named(wanted, rows.values()) or [gpu for gpu in rows.values() if _adds_only_memory(gpu, wanted)]
    if total_bytes is not None:
        candidates = [gpu for gpu in candidates if abs(gpu.memory_bytes - total_bytes) <= 0.08 * gpu.memory_bytes]
    return candidates[-1] if candidates else None  # the user's rows come last


def _words(name: str) -> list[str]:
    joined = re.sub(r"(?<=[0-9])[ -]*gi?b\b", "gb", name.lower())  # 80 GB and 80GiB are 80gb
    return [word for word in re.findall(r"[a-z0-9]+", joined) if word not in _NOISE]


def _plain(name: str) -> str:
    """A name as it is compared: 'NVIDIA GeForce RTX 4090' and 'rtx-4090' are both 'rtx4090'."""
    return "".join(_words(name))


def _names(gpu: Gpu) -> tuple[str, ...]:
    return (gpu.key, gpu.name, *gpu.aliases)


def _named(wanted: str, rows: Iterable[Gpu]) -> list[Gpu]:
    return [gpu for gpu in rows if wanted and any(_plain(name) == wanted for name in _names(gpu))]


def _containing(text: str, rows: Iterable[Gpu]) -> list[Gpu]:
    """The rows one of whose names has all the words of `text`: a100 is in 'A100 80GB', a10 is not."""
    wanted = set(_words(text))
    return [gpu for gpu in rows if wanted and any(wanted <= set(_words(name)) for name in _names(gpu))]


def _adds_only_memory(gpu: Gpu, wanted: str) -> bool:
    return any(re.fullmatch(rf"{re.escape(wanted)}[0-9]+gb", _plain(name)) for name in _names(gpu))


def _nearest(wanted: str, rows: Iterable[Gpu]) -> list[Gpu]:
    by_name = {name: gpu for gpu in rows for name in map(_plain, _names(gpu))}
    near = difflib.get_close_matches(wanted, list(by_name), n=6, cutoff=0.6)
    return list({by_name[name].key: by_name[name] for name in near}.values())[:3]


def _listed(candidates: Iterable[Gpu]) -> str:
    keys = [gpu.key for gpu in candidates]
    return ", ".join(keys[:12]) + (f" and {len(keys) - 12} more" if len(keys) > 12 else "")


def _unknown(text: str, near: list[Gpu]) -> InputError:
    nearest = f"; near to it: {_listed(near)}" if near else ""
    file = config_folder() / "gpus.yaml"
    return InputError(
        given=f"no GPU in the catalogue is called {shown(text)}{nearest}",
        allowed=f"a key, name or alias that `{LIST_COMMAND}` lists",
        do=f"correct the name, or add the card under `gpus:` in {file} "
        "(one `my-card:` with the fields that thriftune/catalog/gpus.json has)",
    )


def local_gpus(rows: Mapping[str, Gpu] | None = None) -> list[LocalGpu]:
    """The NVIDIA GPUs that a process started now would see, in its order, without torch; [] without a driver.

    Asks NVML (pynvml, when it is installed), else nvidia-smi, which has 3 s. CUDA_VISIBLE_DEVICES is followed by number
    (in the order of the PCI bus) and by UUID; slices of a card (MIG-...) are not described. `rows` are the GPUs to
    match with, by default all of the catalogue.
    """
    found = _visible(_ask_nvml() or _ask_nvidia_smi(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    rows = gpus() if rows is None and found else rows or {}
    return [_with_row(local, rows) for local in found]


def _with_row(local: LocalGpu, rows: Mapping[str, Gpu]) -> LocalGpu:
    row = _match_driver_name(local.name, local.total_bytes, rows)
    if row is None:
        size = f" with {format_bytes(local.total_bytes)}" if local.total_bytes else ""
        note = (
            f"GPU {local.index}, {local.name}{size}, is not in the catalogue: name one that is like it, "
            f"or add it under `gpus:` in {config_folder() / 'gpus.yaml'}"
        )
        return replace(local, note=note)
    total_bytes = local.total_bytes or row.memory_bytes
    free_bytes = row.usable_bytes if local.free_bytes is None else local.free_bytes
    real = replace(
        row,
        memory_bytes=total_bytes,
        usable_bytes=min(free_bytes, total_bytes),
        power_w=local.power_limit_w or row.power_w,
    )
    return replace(local, gpu=real)


def _ask_nvml() -> list[LocalGpu]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        try:
            return [_described_by_nvml(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return []


def _described_by_nvml(pynvml: Any, index: int) -> LocalGpu:
    def ask(function: str) -> Any:
        """None for what this card does not answer; a card that is lost raises on its name already."""
        try:
            return getattr(pynvml, function)(handle)
        except pynvml.NVMLError:
            return None

    def words(answer: Any) -> str:
        return answer.decode("utf-8", "replace") if isinstance(answer, bytes) else str(answer or "")

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = ask("nvmlDeviceGetMemoryInfo")
    power_mw = ask("nvmlDeviceGetPowerManagementLimit")
    capability = ask("nvmlDeviceGetCudaComputeCapability")
    return LocalGpu(
        index=index,
        uuid=words(ask("nvmlDeviceGetUUID")),
        name=words(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total) if memory else None,
        free_bytes=int(memory.free) if memory else None,
        power_limit_w=power_mw / 1000 if power_mw else None,
        compute_capability=f"{capability[0]}.{capability[1]}" if capability else None,
    )


def _ask_nvidia_smi() -> list[LocalGpu]:
    lines = _nvidia_smi(_DRIVER_FIELDS)
    if not lines:  # drivers before 510 refuse the whole question for `compute_cap`
        lines = [f"{line}, " for line in _nvidia_smi(_DRIVER_FIELDS[:-1])]
    found = (_described_by_line(line) for line in lines)
    return [local for local in found if local is not None]


def _nvidia_smi(fields: Sequence[str]) -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=DRIVER_ANSWERS_WITHIN_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.decode("utf-8", "replace").splitlines() if answer.returncode == 0 else []


def _described_by_line(line: str) -> LocalGpu | None:
    """None for a line that is not a GPU, such as a warning of the driver."""
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(_DRIVER_FIELDS) or not parts[0].isdecimal():
        return None
    index, uuid, name, total, free, power, capability = parts
    total_mib, free_mib = _number(total), _number(free)
    return LocalGpu(
        index=int(index),
        uuid=uuid,
        name=name,
        total_bytes=int(total_mib * MIB) if total_mib else None,
        free_bytes=int(free_mib * MIB) if free_mib is not None else None,
        power_limit_w=_number(power) or None,
        compute_capability=capability if _number(capability) else None,
    )


def _number(text: str) -> float | None:
    """None for [N/A], [Not Supported] and the like."""
    return float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else None


def _visible(found: list[LocalGpu], chosen: str | None) -> list[LocalGpu]:
    """Those that CUDA_VISIBLE_DEVICES lets through: CUDA stops reading at the first entry that names no GPU."""
    if chosen is None:
        return found
    visible: list[LocalGpu] = []
    for entry in chosen.split(","):
        name = entry.strip()
        if name.isdecimal():
            named = [local for local in found if local.index == int(name)]
        else:
            named = [local for local in found if name.startswith("GPU-") and local.uuid.startswith(name)]
        if len(named) != 1:
            break
        if named[0] in visible:
            return []  # CUDA shows no GPU when one is named twice
        visible += named
    return visible
