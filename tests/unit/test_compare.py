"""`thriftune compare` on the model inside the package: going on, equal cells, equal tables, and rows for what fails."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import runner
from thriftune.compare import cell as work
from thriftune.compare.grid import make_grid
from thriftune.compare.jobs import CellJob, PlanJob, Question, RateJob
from thriftune.errors import DoesNotFitError
from thriftune.records import CellRecord, ReportRecord, RunRecord, read_record, write_record
from thriftune.train.observe import read_metrics

SMALL = (
    *("pocket", "--data", "reviews", "--limit", "12"),
    *("max_samples=40", "max_steps=4", "per_device_train_batch_size=4", "gradient_accumulation_steps=1"),
)
RATE = "learning_rate=1e-3"
TIMES = ("s", "tokens/s", "USD", "Wh")
WAITED_S = 90.0


@pytest.fixture
def run(monkeypatch, capsys):
    return runner(monkeypatch, capsys)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cell_of(folder: Path, name: str) -> CellRecord:
    return read_record(folder / "cells" / name / "cell.json", CellRecord)


def stamps(folder: Path) -> dict[str, int]:
    """When each file of a folder was last written."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def once(path: Path, act: Callable[[], None]) -> threading.Thread:
    """Act when the file is there."""

    def wait() -> None:
        until = time.monotonic() + WAITED_S
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kill_the_cell() -> None:
    for child in multiprocessing.active_children():
        if child.pid is not None:
            os.kill(child.pid, signal.SIGKILL)


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    """What two runs must agree on: no times, no measured memory, no places."""
    report = copy.deepcopy(report)
    table = [row for row in report["table"] if row["unit"] not in TIMES and row["key"] != "peak_measured"]
    for variant in report["variants"]:
        del variant["allocated_bytes"], variant["reserved_bytes"]
    for cell in report["cells"]:
        del cell["folder"], cell["recipe"], cell["command"], cell["usable_bytes"]
    return {**report, "table": table, "title": "", "commands": []}


# ---------------------------------------------------------------- a whole comparison


def test_a_comparison_scores_all_alike_and_a_second_go_gives_the_same_table(run, here):
    words = (*SMALL, RATE, "--methods", "base,full,lora,qlora", "--seeds", "1", "--json")
    first = run("compare", *words, "-o", "one").ok().json
    second = run("compare", *words, "-o", "two").ok().json
    assert without_times(first) == without_times(second)

    report = ReportRecord.model_validate_json(Path("one/report.json").read_text(encoding="utf-8"))
    assert sorted(variant.method for variant in report.variants) == ["base", "full", "lora", "qlora"]
    assert Path("one/report.html").is_file() and Path("one/report.md").is_file()
    cells = {name: cell_of(Path("one"), name) for name in ("base", "full-seed42", "lora-seed42", "qlora-seed42")}
    for name, cell in cells.items():
        assert cell.status == "done" and cell.result is not None and cell.result.rows == 12, name
        assert cell.general is not None and cell.general.value > 0, name
        assert cell.first_token_s is not None and cell.first_token_s > 0, name
        assert (cell.merged_first_token_s is not None) == (cell.method in ("lora", "qlora")), name
        assert (cell.result_bytes is not None) == (cell.method != "base"), name
    seen = {
        name: [
            (step.step, step.tokens, step.targets) for step in read_metrics(Path("one/cells", name, "metrics.jsonl"))
        ]
        for name in cells
        if name != "base"
    }
    assert len(seen["full-seed42"]) == 4
    assert seen["full-seed42"] == seen["lora-seed42"] == seen["qlora-seed42"]

    before = stamps(Path("one/cells"))
    again = run("compare", *words, "-o", "one").ok().json
    assert stamps(Path("one/cells")) == before, "what is done is not done again"
    assert without_times(again) == without_times(first)

    # A cell that saw other tokens in one step cannot stand beside the others, and the page says which.
    metrics = Path("one/cells/lora-seed42/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    lines[2]["tokens"] += 1
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    message = run("compare", *words, "-o", "one").refused("tokens a step: step 3", "lora-seed42")
    assert "cannot stand in one table" in message
    assert run("report", "one", "-o", "joined").refused("tokens a step")


@pytest.mark.parametrize("task", ["exact:completion", "marks.py:mark"])
def test_rows_and_marks_of_ones_own_are_compared(run, here, task):
    rows = [{"prompt": f"Say {number}.", "completion": str(number)} for number in range(12)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (here / "marks.py").write_text("def mark(answer, row):\n    return min(1.0, len(answer) / 10)\n")
    words = ("--methods", "base,lora", "--seeds", "1", "max_steps=2", "max_new_tokens=4", RATE)
    report = run("compare", "pocket", "--data", "rows.jsonl", "--task", task, *words, "-o", "out", "--json").ok().json
    assert report["task"] == task and report["test_rows"] == 12
    assert [cell["status"] for cell in report["cells"]] == ["done", "done"]
    assert report["pairs"][0]["p_value"] is not None


CHOICE = """
task: local_choice
dataset_path: json
dataset_name: null
dataset_kwargs: {data_files: {test: FOLDER/test.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: ["yes", "no"]
doc_to_target: gold
metric_list: [{metric: acc}]
metadata: {version: 1.0}
"""


def test_a_task_of_the_harness_is_compared_row_by_row(run, here):
    pytest.importorskip("lm_eval")
    rows = [{"question": f"Is {number} more than 5?", "gold": int(number <= 5)} for number in range(12)]
    (here / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (here / "choice.yaml").write_text(CHOICE.replace("FOLDER", str(here)), encoding="utf-8")
    words = ("--data", "reviews", "--methods", "base,lora", "--seeds", "1", "max_samples=8", "max_steps=1", RATE)
    report = run("compare", "pocket", "--task", "lm_eval:choice.yaml", *words, "-o", "out", "--json").ok().json
    assert (report["metric"], report["as_percent"], report["test_rows"]) == ("acc", True, 12)
    for name in ("base", "lora-seed42"):
        cell = cell_of(Path("out"), name)
        answers = [json.loads(line) for line in (Path("out/cells") / name / "eval-lm_eval-choice.yaml.jsonl").open()]
        assert len(answers) == 12
        assert cell.result.value == sum(answer["correct"] for answer in answers) / 12
    assert report["pairs"][0]["rows"] == 12 and report["pairs"][0]["p_value"] is not None


def test_a_dry_run_writes_nothing_and_says_what_would_run(run, here):
    out = run("compare", *SMALL, "lora_r=4,8", "--methods", "base,lora", "--seeds", "2", "--dry-run", "--json").ok()
    assert [cell["cell"] for cell in out.json["cells"]] == [
        "base", *(f"lora-lora.r_{rank}-seed{seed}" for seed in (42, 43) for rank in (4, 8)),
    ]  # fmt: skip
    assert out.json["steps"] == 4 and all(cell["plan"] for cell in out.json["cells"][1:])
    assert list(here.iterdir()) == []


# ---------------------------------------------------------------- stopped, killed, too large


def test_a_stopped_comparison_goes_on_with_what_is_missing(run, here):
    words = (*SMALL, RATE, "--methods", "base,lora", "--seeds", "2", "-o", "out")
    cells = Path("out/cells")
    asked = once(cells / "lora-seed42" / "metrics.jsonl", lambda: os.kill(os.getpid(), signal.SIGINT))
    run("compare", *words).refused("goes on with what is missing", code=130)
    asked.join()
    assert cell_of(Path("out"), "base").status == "done"
    assert not (cells / "lora-seed42" / "cell.json").exists() and not (cells / "lora-seed43").exists()
    before = stamps(cells / "base")
    run("compare", *words).ok()
    assert stamps(cells / "base") == before
    assert {cell_of(Path("out"), name).status for name in ("base", "lora-seed42", "lora-seed43")} == {"done"}
    assert read_record(cells / "lora-seed42" / "record.json", RunRecord).steps == 4


def test_a_killed_cell_is_a_row_that_says_so_and_force_trains_it_again(run, here):
    words = (*SMALL, RATE, "--methods", "base,lora,qlora", "--seeds", "1", "-o", "out")
    cells = Path("out/cells")
    killed = once(cells / "lora-seed42" / "recipe.yaml", kill_the_cell)
    shown = run("compare", *words).ok()
    killed.join()
    record = cell_of(Path("out"), "lora-seed42")
    assert record.status == "out_of_memory" and record.plan is not None
    assert "planned 5" in record.reason and "MiB" in record.reason
    assert "out of memory" in shown.out and cell_of(Path("out"), "qlora-seed42").status == "done"
    before = stamps(cells)
    run("compare", *words).ok()
    assert stamps(cells) == before, "it would run out again"
    run("compare", *words, "--force").ok()
    assert cell_of(Path("out"), "lora-seed42").status == "done"


@pytest.fixture
def job(tmp_path) -> CellJob:
    grid = make_grid(
        ["max_samples=8", "max_steps=1", RATE], None, {"model": "pocket", "data": "reviews"}, ["lora"], "1"
    )
    cell, folder = grid.cells[0], tmp_path / "cell"
    question = Question("reviews", "test", 4, None)
    plan = work.plan_cells(PlanJob({"lora": cell.recipe("planned")}, question, task_is_named=True)).plans["lora"]
    return CellJob(folder, "lora", "lora", 42, {}, cell.recipe(str(folder)), plan, question, False, "test", 1, 0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        DoesNotFitError(given="no memory is left for the optimizer", allowed="a", do="b"),
    ],
)
def test_every_way_to_run_out_is_the_same_row_with_the_plans_guess(job, monkeypatch, error):
    def runs_out(*_: Any) -> RunRecord:
        raise error

    monkeypatch.setattr(work, "_train", runs_out)
    record = work.run_cell(job)
    assert record.status == "out_of_memory" and record.reason.startswith("in training: ")
    assert "the plan was 5" in record.reason and record.plan == job.plan and "beside" not in record.reason
    assert read_record(job.folder / "cell.json", CellRecord) == record
    assert "; beside 2 others" in work.run_cell(replace(job, sharing=2)).reason
    with pytest.raises(DoesNotFitError):
        work.try_rate(RateJob(job.recipe, False, "test", 1))


def test_another_error_is_not_taken_for_a_lack_of_memory(job, monkeypatch):
    def breaks(*_: Any) -> RunRecord:
        raise RuntimeError("a bug")

    monkeypatch.setattr(work, "_train", breaks)
    with pytest.raises(RuntimeError, match="a bug"):
        work.run_cell(job)


def test_what_does_not_fit_beforehand_is_a_row_without_a_run(job, monkeypatch):
    def refuses(*_: Any, **__: Any) -> None:
        raise DoesNotFitError(given="90 GiB planned, 80 GiB free", allowed="less", do="take qlora")

    monkeypatch.setattr(work, "prepare_run", refuses)
    record = work.run_cell(job)
    assert (record.status, record.reason) == ("refused", "90 GiB planned, 80 GiB free; take qlora")
    assert sorted(path.name for path in job.folder.iterdir()) == ["cell.json"]


# ---------------------------------------------------------------- several at once


def test_cells_at_once_come_to_the_same_scores_and_their_times_are_not_compared(run, here):
    words = (*SMALL, "--methods", "base,full,lora", "--seeds", "1", "full:learning_rate=1e-3")
    alone = run("compare", *words, "-o", "alone", "--json").ok().json
    shown = run("compare", *words, "--at-once", "3", "-o", "beside", "--json").ok()
    beside = shown.json
    assert [cell["value"] for cell in alone["cells"]] == [cell["value"] for cell in beside["cells"]]
    assert alone["search"] == beside["search"]
    first, last = (shown.err.index(f"[{place}/3] ") for place in (1, 3))
    assert shown.err.count("] ", first, last) == 2, "the third cell begins before the first one ends"
    cell = cell_of(Path("beside"), "lora-seed42")
    assert (cell.at_once, cell.sharing) == (3, 2)
    assert "times" in " ".join(beside["notes"]) and "the speed" not in beside["verdict"]
    run("compare", *words, "-o", "beside").refused("at_once: 3 there, 1 asked for")


def test_several_cells_stop_together_and_go_on_together(run, here):
    words = (*SMALL, RATE, "--methods", "full,lora", "--seeds", "1", "--at-once", "2", "-o", "out")
    cells = Path("out/cells")
    asked = once(cells / "lora-seed42" / "recipe.yaml", lambda: os.kill(os.getpid(), signal.SIGTERM))
    run("compare", *words).refused("goes on with what is missing", code=143)
    asked.join()
    assert multiprocessing.active_children() == []
    run("compare", *words).ok()
    assert {cell_of(Path("out"), name).status for name in ("full-seed42", "lora-seed42")} == {"done"}


# ---------------------------------------------------------------- the search, the budget


def test_rates_are_searched_on_held_out_training_rows_and_not_again(run, here):
    words = (*SMALL, "--methods", "lora", "--seeds", "1", "-o", "out")
    report = run("compare", *words, "--json").ok().json
    search = json.loads(Path("out/search/search.json").read_text(encoding="utf-8"))["methods"]["lora"]
    finite = {one["learning_rate"]: one["value"] for one in search["tried"] if one["value"] is not None}
    assert search["chosen"] == min(finite, key=lambda rate: (finite[rate], rate)) and len(finite) >= 3
    trained = read_record(Path("out/cells/lora-seed42/record.json"), RunRecord)
    assert trained.recipe.train.learning_rate == search["chosen"] == report["cells"][0]["learning_rate"]
    tries = sorted(Path("out/search/lora").iterdir())
    assert {float(folder.name) for folder in tries} == set(finite)
    for folder in tries:
        record = read_record(folder / "record.json", RunRecord)
        data = record.recipe.data
        assert data.split == "train" and data.eval_split is None and data.eval_path is None and data.eval_fraction
        assert record.data is not None and (record.data.eval_rows, record.data.rows_shared_with_eval) == (200, 0)
        assert not list(folder.glob("eval-*")), "a try is never scored on the test rows"
        assert not (folder / "adapter").exists(), "its weights are not kept"
    before = stamps(Path("out/search"))
    run("compare", *words, "--json").ok()
    assert stamps(Path("out/search")) == before


def test_a_budget_is_kept_by_the_clock_where_no_times_are_planned(run, here):
    words = (*SMALL, RATE, "--methods", "base,lora", "-o", "out")
    run("compare", *words, "--seeds", "1").ok()
    shown = run("compare", *words, "--seeds", "2", "--budget-hours", "0.0001").ok()
    left = cell_of(Path("out"), "lora-seed43")
    assert left.status == "skipped" and "budget" in left.reason and "budget" in shown.out
    run("compare", *words, "--seeds", "2").ok()
    assert cell_of(Path("out"), "lora-seed43").status == "done"


# ---------------------------------------------------------------- wrong words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "base,lroa"], "did you mean lora"),
        (["--task", "imbd"], "did you mean imdb"),
        (["learning_rat=1"], "did you mean learning_rate"),
        (["max_length=64", "max_length=128"], "cannot stand in one table"),
        (["--budget-usd", "1"], "--gpu"),
        (["--budget-hours", "nan"], "--budget-hours nan"),
        (["--gpu", "h2000", "--budget-usd", "1"], "h2000"),
        (["--data", "rows.jsonl"], "--task"),
        (["--data", "rows.jsonl", "--task", "exact:complition"], "did you mean completion"),
        (["./nothing-here"], "nothing-here"),
    ],
)
def test_wrong_words_are_refused_and_leave_no_folder(run, here, words, said):
    (here / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    run("compare", *words, "--seeds", "1").refused(said)
    assert [path.name for path in here.iterdir()] == ["rows.jsonl"]


def test_a_folder_with_another_comparison_is_refused_and_untouched(run, here):
    run("compare", *SMALL, "--methods", "base", "-o", "out").ok()
    before = stamps(here)
    run("compare", *SMALL, "--methods", "base", "--task", "sums", "-o", "out").refused("another comparison", "sums")
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("mine")
    run("compare", *SMALL, "--methods", "base", "-o", "mine").refused("holds no comparison")
    assert {path: stamp for path, stamp in stamps(here).items() if "mine" not in path and ".lock" not in path} == {
        path: stamp for path, stamp in before.items() if ".lock" not in path
    }


def test_cells_of_other_questions_are_not_joined(run, here):
    run("compare", *SMALL, "--methods", "base", "-o", "one").ok()
    run("compare", "pocket", "--data", "sums", "--limit", "4", "--methods", "base", "-o", "sums").ok()
    run("report", "one", "sums").refused("task: reviews", "sums")
    path = Path("one/cells/base/cell.json")
    record = read_record(path, CellRecord)
    assert record.result is not None
    result = record.result.model_copy(update={"task": "sums"})
    other = record.model_copy(update={"result": result, "method": "lora", "variant": "lora", "seed": 42})
    write_record(Path("two/cells/lora-seed42/cell.json"), other)
    run("report", "one", "two").refused("task: reviews", "sums")
