"""Rows out of files: JSON lines, JSON, CSV, TSV and Parquet, each also compressed. Broken input names file and row."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from thriftune.errors import DataError, first_line

Row = dict[str, Any]
RowsAndNumbers = tuple[list[Row], Sequence[int]]

SUFFIXES_IN_WORDS = ".jsonl, .json, .csv, .tsv or .parquet, also with .gz, .bz2 or .xz"

_UNPACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def kind_of(name: str) -> str | None:
    """'.jsonl' for 'train.jsonl.gz'; None for a name that no reader here takes."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes[-2:]]
    if suffixes and suffixes[-1] in (*_UNPACKERS, ".zst"):
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def read_rows(path: Path) -> RowsAndNumbers:
    """All rows of a file and the number of each, from 1 (the line, for JSON lines). Raises DataError."""
    kind = kind_of(path.name)
    if kind is None or not path.is_file():
        what = "is not a regular file" if not path.is_file() else "is of a kind that is not read here"
        _refuse(f"{path} {what}")
    content = _unpacked(path)
    if not content.strip():
        _refuse(f"{path} is empty", do="give a file with at least one row")
    rows, numbers = _READERS[kind](path, content)
    if not rows:
        _refuse(f"{path} has no rows", do="give a file with at least one row")
    return rows, numbers


def _refuse(
    given: str, allowed: str = f"a file of rows: {SUFFIXES_IN_WORDS}", do: str = "correct the file"
) -> NoReturn:
    raise DataError(given=given, allowed=allowed, do=do)


def _unpacked(path: Path) -> bytes:
    """The bytes of a file, unpacked by its last suffix."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        _refuse(f"{path} is packed with zstd", do="unpack it first: zstd -d FILE")
    try:
        content = path.read_bytes()
    except OSError as problem:
        _refuse(f"{path} cannot be read: {problem.strerror or problem}", do="check its permissions")
    if suffix not in _UNPACKERS:
        return content
    try:
        return _UNPACKERS[suffix](content)
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as problem:
        _refuse(
            f"{path} cannot be unpacked, row unknown: {problem}",
            allowed=f"a whole {suffix} file",
            do="copy or download it again; it is cut off, damaged or not packed at all",
        )


def _decoded(path: Path, content: bytes) -> str:
    """UTF-8 text, without a byte order mark. The error names the byte and the line."""
    if content.startswith(_UTF16_MARKS):
        _refuse(f"{path} row 1 begins with the mark of UTF-16", allowed="text in UTF-8", do="save the file as UTF-8")
    mark = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        return content[mark:].decode("utf-8")
    except UnicodeDecodeError as problem:
        place = mark + problem.start
        row = 1 + content.count(b"\n", 0, place)
        _refuse(
            f"{path} row {row}: byte {place:,} (0x{content[place]:02x}) is not UTF-8",
            allowed="text in UTF-8",
            do="save the file as UTF-8 (iconv -f latin1 -t utf-8, if it is Latin-1)",
        )


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return row


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON value")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        _refuse(f"{place}: nested too deeply", allowed="JSON objects of moderate depth")
    except ValueError as problem:
        shown = text.strip()[:60]
        _refuse(
            f"{place}: {problem}, in {shown!r}",
            allowed="JSON objects with each key once (NaN and Infinity are no JSON)",
            do="correct that row",
        )


def _is_object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        _refuse(
            f"{place} is not an object but {type(value).__name__}: {str(value)[:60]}",
            allowed='a JSON object for each row, such as {"prompt": "...", "completion": "..."}',
            do="correct that row",
        )
    return value


def _read_json_lines(path: Path, content: bytes) -> RowsAndNumbers:
    text = _decoded(path, content)
    rows, numbers = [], []
    # Only \n separates rows: str.splitlines would also break at U+2028 inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_is_object(_parsed(line, f"{path} row {number}"), f"{path} row {number}"))
            numbers.append(number)
    return rows, numbers


def _read_json(path: Path, content: bytes) -> RowsAndNumbers:
    """A list of objects; a file that begins with an object is read as JSON lines."""
    text = _decoded(path, content)
    if text.lstrip().startswith("{"):
        return _read_json_lines(path, content)
    values = _parsed(text, f"{path} (whole file)")
    if not isinstance(values, list):
        _refuse(f"{path} holds a single {type(values).__name__}", allowed="a JSON list of objects, or JSON lines")
    rows = [_is_object(value, f"{path} row {number}") for number, value in enumerate(values, start=1)]
    return rows, range(1, len(rows) + 1)


def _read_csv(path: Path, content: bytes) -> RowsAndNumbers:
    """Comma-separated (tab for .tsv), the first row naming the columns. All values are texts."""
    text = _decoded(path, content)
    delimiter = "\t" if kind_of(path.name) == ".tsv" else ","
    limit_before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    numbers: list[int] = []
    try:
        header = next(lines)
        if len(set(header)) != len(header) or "" in header:
            _refuse(f"{path}: the header {header} has an empty name or one that stands there twice", do="name columns")
        for number, values in enumerate(lines, start=1):
            if not values:
                continue
            if len(values) != len(header):
                _refuse(
                    f"{path} row {number} (line {lines.line_num}) has {len(values)} values",
                    allowed=f"{len(header)} values a row, as the header has: {', '.join(header)}",
                    do="correct that row; a text with a comma or a line break needs double quotes around it",
                )
            rows.append(dict(zip(header, values, strict=True)))
            numbers.append(number)
    except csv.Error as problem:
        _refuse(f"{path} row {len(rows) + 1} (line {lines.line_num}): {problem}", allowed="well-formed CSV")
    finally:
        csv.field_size_limit(limit_before)
    return rows, numbers


def _read_parquet(path: Path, content: bytes) -> RowsAndNumbers:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as problem:
        reason = first_line(problem, 200)
        _refuse(f"{path} is no whole Parquet file, row unknown: {reason}", do="copy or download it again")
    return rows, range(1, len(rows) + 1)


_READERS: dict[str, Callable[[Path, bytes], RowsAndNumbers]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
