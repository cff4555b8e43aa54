"""Records: written whole or not at all, read back equal, and what is said about a file that is none."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from thriftune.errors import DiskFullError, InputError, OutputError
from thriftune.recipe import Recipe
from thriftune.records import (
    SCHEMA_VERSION,
    CutAnswers,
    DataAudit,
    EvalResult,
    Lengths,
    RunRecord,
    StepMetrics,
    read_record,
    write_record,
    write_text_atomically,
)


def evaluation(**changes: Any) -> EvalResult:
    values: dict[str, Any] = {"task": "imdb", "metric": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6}
    return EvalResult(**{**values, "rows": 9, "model": "pocket", **changes})


def audit() -> DataAudit:
    return DataAudit(
        source="reviews train, 9 rows", shape="text", rendering="plain text", rows_read=9, rows_used=8,
        rows_dropped={"empty": 1}, token_lengths=Lengths(median=5, p95=9, max=10), max_length=16, tokens=40,
        trained_tokens=8, trained_share=0.2, rows_without_trained_token=0, prompts_cut=0,
        answers_cut=CutAnswers(rows=0, share=0.0, tokens_lost_mean=0.0), eos_trained=True, eos_token="<|end|>",
        bos_doubled=False, duplicate_rows=0, rows_shared_with_eval=0, eval_rows=0, fingerprint="0" * 64,
    )  # fmt: skip


def run_record(**changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "status": "done", "method": "lora", "path": "generic", "path_reason": "no engine yet", "model": "pocket",
        "trainable_parameters": 7, "total_parameters": 70, "steps": 3, "epochs": 1.0, "loss": 1.25, "tokens": 40,
        "tokens_per_s": 10.0, "peak_bytes": 1024, "wall_s": 4.0, "train_s": 3.0, "load_s": 0.5, "adapter": "adapter",
        "data": audit(), "recipe": Recipe(), "hardware": {"device": "cpu"}, "versions": {"torch": "2"},
        "command": "thriftune train", "started": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return RunRecord(**{**values, **changes})


def metrics(**changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": 1, "epoch": 0.5, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-4, "targets": 8, "tokens": 40,
        "tokens_seen": 40, "step_s": 0.1, "tokens_per_s": 400.0, "memory_bytes": 1, "peak_bytes": 2,
    }  # fmt: skip
    return StepMetrics(**{**values, **changes})


@pytest.mark.parametrize("record", [evaluation(), run_record(), audit(), metrics()], ids=lambda r: type(r).__name__)
def test_records_read_back_equal(record: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "record.json"
    write_record(path, record)
    assert read_record(path, type(record)) == record
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_what_json_has_no_word_for(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_record(path, metrics(loss=math.nan, grad_norm=math.inf, eval_loss=-math.inf))
    json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)  # strict readers can read it too
    back = read_record(path, StepMetrics)
    assert math.isnan(back.loss)
    assert (back.grad_norm, back.eval_loss) == (math.inf, -math.inf)


def test_records_are_frozen_and_say_their_version() -> None:
    with pytest.raises(ValueError, match="frozen"):
        evaluation().value = 1.0
    assert evaluation().schema_version == run_record().schema_version == SCHEMA_VERSION


def test_a_field_of_a_later_release_is_passed_over(tmp_path: Path) -> None:
    content = {**json.loads(evaluation().model_dump_json()), "colour": "green"}
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert read_record(tmp_path / "r.json", EvalResult) == evaluation()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"schema_version": SCHEMA_VERSION + 1, "all": "different"}))
    with pytest.raises(InputError, match=f"has schema version {SCHEMA_VERSION + 1}") as caught:
        read_record(path, EvalResult)
    assert "newer thriftune" in caught.value.do


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"9" * 5_000, "cannot be read"),
        (b"null", "is not a EvalResult"),
        (b"[]", "is not a EvalResult: the whole: "),
        (b"{}", "is not a EvalResult: task: "),
        (evaluation().model_dump_json().replace("0.5", '"half"').encode(), "is not a EvalResult: value: "),
    ],
    ids=["empty", "half", "utf16", "deep", "long number", "null", "list", "no fields", "wrong type"],
)
def test_a_file_that_is_no_record(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_record(path, EvalResult)
    assert said in caught.value.given
    assert str(path) in caught.value.given


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_record(tmp_path / "record.json", EvalResult)
    with pytest.raises(InputError, match="cannot be read"):
        read_record(tmp_path, EvalResult)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_text_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "new \udcff")
    for number, kind in ((errno.ENOSPC, DiskFullError), (errno.EIO, OutputError)):

        def fail(descriptor: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(kind, match="cannot be written"):
                write_text_atomically(path, "new")
        assert path.read_text() == "old"
        assert [file.name for file in tmp_path.iterdir()] == ["record.json"]
    write_text_atomically(path, "new")
    assert path.read_text() == "new"


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        write_text_atomically(tmp_path / "file" / "record.json", "text")
    (tmp_path / "record.json").mkdir()
    with pytest.raises(OutputError):
        write_text_atomically(tmp_path / "record.json", "text")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "record.json"]
