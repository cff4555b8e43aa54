"""How a GPU and a price are written down: field names, units and limits. Our own JSON and a user's YAML are the same.

Sizes are texts with their unit (24564MiB), bandwidths and links GB/s, rates dense TFLOP/s, power W, dates YYYY-MM-DD.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Literal

from thriftune.catalog.rows import Gpu, Price
from thriftune.units import MIB, parse_bytes

# The kinds of GPU that reach about the same share of their stated rates.
GPU_CLASSES = (
    "turing",
    "volta",
    "ampere-consumer",
    "ampere-data-center",
    "ada-consumer",
    "ada-data-center",
    "hopper",
    "blackwell-consumer",
    "blackwell",
    "cdna3",
    "apple",
)
PRICE_KINDS = ("on-demand", "spot")
GPU_FIELDS = (
    "name",
    "memory",
    "usable",
    "bandwidth_gb_per_s",
    "tflops_bf16",
    "tflops_fp16",
    "tflops_fp8",
    "tflops_fp32",
    "link_gb_per_s",
    "power_w",
    "compute_capability",
    "unified_memory",
    "gpu_class",
    "source",
    "date",
    "aliases",
)
PRICE_FIELDS = ("gpu", "provider", "kind", "usd_per_hour", "min_gpus", "source", "date")

# Beyond these a number is in the wrong unit (bytes instead of GB, FLOP/s instead of TFLOP/s).
MOST_GB_PER_S = 100_000.0
MOST_TFLOPS = 1_000_000.0
MOST_WATTS = 100_000.0
MOST_USD_PER_HOUR = 1000.0
MOST_USD_PER_KWH = 100.0
LEAST_MEMORY_BYTES = 64 * MIB
MOST_MEMORY_BYTES = 2**50
USABLE_SHARE = 0.98  # of the driver's total, where a row does not say
USABLE_SHARE_UNIFIED = 0.75  # of unified memory, as macOS allows the GPU by default

_ABSENT = object()


def shown(value: object) -> str:
    """A value as it stands in a message, cut to a line's length."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' with the nearest known name, '' when none is near."""
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


@dataclass
class RowReader:
    """The fields of one row. What is wrong with them is added to `problems`, one text each, starting with `where`.

    Every method returns a usable value also after a problem, so that a row's problems are all found in one pass; the
    row itself counts only when `is_sound`. A date after `today` is a problem.
    """

    where: str
    fields: Mapping[str, Any]
    problems: list[str]
    today: date = date.max
    is_sound: bool = field(default=True, init=False)

    def fail(self, text: str) -> None:
        self.is_sound = False
        self.problems.append(f"{self.where}: {text}")

    def refuse_unknown(self, allowed: Collection[str]) -> None:
        for name in self.fields:
            if name not in allowed:
                self.fail(f"unknown field {shown(name)}{did_you_mean(str(name), allowed)}")

    def text(self, name: str) -> str:
        value = self._value(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if value is not _ABSENT:
            self.fail(f"{name}: expects a text, got {shown(value)}")
        return ""

    def choice(self, name: str, allowed: Collection[str]) -> str:
        value = self._value(name)
        if isinstance(value, str) and value in allowed:
            return value
        if value is not _ABSENT:
            hint = did_you_mean(value, allowed) if isinstance(value, str) else ""
            self.fail(f"{name}: expects one of {', '.join(allowed)}, got {shown(value)}{hint}")
        return next(iter(allowed))

    def number(self, name: str, unit: str, at_most: float, zero: bool = False) -> float:
        value = self._value(name)
        return 1.0 if value is _ABSENT else self._checked(name, value, unit, at_most, zero)

    def number_or_none(self, name: str, unit: str, at_most: float, required: bool = True) -> float | None:
        """None for null, which says that the type is not there, and for an absent field that is not `required`."""
        value = self._value(name) if required else self.fields.get(name)
        return None if value is None or value is _ABSENT else self._checked(name, value, unit, at_most, zero=False)

    def count(self, name: str, default: int, at_most: int) -> int:
        value = self.fields.get(name, default)
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= at_most:
            return value
        self.fail(f"{name}: expects a whole number from 1 to {at_most:,}, got {shown(value)}")
        return default

    def switch(self, name: str) -> bool:
        value = self.fields.get(name, False)
        if not isinstance(value, bool):
            self.fail(f"{name}: expects true or false, got {shown(value)}")
        return value is True

    def size(self, name: str, default: int | None = None) -> int:
        """Bytes of a text such as 24GiB. A bare number is refused: nobody can tell which unit it is in."""
        if default is not None and name not in self.fields:
            return default
        value = self._value(name)
        if value is _ABSENT:
            return LEAST_MEMORY_BYTES
        count = _parsed_size(value)
        if count is not None and LEAST_MEMORY_BYTES <= count <= MOST_MEMORY_BYTES:
            return count
        self.fail(f"{name}: expects a size with its unit such as 24GiB or 24564MiB, got {shown(value)}")
        return LEAST_MEMORY_BYTES

    def day(self, name: str = "date") -> date:
        value = self._value(name)
        if value is _ABSENT:
            return date.min
        found = _parsed_day(value)
        if found is None:
            self.fail(f"{name}: expects a day such as 2026-11-23, got {shown(value)}")
        elif found > self.today:
            self.fail(f"{name}: {found} is in the future; write the day on which the fact was seen")
        return found or date.min

    def capability(self, name: str) -> str | None:
        """'8.9' of 8.9 or "8.9"; None where the row has none."""
        value = self.fields.get(name)
        text = str(value) if isinstance(value, (str, float)) else ""
        if value is None or re.fullmatch(r"[0-9]{1,2}\.[0-9]", text):
            return text or None
        self.fail(f'{name}: expects a compute capability such as "8.9", got {shown(value)}')
        return None

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.fields.get(name, [])
        if isinstance(value, list) and all(isinstance(item, str) and item.strip() for item in value):
            return tuple(value)
        self.fail(f"{name}: expects a list of texts, got {shown(value)}")
        return ()

    def _value(self, name: str) -> Any:
        if name not in self.fields:
            self.fail(f"{name} is missing")
        return self.fields.get(name, _ABSENT)

    def _checked(self, name: str, value: object, unit: str, at_most: float, zero: bool) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            inside = (value >= 0 if zero else value > 0) and value <= at_most  # NaN is neither
            if inside and math.isfinite(value):
                return float(value)
        least = "from 0" if zero else "above 0"
        self.fail(f"{name}: expects a number of {unit} {least} up to {at_most:,.0f}, got {shown(value)}")
        return 1.0


def gpu_of(key: str, row: RowReader) -> Gpu | None:
    """The GPU of one row's fields, None when the row has a problem."""
    row.refuse_unknown(GPU_FIELDS)
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key):
        row.fail("a GPU's key is small letters and digits with hyphens between, such as rtx-4090")
    memory_bytes = row.size("memory")
    unified = row.switch("unified_memory")
    share = USABLE_SHARE_UNIFIED if unified else USABLE_SHARE
    gpu = Gpu(
        key=key,
        name=row.text("name"),
        memory_bytes=memory_bytes,
        usable_bytes=row.size("usable", default=int(memory_bytes * share)),
        bandwidth_bytes_per_s=row.number("bandwidth_gb_per_s", "GB/s", MOST_GB_PER_S) * 1e9,
        flops_bf16=_tera(row.number_or_none("tflops_bf16", "TFLOP/s", MOST_TFLOPS)),
        flops_fp16=_tera(row.number_or_none("tflops_fp16", "TFLOP/s", MOST_TFLOPS)),
        flops_fp8=_tera(row.number_or_none("tflops_fp8", "TFLOP/s", MOST_TFLOPS, required=False)),
        flops_fp32=row.number("tflops_fp32", "TFLOP/s", MOST_TFLOPS) * 1e12,
        link_bytes_per_s=row.number("link_gb_per_s", "GB/s", MOST_GB_PER_S) * 1e9,
        power_w=row.number("power_w", "W", MOST_WATTS),
        compute_capability=row.capability("compute_capability"),
        unified_memory=unified,
        gpu_class=row.choice("gpu_class", GPU_CLASSES),
        source=row.text("source"),
        date=row.day(),
        aliases=row.texts("aliases"),
    )
    if row.is_sound and gpu.usable_bytes > gpu.memory_bytes:
        row.fail("usable: is more than memory")
    return gpu if row.is_sound else None


def price_of(row: RowReader, gpu_keys: Collection[str]) -> Price | None:
    """The price of one row's fields, None when the row has a problem. `gpu_keys` are the GPUs there are."""
    row.refuse_unknown(PRICE_FIELDS)
    gpu = row.text("gpu")
    if gpu and gpu not in gpu_keys:
        row.fail(f"gpu: there is no GPU with the key {shown(gpu)}{did_you_mean(gpu, gpu_keys)}")
    kind: Literal["on-demand", "spot"] = "spot" if row.choice("kind", PRICE_KINDS) == "spot" else "on-demand"
    price = Price(
        gpu=gpu,
        provider=row.text("provider"),
        kind=kind,
        usd_per_hour=row.number("usd_per_hour", "US dollars per GPU and hour", MOST_USD_PER_HOUR),
        source=row.text("source"),
        date=row.day(),
        min_gpus=row.count("min_gpus", default=1, at_most=1024),
    )
    return price if row.is_sound else None


def _tera(number: float | None) -> float | None:
    return None if number is None else number * 1e12


def _parsed_size(value: object) -> int | None:
    if not isinstance(value, str) or not value.strip()[-1:].isalpha():
        return None
    try:
        return parse_bytes(value)
    except ValueError:
        return None


def _parsed_day(value: object) -> date | None:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        return None
    try:
        return date.fromisoformat(value)
    except ValueError:
        return None
