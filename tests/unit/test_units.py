"""Bytes, seconds, counts and shares: read as drivers write them, printed as people say them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thriftune.units import GIB, KIB, MIB, format_bytes, format_count, format_seconds, format_share, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 25_769_803_776),
        ("24 gib", 24 * GIB),
        ("24GB", 24_000_000_000),
        (" 512 MiB ", 512 * MIB),
        ("1.5KiB", 1536),
        ("0", 0),
        ("17", 17),
        ("17b", 17),
        ("2TB", 2 * 10**12),
        ("1TiB", 1024 * GIB),
        ("9007199254740993", 9_007_199_254_740_993),
    ],
)
def test_parse_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "24 G", "-1GiB", "1e3", "24GiB8", "1,5GiB", ".5GiB", "5.GiB", "nan", "٣GiB", "9" * 400, "9" * 9999],
)
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1023.7, "1.00 KiB"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (100 * KIB, "100 KiB"),
        (99.999 * KIB, "100 KiB"),
        (MIB - 1, "1.00 MiB"),
        (25_769_803_776, "24.00 GiB"),
        (5 * 1024 * GIB, "5.00 TiB"),
        (10_000 * 1024 * GIB, "10000 TiB"),
        (-1536, "-1.50 KiB"),
    ],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 10**16))
def test_printed_bytes_read_back_within_a_percent(count: int) -> None:
    printed = format_bytes(count)
    assert math.isclose(parse_bytes(printed), count, rel_tol=0.01, abs_tol=0.5)
    assert not printed.startswith("1024")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (0.416, "0.42 s"),
        (9.994, "9.99 s"),
        (9.996, "10 s"),
        (12.4, "12 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (12.5, "12.5"),
        (1000, "1 k"),
        (41_943_040, "41.9 M"),
        (999_499, "999 k"),
        (999_999, "1 M"),
        (8_030_261_248, "8.03 G"),
        (15e12, "15 T"),
        (2e15, "2,000 T"),
        (-1500, "-1.5 k"),
    ],
)
def test_format_count(count: float, text: str) -> None:
    assert format_count(count) == text


@given(st.integers(0, 10**17))
def test_counts_are_never_written_with_an_exponent(count: int) -> None:
    assert "e" not in format_count(count)


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 5, "0.0 %"),
        (1, 0, "0.0 %"),
        (1, 2, "50.0 %"),
        (1, 300, "0.33 %"),
        (1, 1_000_000, "0.0001 %"),
        (5, 5, "100.0 %"),
    ],
)
def test_format_share(part: float, whole: float, text: str) -> None:
    assert format_share(part, whole) == text
