"""Checkpoints that are whole or absent: written aside, flushed, hashed, renamed; verified before they are believed.

    checkpoint-120/
      adapter_model.safetensors, adapter_config.json     what training changed (trained.safetensors for method full)
      optimizer.safetensors, optimizer.json              its moments, without pickle
      state.json                                         step, counters, what the run must agree on
      manifest.json                                      size and sha256 of each of the above; written last

There is no random state to keep: the data order and each step's dropout are functions of the seed and the step.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from thriftune.errors import CheckpointError, DiskFullError, first_line
from thriftune.records import RankCut
from thriftune.units import format_bytes

MANIFEST = "manifest.json"
STATE = "state.json"
FOLDER_NAME = re.compile(r"checkpoint-(\d+)")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
ALLOWED = "a checkpoint-N folder that a run of this recipe wrote to its end"


class TrainState(BaseModel):
    """Where a run stands after `step` optimizer steps. `identity` is what a resumed run must have in common."""

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    tokens_seen: int = 0
    train_s: float = 0.0
    energy_j: float = 0.0
    best_eval_loss: float | None = None
    best_step: int | None = None
    last_eval_loss: float | None = None
    path: dict[str, int | bool] = Field(default_factory=dict, description="how steps were cut to fit in memory")
    cuts: list[RankCut] = Field(default_factory=list)
    events: list[str] = Field(default_factory=list)
    identity: dict[str, Any]


def write_checkpoint(output: Path, state: TrainState, write_parts: Callable[[Path], None], bytes_expected: int) -> Path:
    """Write checkpoint-{step} and return its folder. `write_parts(folder)` writes the weights and the optimizer.

    Raises DiskFullError when the disk does not hold it; whatever was there before is untouched.
    """
    final = output / f"checkpoint-{state.step}"
    aside = output / f".checkpoint-{state.step}.writing"
    try:
        output.mkdir(parents=True, exist_ok=True)
        for left_over in output.glob(".checkpoint-*.writing"):  # of a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        free = shutil.disk_usage(output).free
        if free < bytes_expected:
            raise OSError(errno.ENOSPC, f"{format_bytes(bytes_expected)} needed, {format_bytes(free)} free")
        aside.mkdir()
        write_parts(aside)
        (aside / STATE).write_text(state.model_dump_json(indent=2), encoding="utf-8")
        parts = sorted(aside.iterdir())
        for part in parts:
            part.chmod(0o666 & ~_umask())
            _flush(part)
        manifest = {part.name: {"bytes": part.stat().st_size, "sha256": _sha256(part)} for part in parts}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        _flush(aside / MANIFEST)
        _flush(aside)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        _flush(output)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not is_disk_full(error):
            raise
        raise DiskFullError(
            given=f"checkpoint-{state.step} cannot be written to {output}: {_reason(error)}",
            allowed="a disk with room for one checkpoint more than train.save_total_limit",
            do=f"free some space and resume; {last_good(output)}",
        ) from None
    return final


def prune_checkpoints(output: Path, step: int, limit: int, best_step: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; that of `step`, just written, and the best always stay.

    Later ones, which a run that went back to an earlier checkpoint finds, are not counted: they may be damaged, and are
    replaced when it gets there.
    """
    folders = [found for found in _checkpoints(output) if found[0] <= step]
    kept = {step for step, _ in folders[-limit:]} | ({best_step} if best_step is not None else set())
    if best_step is not None and len(kept) > limit and limit > 1:
        kept = {step for step, _ in folders[-(limit - 1) :]} | {best_step}
    for step, folder in folders:
        if step not in kept:
            shutil.rmtree(folder)


def verify_checkpoint(folder: Path) -> TrainState:
    """The state of a checkpoint whose every file has the size and hash that its manifest names.

    Raises CheckpointError naming the first file that is missing, changed, or named outside the folder.
    """

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(
            given=f"{folder}: {why}",
            allowed=ALLOWED,
            do="resume from another checkpoint (resume_from_checkpoint=auto takes the newest good one)",
        )

    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = [(str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()]
    except FileNotFoundError:
        raise refuse(f"no {MANIFEST}, so it was not written to its end") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise refuse(f"{MANIFEST} is damaged") from None
    for name, size, digest in entries:
        path = folder / name
        if not PLAIN_NAME.fullmatch(name) or path.is_symlink():
            raise refuse(f"{MANIFEST} names {name!r}, which is not a plain file of this folder")
        if not path.is_file():
            raise refuse(f"{name} is missing")
        if path.stat().st_size != size or _sha256(path) != digest:
            raise refuse(f"{name} is not what was written (size or hash differs)")
    if STATE not in {name for name, _, _ in entries}:
        raise refuse(f"{MANIFEST} lists no {STATE}")
    try:
        return TrainState.model_validate_json((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise refuse(f"{STATE} is of another version: {first_line(error)}") from None


def find_checkpoint(output: Path, wanted: str, say: Callable[[str], None]) -> tuple[Path, TrainState] | None:
    """The checkpoint to go on from. 'auto': the newest good one in `output`, damaged ones passed over aloud, or None.

    Any other text is a checkpoint folder, and must be good.
    """
    if wanted != "auto":
        folder = Path(wanted)
        if not folder.is_dir():
            raise CheckpointError(
                given=f"checkpoint {wanted} does not exist", allowed=f"auto, or {ALLOWED}", do="correct the path"
            )
        return folder, verify_checkpoint(folder)
    for _, folder in reversed(_checkpoints(output)):
        try:
            return folder, verify_checkpoint(folder)
        except CheckpointError as error:
            say(f"passed over {error.given}")
    return None


def check_identity(folder: Path, state: TrainState, identity: dict[str, Any]) -> None:
    """Raise CheckpointError when the checkpoint was made with other data, model, method or batch than this run."""
    changed = [
        f"{key} was {state.identity.get(key)!r}, is {value!r}"
        for key, value in identity.items()
        if state.identity.get(key) != value
    ]
    if changed:
        raise CheckpointError(
            given=f"{folder} belongs to another run: {'; '.join(changed)}",
            allowed="the same model, data, method, seed, batch and schedule: a resumed run equals an uninterrupted one",
            do="restore those settings, or train into another output folder",
        )


def newest_checkpoint(output: Path) -> Path | None:
    found = _checkpoints(output)
    return found[-1][1] if found else None


def last_good(output: Path) -> str:
    """For a message: which checkpoint to go on from. Every file of it is read and compared with its manifest."""
    found = find_checkpoint(output, "auto", lambda text: None)
    return f"the last good checkpoint is {found[0]}" if found else "there is no good checkpoint: start again"


def _checkpoints(output: Path) -> list[tuple[int, Path]]:
    if not output.is_dir():
        return []
    folders = [path for path in output.iterdir() if path.is_dir() and not path.is_symlink()]
    matches = [(FOLDER_NAME.fullmatch(path.name), path) for path in folders]
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def is_disk_full(error: Exception) -> bool:
    """Also where a library tells it in words only, as safetensors does."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in full:
        return True
    return any(f"os error {number}" in str(error) or os.strerror(number) in str(error) for number in full)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or first_line(error)
