"""Bytes, seconds, counts: parsing and printing. Memory is in powers of 1024 (GiB), as the drivers report it."""

from __future__ import annotations

import re
from decimal import Decimal

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_BYTE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024 * GIB,
}


def parse_bytes(text: str) -> int:
    """'24GiB' -> 25769803776. Decimal (GB) and binary (GiB) units are told apart. Raises ValueError otherwise."""
    match = re.fullmatch(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([a-zA-Z]*)\s*", text)
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _BYTE_UNITS:
        raise ValueError(f"{text!r} is not a number of bytes such as 24GiB, 512MiB or 8GB")
    return int(Decimal(match.group(1)) * _BYTE_UNITS[unit])


def format_bytes(count_bytes: float) -> str:
    size, unit = float(count_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1023.5:  # what would print as 1024 of a unit is 1.00 of the next
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 99.995 else f"{size:.2f} {unit}"


def format_seconds(duration_s: float) -> str:
    """Seconds as a person says them: 0.42 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if duration_s < 9.995:
        return f"{duration_s:.2f} s"
    whole_s = round(duration_s)
    if whole_s < 60:
        return f"{whole_s} s"
    if whole_s < 3600:
        return f"{whole_s // 60} min {whole_s % 60:02d} s"
    return f"{whole_s // 3600} h {whole_s % 3600 // 60:02d} min"


def format_count(count: float) -> str:
    """41_943_040 -> '41.9 M'."""
    if abs(count) < 1000:
        return f"{count:g}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        text = f"{count / size:.3g}"
        if abs(float(text)) < 1000:  # 999,999 is 1 M, not 1e+03 k
            return f"{text} {unit}"
    return f"{count / 1e12:,.3g} T" if abs(count) < 999.5e12 else f"{count / 1e12:,.0f} T"


def format_share(part: float, whole: float) -> str:
    """A share in percent with two significant digits, never '0 %' for something that is there."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.2g} %" if 0 < percent < 10 else f"{percent:.1f} %"


def format_dollars(amount: float) -> str:
    """Two digits that mean something: $0.0031, $0.42, $13.20, $640."""
    if amount >= 100:
        return f"${amount:,.0f}"
    if 0 < amount < 0.0001:
        return "<$0.0001"
    return f"${amount:.2f}" if amount >= 0.095 or not amount else f"${amount:.2g}"
