"""Checkpoints are whole or absent: written aside and renamed, verified before they are believed, none lost to a full
disk, a killed process or the pruning of old ones. The files in them are stand-ins; runs are in tests/parity."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from thriftune.errors import CheckpointError, DiskFullError, OutputError
from thriftune.records import StepMetrics
from thriftune.train import checkpoint
from thriftune.train.checkpoint import (
    MANIFEST,
    STATE,
    TrainState,
    check_identity,
    find_checkpoint,
    last_good,
    newest_checkpoint,
    prune_checkpoints,
    verify_checkpoint,
    write_checkpoint,
)
from thriftune.train.observe import MetricsFile, read_metrics
from tiny import small_disk

WEIGHTS, MOMENTS = "adapter_model.safetensors", "optimizer.safetensors"
IDENTITY = {"model": "tiny", "seed": 7, "lora": {"r": 4, "target_modules": ["q_proj"]}, "learning_rate": 1e-4}


def state_at(step: int, **changes) -> TrainState:
    return TrainState(step=step, path={"rows_at_once": 2, "checkpointing": False}, identity=IDENTITY, **changes)


def write_parts(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"weights" * 50)
    (folder / MOMENTS).write_bytes(b"moments" * 50)


def write(output: Path, step: int, **changes) -> Path:
    return write_checkpoint(output, state_at(step, **changes), write_parts, 0)


def steps_in(output: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*"))


def auto(output: Path) -> tuple[int | None, list[str]]:
    """The step that resuming would take, and what was said on the way."""
    said: list[str] = []
    found = find_checkpoint(output, "auto", said.append)
    return (found[1].step if found else None), said


def change_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(change(manifest)))


# -- writing ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_and_verified(tmp_path):
    state = state_at(3, tokens_seen=99, best_eval_loss=0.1 + 0.2, best_step=2, events=["a", "b"])
    folder = write_checkpoint(tmp_path / "run", state, write_parts, 0)
    assert folder == tmp_path / "run" / "checkpoint-3"
    assert verify_checkpoint(folder) == state
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, MOMENTS, STATE, MANIFEST])
    assert json.loads((folder / MANIFEST).read_text()).keys() == {WEIGHTS, MOMENTS, STATE}
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-3"], "nothing else is left behind"


def test_files_have_the_users_usual_permissions(tmp_path):
    def private(folder: Path) -> None:
        write_parts(folder)
        (folder / WEIGHTS).chmod(0o600)

    before = os.umask(0o027)
    try:
        folder = write_checkpoint(tmp_path, state_at(1), private, 0)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.name != MANIFEST} == {0o640}


def test_the_same_step_written_again_replaces_the_old_one(tmp_path):
    write(tmp_path, 2, tokens_seen=1)
    write(tmp_path, 2, tokens_seen=2)
    assert verify_checkpoint(tmp_path / "checkpoint-2").tokens_seen == 2


def test_everything_is_flushed_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    flushed = []
    flush = checkpoint._flush
    monkeypatch.setattr(checkpoint, "_flush", lambda path: (flushed.append(path.name), flush(path)))
    write(tmp_path, 1)
    aside = ".checkpoint-1.writing"
    assert flushed == [WEIGHTS, MOMENTS, STATE, MANIFEST, aside, tmp_path.name]


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path, place: int = 10) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "a flipped byte in the weights": (lambda folder: flip(folder / WEIGHTS), WEIGHTS),
    "a flipped byte in the moments": (lambda folder: flip(folder / MOMENTS), MOMENTS),
    "a flipped byte in the state": (lambda folder: flip(folder / STATE), STATE),
    "truncated weights": (lambda folder: truncate(folder / WEIGHTS), WEIGHTS),
    "longer weights": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"x"), WEIGHTS),
    "empty weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), WEIGHTS),
    "missing weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    "weights that are a folder": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
        WEIGHTS,
    ),
    "a missing state": (lambda folder: (folder / STATE).unlink(), STATE),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "not written to its end"),
    "half a manifest": (lambda folder: (folder / MANIFEST).write_text('{"state.json": {'), "is damaged"),
    "a manifest of another kind": (lambda folder: (folder / MANIFEST).write_text("[1, 2]"), "is damaged"),
    "a manifest of texts": (lambda folder: change_manifest(folder, lambda _: {STATE: "yes"}), "is damaged"),
    "a manifest without sizes": (lambda folder: change_manifest(folder, lambda _: {STATE: {}}), "is damaged"),
    "a manifest that is not text": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "an empty manifest": (lambda folder: change_manifest(folder, lambda _: {}), f"lists no {STATE}"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_aloud_and_refused_when_named(tmp_path, name):
    damage, told = DAMAGES[name]
    write(tmp_path, 2)
    newest = write(tmp_path, 4)
    damage(newest)
    step, said = auto(tmp_path)
    assert step == 2
    assert len(said) == 1 and said[0].startswith(f"passed over {newest}: ") and told in said[0]
    with pytest.raises(CheckpointError, match="resume_from_checkpoint=auto") as caught:
        find_checkpoint(tmp_path, str(newest), said.append)
    assert str(newest) in caught.value.given and told in caught.value.given
    assert last_good(tmp_path).endswith("checkpoint-2")


@settings(max_examples=60)
@given(name=st.sampled_from([WEIGHTS, MOMENTS, STATE]), place=st.integers(0, 10_000))
def test_any_flipped_bit_is_noticed(tmp_path_factory, name, place):
    folder = write(tmp_path_factory.mktemp("flip"), 1)
    flip(folder / name, place)
    with pytest.raises(CheckpointError):
        verify_checkpoint(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", "..", ".", "", ".hidden", "a\\b", "a\nb"])
def test_a_manifest_that_names_a_place_outside_is_refused(tmp_path, name):
    folder = write(tmp_path / "run", 1)
    (tmp_path / "run" / "outside").write_bytes(b"weights" * 50)
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_bytes(b"weights" * 50)
    entry = json.loads((folder / MANIFEST).read_text())[WEIGHTS]
    change_manifest(folder, lambda manifest: {**manifest, name: entry})
    with pytest.raises(CheckpointError, match="not a plain file of this folder"):
        verify_checkpoint(folder)


def test_a_link_in_a_checkpoint_is_refused_even_when_its_content_is_right(tmp_path):
    folder = write(tmp_path / "run", 1)
    shutil.move(folder / WEIGHTS, tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not a plain file of this folder"):
        verify_checkpoint(folder)


@pytest.mark.parametrize(
    "state", ['{"step": 1}', "[]", '{"step": "x"}', state_at(1).model_dump_json()[:-1] + ', "of_tomorrow": 1}']
)
def test_a_state_of_another_version_is_refused(tmp_path, monkeypatch, state):
    monkeypatch.setattr(TrainState, "model_dump_json", lambda *_, **__: state)
    folder = write(tmp_path, 1)
    with pytest.raises(CheckpointError, match="of another version"):
        verify_checkpoint(folder)


# -- finding ----------------------------------------------------------------------------------------------------------


def test_the_newest_is_found_by_number_and_other_things_are_no_checkpoints(tmp_path):
    for step in (9, 10, 2):
        write(tmp_path, step)
    shutil.copytree(tmp_path / "checkpoint-9", tmp_path / "checkpoint-best")
    shutil.copytree(tmp_path / "checkpoint-9", tmp_path / ".checkpoint-30.writing")
    shutil.copytree(tmp_path / "checkpoint-9", tmp_path / "old-checkpoint-31")
    (tmp_path / "checkpoint-32").write_text("a file")
    (tmp_path / "checkpoint-33").symlink_to(tmp_path / "checkpoint-9")
    assert auto(tmp_path) == (10, [])
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_no_good_checkpoint_is_none_and_damaged_ones_are_named(tmp_path):
    assert auto(tmp_path / "not there") == (None, [])
    assert last_good(tmp_path) == "there is no good checkpoint: start again"
    flip(write(tmp_path, 1) / WEIGHTS)
    truncate(write(tmp_path, 2) / WEIGHTS)
    step, said = auto(tmp_path)
    assert step is None
    assert ["checkpoint-2" in said[0], "checkpoint-1" in said[1], len(said)] == [True, True, 2]


def test_a_named_checkpoint_may_be_anywhere_and_must_exist(tmp_path):
    folder = write(tmp_path / "other", 3)
    found = find_checkpoint(tmp_path / "run", str(folder), print)
    assert found is not None and found[1].step == 3
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(tmp_path / "run", str(tmp_path / "other" / "checkpoint-4"), print)


def test_a_checkpoint_of_another_run_is_refused_and_every_difference_named(tmp_path):
    folder = write(tmp_path, 1)
    state = verify_checkpoint(folder)
    check_identity(folder, state, IDENTITY)  # also after its way through JSON
    with pytest.raises(CheckpointError, match="another run") as caught:
        check_identity(folder, state, {**IDENTITY, "seed": 8, "learning_rate": 2e-4})
    assert "seed was 7, is 8" in caught.value.given
    assert "learning_rate was 0.0001, is 0.0002" in caught.value.given
    assert "model" not in caught.value.given


# -- pruning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (1, None, [5]),
        (2, None, [4, 5]),
        (9, None, [1, 2, 3, 4, 5]),
        (1, 2, [2, 5]),
        (2, 2, [2, 5]),
        (3, 2, [2, 4, 5]),
        (3, 4, [3, 4, 5]),
        (1, 5, [5]),
        (2, 5, [4, 5]),
    ],
)
def test_the_limit_is_honoured_and_the_newest_and_the_best_stay(tmp_path, limit, best, kept):
    for step in range(1, 6):
        write(tmp_path, step)
    prune_checkpoints(tmp_path, 5, limit, best)
    assert steps_in(tmp_path) == kept


def test_a_run_that_went_back_does_not_delete_what_it_has_just_written(tmp_path):
    """Checkpoint 6 is damaged, so the run goes on from 3; were 6 counted, 4 would be deleted and nothing good left."""
    write(tmp_path, 3)
    flip(write(tmp_path, 6) / WEIGHTS)
    assert auto(tmp_path)[0] == 3
    write(tmp_path, 4)
    prune_checkpoints(tmp_path, 4, 1, None)
    assert auto(tmp_path)[0] == 4
    write(tmp_path, 6)
    prune_checkpoints(tmp_path, 6, 1, None)
    assert steps_in(tmp_path) == [6]
    assert auto(tmp_path) == (6, [])


# -- a full disk ------------------------------------------------------------------------------------------------------


def rust_says_full(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def quota_is_used_up(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"half")
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def rust_says_quota(folder: Path) -> None:
    raise SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)")


@pytest.mark.parametrize("parts", [rust_says_full, quota_is_used_up, rust_says_quota])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_names_it(tmp_path, parts):
    good = write(tmp_path, 2)
    flip(write(tmp_path, 3) / WEIGHTS)
    with pytest.raises(DiskFullError) as caught:
        write_checkpoint(tmp_path, state_at(4), parts, 0)
    assert "checkpoint-4" in caught.value.given
    assert caught.value.do.endswith(str(good))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert verify_checkpoint(good).step == 2
    assert steps_in(tmp_path) == [2, 3]


def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    class Usage:
        free = 999

    def must_not_be_called(folder: Path) -> None:
        raise AssertionError("nothing may be written")

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(DiskFullError, match="there is no good checkpoint"):
        write_checkpoint(tmp_path, state_at(1), must_not_be_called, 1000)
    write_checkpoint(tmp_path, state_at(1), write_parts, 999)
    assert steps_in(tmp_path) == [1]


def test_another_error_comes_through_as_it_is_and_leaves_nothing(tmp_path):
    def broken(folder: Path) -> None:
        write_parts(folder)
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        write_checkpoint(tmp_path, state_at(1), broken, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("library", ["safetensors", "python"])
def test_a_disk_that_is_really_full(tmp_path, library):
    def fill(folder: Path) -> None:
        tensors = {"w": torch.zeros(600 * 1024)}  # 2.3 MiB: one checkpoint of it fits on this disk, two do not
        if library == "safetensors":
            save_file(tensors, folder / WEIGHTS)
        else:
            (folder / WEIGHTS).write_bytes(tensors["w"].numpy().tobytes())

    with small_disk(tmp_path / "disk", 4) as disk:
        good = write_checkpoint(disk, state_at(1), fill, 0)
        with pytest.raises(DiskFullError) as caught:
            write_checkpoint(disk, state_at(2), fill, 0)
        assert caught.value.do.endswith(str(good))
        assert [path.name for path in disk.iterdir()] == ["checkpoint-1"]
        assert verify_checkpoint(good).step == 1
        with pytest.raises(DiskFullError, match="free"):  # and now it is seen beforehand
            write_checkpoint(disk, state_at(2), fill, 4 * 600 * 1024)


def step_metrics(step: int) -> StepMetrics:
    return StepMetrics(
        step=step,
        epoch=0.5,
        loss=1.5,
        grad_norm=1.0,
        learning_rate=1e-4,
        targets=3,
        tokens=9,
        tokens_seen=9 * step,
        step_s=0.1,
        tokens_per_s=90.0,
        memory_bytes=1,
        peak_bytes=1,
    )


def test_metrics_that_do_not_fit_on_the_disk_end_the_run_with_the_last_good_checkpoint(tmp_path):
    with small_disk(tmp_path / "disk", 1) as disk:
        good = write(disk, 2)
        metrics = MetricsFile(disk / "metrics.jsonl")
        metrics.start(0, 9)
        metrics.step(step_metrics(1))
        with pytest.raises(OSError), (disk / "junk").open("wb", buffering=0) as junk:
            while junk.write(bytes(4096)):
                pass
        with pytest.raises(DiskFullError, match="cannot be written") as caught:
            for step in range(2, 50):
                metrics.step(step_metrics(step))
        metrics.end()  # does not stumble over what could not be written
        assert caught.value.do.endswith(str(good))
        assert read_metrics(disk / "metrics.jsonl")[0].step == 1


def test_metrics_that_cannot_be_written_for_another_reason_say_so(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.start(0, 9)

    class Broken:
        def write(self, text: str) -> None:
            raise OSError(errno.EIO, "Input/output error")

        def close(self) -> None:
            raise OSError(errno.EIO, "Input/output error")

    metrics._file.close()
    metrics._file = Broken()
    with pytest.raises(OutputError, match=r"step 1 cannot be written to .*: Input/output error"):
        metrics.step(step_metrics(1))
    metrics.end()


# -- a killed process -------------------------------------------------------------------------------------------------


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while(action) -> None:
    """Run `action` in a child process that must die by SIGKILL in the middle of it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("moment", ["in the weights", "before the manifest", "before the name", "between old and new"])
def test_a_process_killed_in_the_middle_leaves_nothing_that_resuming_would_take(tmp_path, moment):
    def action() -> None:
        parts = write_parts
        if moment == "in the weights":

            def parts(folder: Path) -> None:
                (folder / WEIGHTS).write_bytes(b"half")
                die()

        elif moment == "before the manifest":
            checkpoint._sha256 = die
        else:
            Path.rename = die
        write_checkpoint(tmp_path, state_at(4), parts, 0)

    write(tmp_path, 2)
    if moment == "between old and new":
        flip(write(tmp_path, 4) / WEIGHTS)  # what the run passed over, and now writes again
    killed_while(action)
    assert (tmp_path / ".checkpoint-4.writing").is_dir(), "the child was not killed where the test says"
    assert auto(tmp_path) == (2, [])
    write(tmp_path, 6)
    assert steps_in(tmp_path) == [2, 6]
    assert not list(tmp_path.glob(".*")), "what a killed process left is cleared away by the next checkpoint"
