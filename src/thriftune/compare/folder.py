"""A comparison's folder: what was asked (compare.yaml), checked when it is gone on with, and the records in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thriftune.compare.grid import Cell, Grid
from thriftune.compare.jobs import Question
from thriftune.errors import InputError, OutputError
from thriftune.recipe.strict_yaml import parse_yaml, write_yaml
from thriftune.records import CellRecord, RunRecord, read_record, write_text_atomically

FILE = "compare.yaml"
SCHEMA_VERSION = 1
SHOWN_DIFFERENCES = 8


def cell_folder(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / cell.name


def claim(folder: Path, grid: Grid, question: Question, searches: bool, at_once: int) -> None:
    """Write compare.yaml, or check the one that is there: cells may be added, what is there may not change.

    Raises OutputError for a folder that holds something else, InputError for another comparison, with what differs.
    """
    check(folder, grid, question, searches, at_once)
    write_text_atomically(folder / FILE, write_yaml(_asked(grid, question, searches, at_once)))


def check(folder: Path, grid: Grid, question: Question, searches: bool, at_once: int) -> None:
    """What `claim` refuses, without writing."""
    path = folder / FILE
    if not path.is_file():
        others = [] if not folder.is_dir() else [found for found in folder.iterdir() if not found.name.startswith(".")]
        if others or (folder.exists() and not folder.is_dir()):
            raise OutputError(
                given=f"{folder} exists and holds no comparison",
                allowed="a new or empty folder, or one with a comparison to go on with",
                do="name another --output",
            )
        return
    stored = _read(path)
    asked = _asked(grid, question, searches, at_once)
    differences = _differences(stored, asked)
    if differences:
        more = len(differences) - SHOWN_DIFFERENCES
        listed = "".join(f"\n    - {text}" for text in differences[:SHOWN_DIFFERENCES])
        raise InputError(
            given=f"{folder} holds another comparison:{listed}" + (f"\n    and {more} more" if more > 0 else ""),
            allowed="the same command again; methods, seeds and values of a sweep may be added",
            do=f"give the words of that comparison ({path} has them), or name another --output",
        )


def _asked(grid: Grid, question: Question, searches: bool, at_once: int) -> dict[str, Any]:
    """Per variant its whole recipe as far as it was given, since that is what has to stay."""
    variants = {cell.variant: {key: value for key, value in cell.tree.items() if key != "seed"} for cell in grid.cells}
    return {
        "schema_version": SCHEMA_VERSION,
        "task": question.task,
        "split": question.split,
        "limit": question.limit,
        "general_text": question.general_text,
        "search": searches,
        "at_once": at_once,
        "methods": list(grid.methods),
        "seeds": list(grid.seeds),
        "variants": variants,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        found = parse_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found["variants"], dict):
            raise ValueError("it has no variants")
    except (OSError, ValueError, KeyError) as error:
        given = f"{path} cannot be read: {error}"
        raise InputError(given=given, allowed="the file that a comparison wrote", do="restore or remove it") from None
    return found


def _differences(stored: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    found = []
    stored.setdefault("at_once", 1)  # older comparisons knew no other
    for key in ("schema_version", "task", "split", "limit", "general_text", "search", "at_once"):
        if stored.get(key) != asked[key]:
            found.append(f"{key}: {stored.get(key)} there, {asked[key]} asked for")
    for key in ("methods", "seeds"):
        missing = [value for value in stored.get(key, []) if value not in asked[key]]
        if missing:
            found.append(f"{key}: {', '.join(map(str, missing))} there and not asked for")
    for name, tree in stored["variants"].items():
        if name not in asked["variants"]:
            found.append(f"{name}: there and not asked for")
            continue
        before, now = _flat(tree), _flat(asked["variants"][name])
        for place in sorted(before.keys() | now.keys()):
            if before.get(place) != now.get(place):
                old, new = before.get(place, "the default"), now.get(place, "the default")
                found.append(f"{name}: {place} is {old} there, {new} asked for")
    return found


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def read_cell(folder: Path, cell: Cell) -> CellRecord | None:
    path = cell_folder(folder, cell) / "cell.json"
    return read_record(path, CellRecord) if path.is_file() else None


def spent_s(folder: Path) -> float:
    """Wall seconds of everything in the folder that came to its end: runs of cells and of the search, evaluations."""
    total = 0.0
    for path in (*folder.glob("cells/*/record.json"), *folder.glob("search/*/*/record.json")):
        total += read_record(path, RunRecord).wall_s
    for path in folder.glob("cells/*/cell.json"):
        record = read_record(path, CellRecord)
        total += sum(result.wall_s for result in (record.result, record.general) if result)
    return total
