"""The GPUs and prices of a plan: by name, or those of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from thriftune.catalog.gpus import LocalGpu, built_in_gpus, find_gpu, local_gpus
from thriftune.catalog.prices import electricity_price, prices
from thriftune.catalog.rows import Gpu
from thriftune.catalog.user import read_user_rows
from thriftune.errors import InputError
from thriftune.plan.cost import Market, place_of
from thriftune.plan.search import Device
from thriftune.recipe import Recipe

DEFAULT_GPUS = ("rtx-4090", "a100-80gb", "h200")  # where this machine has none: a desk, a rented card, a large one
MOST_GPUS = 1024


def read_market() -> Market:
    """The catalogue with the user's own rows. Raises InputError on a row of theirs that is wrong."""
    own = read_user_rows(built_in_gpus())
    return Market(
        gpus=list({**built_in_gpus(), **own.gpus}.values()),
        prices=prices(own),
        electricity=electricity_price(own),
        today=date.today(),
    )


def find_devices(names: Sequence[str], gpus: int | None, market: Market) -> tuple[list[Device], tuple[str, ...]]:
    """The GPUs to plan for, and notes. `gpus` is how many of each, where a name (`2xa100-80gb`) does not say."""
    devices, notes = [], []
    rows = {gpu.key: gpu for gpu in market.gpus}
    for name in names or ["local"]:
        count, word = split_count(name, gpus)
        if word.lower() == "local":
            found, said = _local_devices(rows, count)
            devices += found
            notes += said
        elif word.lower() == "cpu":
            devices.append(cpu_device(count))
        else:
            gpu = find_gpu(word, rows)
            devices.append(Device(gpu, count, gpu.usable_bytes))
    if not devices:
        devices = [Device(rows[key], gpus or 1, rows[key].usable_bytes) for key in DEFAULT_GPUS]
        notes.append(f"planned for {', '.join(DEFAULT_GPUS)}; name others with --gpu")
    return devices, tuple(notes)


def split_count(name: str, gpus: int | None) -> tuple[int, str]:
    """'2xa100-80gb' -> (2, 'a100-80gb'). Raises InputError for fewer than one GPU or a count given twice."""
    match = re.fullmatch(r"\s*(-?[0-9]{1,6})\s*[xX*]\s*(.+)", name)
    count = int(match.group(1)) if match else gpus
    if match and gpus is not None and count != gpus:
        raise InputError(
            given=f"--gpu {name} and --gpus {gpus}", allowed="one of them", do="say how many GPUs there are once"
        )
    if count is not None and not 1 <= count <= MOST_GPUS:
        raise InputError(
            given=f"{count} GPUs", allowed=f"a whole number from 1 to {MOST_GPUS:,}", do="correct --gpus or --gpu"
        )
    return count or 1, match.group(2) if match else name


def _local_devices(rows: dict[str, Gpu], count: int) -> tuple[list[Device], list[str]]:
    """One device for each kind of GPU of this machine, with the memory that is free on the fullest of `count`."""
    found = local_gpus(rows)
    notes = [local.note for local in found if local.note]
    if not found:
        return [], ["this machine shows no NVIDIA GPU"]
    kinds: dict[str, list[Gpu]] = {}
    for local in found:
        if local.gpu is not None:
            kinds.setdefault(local.gpu.key, []).append(local.gpu)
    devices = []
    for cards in kinds.values():
        if len(cards) < count:
            notes.append(f"this machine has {len(cards)} x {cards[0].key}, not {count}: planned for {len(cards)}")
        freest = sorted(cards, key=lambda gpu: -gpu.usable_bytes)[:count]
        devices.append(Device(freest[-1], len(freest), freest[-1].usable_bytes))
    return devices, notes


def machine_memory() -> tuple[int, int]:
    """(available, all) bytes of this computer's memory."""
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


def cpu_device(count: int = 1) -> Device:
    return Device(None, count, machine_memory()[0])


def capped(device: Device, recipe: Recipe) -> Device:
    """With no more memory than the recipe lets a run take. Raises InputError on a CPU, whose memory nothing holds."""
    cap = recipe.max_memory_bytes
    if cap is None:
        return device
    if device.gpu is None:
        raise InputError(
            given=f"max_memory={recipe.max_memory} on cpu",
            allowed="max_memory on a GPU",
            do="leave it out; the system's own limits (ulimit, a container's) hold a process on a CPU",
        )
    return replace(device, usable_bytes=min(device.usable_bytes, cap))


def own_gpu(indices: Iterable[int], count: int) -> Device | None:
    """Of the GPUs at these places among those that this process sees, the one with the least free memory; None when the
    driver does not describe them all. Processes that ask for the same GPUs at the same time get the same answer."""
    seen = local_gpus()
    devices = [_described(seen[index], count) if index < len(seen) else None for index in indices]
    found = [device for device in devices if device is not None]
    return min(found, key=lambda device: device.usable_bytes) if found and len(found) == len(devices) else None


def _described(local: LocalGpu, count: int) -> Device | None:
    if local.gpu is not None:
        return Device(local.gpu, count, local.gpu.usable_bytes)
    if local.total_bytes is None or local.free_bytes is None:
        return None
    return unknown_gpu(local.name, local.total_bytes, local.free_bytes, count)


def unknown_gpu(name: str, total_bytes: int, free_bytes: int, count: int) -> Device:
    """A GPU that the catalogue lacks: its own memory, and the rates of the row next to it in memory."""
    near = min(built_in_gpus().values(), key=lambda gpu: (gpu.unified_memory, abs(gpu.memory_bytes - total_bytes)))
    like = replace(near, key="this-gpu", name=name, memory_bytes=total_bytes, usable_bytes=free_bytes)
    return Device(like, count, free_bytes)


def list_gpus() -> list[dict[str, Any]]:
    """Every GPU that a plan can be made for, in the catalogue's order, with a price of one an hour: on demand where it
    is rented so, of the offer whose smallest unit (`min_gpus` of them) costs least."""
    market = read_market()
    found = []
    for gpu in market.gpus:
        offer = market.least_offer(gpu)
        row = {
            "gpu": gpu.key,
            "name": gpu.name,
            "memory_bytes": gpu.memory_bytes,
            "usable_bytes": gpu.usable_bytes,
            "bandwidth_bytes_per_s": gpu.bandwidth_bytes_per_s,
            "power_w": gpu.power_w,
            "usd_per_hour": offer.usd_per_hour if offer else None,
            "min_gpus": offer.min_gpus if offer else None,
            "provider": place_of(offer) if offer else None,
            "price_date": offer.date.isoformat() if offer else None,
            "price_is_old": offer is not None and offer.is_stale(market.today),
        }
        found.append(row)
    return found
