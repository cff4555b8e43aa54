"""The records of a comparison without its weights: copied out of its folder, and put back to go on with it.

Of 25,000 answers a cell the prompts are left out: they are the data set's. Answers and steps go into one archive.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import yaml

ARCHIVE = "answers-and-steps.tar.xz"
FILES = ("compare.yaml", "report.html", "report.md", "report.json", "search/search.json")
RECORDS = ("cell.json", "record.json")
LEFT_OUT = ("prompt", "place", "log_likelihoods")


def keep(folder: Path, kept: Path) -> None:
    """Write the records of every cell that has come to its end into `kept`; an earlier set is replaced."""
    if not (folder / "compare.yaml").is_file():
        return
    shutil.rmtree(kept, ignore_errors=True)
    done = sorted(path.parent for path in folder.glob("cells/*/cell.json"))
    names = [*FILES, *(f"cells/{cell.name}/{name}" for cell in done for name in RECORDS)]
    for name in names:
        if (folder / name).is_file():
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, kept / name)
    with tarfile.open(kept / ARCHIVE, "w:xz", preset=1) as archive:
        for cell in done:
            for path in sorted([*cell.glob("metrics.jsonl"), *cell.glob("eval-*.jsonl"), *cell.glob("eval-*.json")]):
                content = _without_prompts(path) if path.name.startswith("eval-") and path.suffix == ".jsonl" else None
                _add(archive, f"cells/{cell.name}/{path.name}", content or path.read_bytes())


def restore(kept: Path, folder: Path, model: str, data: str) -> None:
    """Make `folder` a comparison to go on with, from what `keep` has left. Does nothing where there is one.

    The model and the data lie at `model` and `data` here. `compare` takes other paths for another comparison, so they
    are put where the records have those of the machine before.
    """
    if (folder / "compare.yaml").is_file() or not (kept / "compare.yaml").is_file():
        return
    before = yaml.safe_load((kept / "compare.yaml").read_text(encoding="utf-8"))["variants"]["base"]
    moved = {before["model"]["name"]: model, before["data"]["path"]: data}
    for path in kept.rglob("*"):
        if path.is_file() and path.name != ARCHIVE:
            text = path.read_text(encoding="utf-8")
            for there, here in moved.items():
                text = text.replace(there, here)
            (folder / path.relative_to(kept)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(kept)).write_text(text, encoding="utf-8")
    with tarfile.open(kept / ARCHIVE) as archive:
        archive.extractall(folder, filter="data")


def at_once(folder: Path) -> int | None:
    """How many cells the comparison in `folder` has side by side; None where there is none. It has to stay, or times
    of cells would not be comparable."""
    path = folder / "compare.yaml"
    return int(yaml.safe_load(path.read_text(encoding="utf-8"))["at_once"]) if path.is_file() else None


def _without_prompts(path: Path) -> bytes:
    lines = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            answer = json.loads(line)
            short = {key: value for key, value in answer.items() if key not in LEFT_OUT}
            lines.append(json.dumps(short, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))
