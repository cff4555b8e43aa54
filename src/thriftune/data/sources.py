"""Where rows come from: the built-in sets, local files and folders, the hub. A row is one JSON object as a dict.

Every problem of a file becomes a DataError that names the file and the row (for text files: the line), from 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from thriftune.data import files
from thriftune.errors import DataError, first_line
from thriftune.recipe import DataRecipe

BUILTIN = ("sums", "reviews")
ON_HUB = {"imdb": ("stanfordnlp/imdb", None), "gsm8k": ("openai/gsm8k", "main")}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


@dataclass(frozen=True)
class Places(Sequence[str]):
    """`places[i]` says where row i came from, 'rows.jsonl row 17'. Holds numbers, not texts."""

    source: str
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Places: ...

    def __getitem__(self, index: int | slice) -> str | Places:
        if isinstance(index, slice):
            return Places(self.source, self.numbers[index])
        return f"{self.source} row {self.numbers[index]}"

    def __iter__(self) -> Iterator[str]:
        return (f"{self.source} row {number}" for number in self.numbers)


@dataclass(frozen=True)
class Rows:
    """Rows as read. `description` is in words: 'imdb train, 25,000 rows'."""

    rows: list[dict[str, Any]]
    places: Places
    description: str

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int], label: str) -> Rows:
        """These rows in this order, each still knowing its place; `label` tells in words which they are."""
        return Rows(
            [self.rows[index] for index in indices],
            Places(self.places.source, [self.places.numbers[index] for index in indices]),
            f"{self.description}, {label}" if label else self.description,
        )


def load_rows(data: DataRecipe, split: str) -> Rows:
    """Read one split of the recipe's data set, whole.

    In this order: `data.path` (a file or folder) when given; a built-in set; an existing local file or folder called
    `data.name`; a data set of the hub. A single file holds `data.split` and no other split. Raises DataError.
    """
    if data.path is not None:
        return _from_path(_existing(data.path, "data.path"), data, split, data.name)
    if data.name in BUILTIN:
        return _builtin(data.name, split)
    if data.name not in ON_HUB:
        path = _local(data.name)
        if path is not None:
            return _from_path(path, data, split, path.name)
    return _from_hub(data, split)


def load_file(path: str, option: str) -> Rows:
    """Read one file, whatever split it stands for. `option` is what a person named it with. Raises DataError."""
    found = _existing(path, option)
    if found.is_dir():
        split = ", or the split of it with data.eval_split" if option == "data.eval_path" else ""
        raise DataError(
            given=f"{option} {path} is a folder",
            allowed="one file of rows: " + files.SUFFIXES_IN_WORDS,
            do=f"name the file{split}",
        )
    return _rows_of(found, files.read_rows(found), found.name)


def _builtin(name: str, split: str) -> Rows:
    from thriftune.data import builtin

    rows = builtin.rows(name, split)
    return Rows(rows, Places(f"{name} {split}", range(1, len(rows) + 1)), f"{name} {split}, {len(rows):,} rows")


def _existing(text: str, option: str) -> Path:
    path = Path(text).expanduser()
    if "\0" in text or not path.exists():
        raise DataError(
            given=f"{option} {text!r} does not exist (looked from {Path.cwd()})",
            allowed="a file or folder of rows: " + files.SUFFIXES_IN_WORDS,
            do="correct the path",
        )
    return path


def _local(name: str) -> Path | None:
    """The local path `name` stands for, or None when it can only be a hub id. Raises DataError for neither."""
    if "\0" not in name and len(name) < 4096:
        try:
            path = Path(name).expanduser()
            if path.exists():
                return path
        except (OSError, RuntimeError):  # a name too long for the file system, or ~nobody: not a local path
            pass
    looks_local = files.kind_of(name) is not None or name.startswith(("/", ".", "~"))
    if looks_local or ".." in name or "--" in name or not _HUB_ID.fullmatch(name):
        shown = repr(name) if len(name) <= 100 else repr(name[:97] + "...")
        raise DataError(
            given=f"data {shown} is not an existing file or folder (looked from {Path.cwd()}), and no hub id",
            allowed=f"{', '.join((*BUILTIN, *ON_HUB))}, a file ({files.SUFFIXES_IN_WORDS}), a folder, or a hub id such "
            "as org/name",
            do="correct data.name",
        )
    return None


def _from_path(path: Path, data: DataRecipe, split: str, label: str) -> Rows:
    if path.is_dir():
        found = _files_of_split(path, split)
        parts = [files.read_rows(file) for file in found]
        if len(parts) == 1:
            return _rows_of(found[0], parts[0], f"{label} {split}")
        rows = [row for part, _ in parts for row in part]
        return Rows(rows, Places(f"{path} {split}", range(1, len(rows) + 1)), f"{label} {split}, {len(rows):,} rows")
    if split != data.split:
        raise DataError(
            given=f"split {split!r} of {path}, which is a single file and stands for split {data.split!r}",
            allowed=f"a folder that holds a file for each split, such as {data.split}.jsonl and {split}.jsonl",
            do="name the other file with data.eval_path, or hold rows out with data.eval_fraction",
        )
    return _rows_of(path, files.read_rows(path), label)


def _rows_of(path: Path, part: tuple[list[dict[str, Any]], Sequence[int]], label: str) -> Rows:
    rows, numbers = part
    return Rows(rows, Places(str(path), numbers), f"{label}, {len(rows):,} rows")


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """`train.jsonl.gz`, or the shards `train-00000-of-00002.parquet`, in the folder or its `data` folder."""
    try:
        known = [
            path
            for place in (folder, folder / "data")
            if place.is_dir()
            for path in sorted(place.iterdir())
            if files.kind_of(path.name) is not None and path.is_file()
        ]
    except OSError as problem:
        raise DataError(
            given=f"the folder {folder} cannot be listed: {problem}",
            allowed="a folder that can be read",
            do="check its permissions",
        ) from problem
    found = [path for path in known if path.name.split(".")[0] == split]
    shards = [path for path in known if re.fullmatch(re.escape(split) + r"-\d+-of-\d+\..*", path.name)]
    if len(found) == 1 or (shards and not found):
        return found or shards
    listed = ", ".join(path.name for path in known[:10]) or "no data file"
    raise DataError(
        given=f"{len(found) or 'no'} files for split {split!r} in the folder {folder}, which holds {listed}",
        allowed=f"one file called {split}.jsonl (or {files.SUFFIXES_IN_WORDS})",
        do="name the file itself, or the split with data.split",
    )


def _from_hub(data: DataRecipe, split: str) -> Rows:
    """Through the `datasets` library, after a quick look whether the hub is there."""
    from thriftune.hub import ensure_hub_reachable

    name, subset = ON_HUB.get(data.name, (data.name, None))
    subset = data.subset or subset
    what = f"the data set {name!r}"
    offline = False
    try:
        ensure_hub_reachable(what, DataError)
    except DataError:
        if not _is_cached(name):
            raise
        offline = True
    rows = _download(name, subset, split, offline)
    label = f"{name}{f' ({subset})' if subset else ''} {split}"
    if not rows:
        raise DataError(given=f"{label} has no rows", allowed="at least one row", do="choose another split")
    return Rows(rows, Places(label, range(1, len(rows) + 1)), f"{label}, {len(rows):,} rows")


def _is_cached(name: str) -> bool:
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()


def _download(name: str, subset: str | None, split: str, offline: bool) -> list[dict[str, Any]]:
    """All rows of a hub data set. `offline` reads the cache without asking the hub first."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or before
    try:
        table = datasets.load_dataset(name, subset, split=split)
        return [dict(row) for row in table]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as problem:
        raise DataError(
            given=f"the data set {name!r}, subset {subset}, split {split!r} does not load: {first_line(problem)}",
            allowed="a data set of the hub that needs no code of its own, one of its subsets, one of its splits",
            do="check data.name, data.subset and data.split; for a private or gated set, set HF_TOKEN",
        ) from problem
    finally:
        datasets.config.HF_HUB_OFFLINE = before
