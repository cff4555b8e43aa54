"""The verbs: what they print and where, how they end, what they write and what they leave alone."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import Outcome, runner
from small_models import make_model
from thriftune import __version__
from thriftune.recipe import read_recipe
from thriftune.records import RunRecord, read_record
from thriftune.train.observe import read_metrics
from tiny import tiny_rows

VERBS = [
    *("train", "plan", "gpus", "eval", "chat", "predict", "merge", "shrink", "compare", "report", "federate", "demo"),
    "doctor",
]
RECORD_KEYS = {
    *("method", "path", "trainable_parameters", "total_parameters", "steps", "loss", "tokens", "tokens_per_s"),
    *("peak_bytes", "wall_s", "adapter"),
}
HEAVY = ["torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy", "pyarrow"]


@pytest.fixture
def run(monkeypatch, capsys):
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder with twelve rows in it."""
    monkeypatch.chdir(tmp_path)
    tiny_rows(tmp_path / "rows.jsonl", 12)
    return tmp_path


@pytest.fixture
def train(run, base, here):
    def of(*words: object, method: str = "lora") -> Outcome:
        return run("train", base, "--data", "rows.jsonl", "--method", method, "max_steps=2", "lora_r=4", *words)

    return of


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---------------------------------------------------------------- help


def test_help_is_instant(record_property):
    """Each under half a second of processor time, the best of three: on an idle machine that is the time one waits."""
    for verb in [[], *([verb] for verb in VERBS)]:
        best = 9.0
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-m", "thriftune", *verb, "--help"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            if best < 0.5:
                break
        record_property(" ".join(["thriftune", *verb, "--help"]), best)
        assert best < 0.5, verb
        assert "Usage" in done.stdout and "Traceback" not in done.stderr


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom thriftune.cli import app\n"
        f"for verb in {VERBS}:\n"
        "    done = CliRunner().invoke(app, [verb, '--help'])\n"
        "    assert done.exit_code == 0, done.output\n"
        f"print(sorted(set({HEAVY}) & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_list_of_verbs_is_this(run):
    out = run("--help").ok().out
    assert all(f" {verb} " in out for verb in VERBS)


def test_the_version_is_printed(run):
    assert run("--version").ok().out == f"thriftune {__version__}\n"


@pytest.mark.parametrize(
    "words", [["nope"], ["train", "--nope"], ["predict"], ["merge", "x"], ["eval", "--limit", "0"]]
)
def test_a_line_that_cannot_be_read_exits_2(run, words):
    done = run(*words)
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err


# ---------------------------------------------------------------- train


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_train_prints_one_object_and_leaves_a_run(run, base, here, method):
    words = ["max_steps=2", "report_to=none", "--json", "-o", "out"]
    done = run("train", base, "--data", "rows.jsonl", "--method", method, *words).ok()
    record = done.json
    assert record.keys() >= RECORD_KEYS
    assert (record["status"], record["method"], record["steps"]) == ("done", method, 2)
    assert record["path"] == ("generic" if method == "full" else "engine")
    assert record["loss"] > 0 and record["tokens"] > 0 and record["tokens_per_s"] > 0
    assert record["peak_bytes"] > 10**7 and 0 < record["wall_s"] < 60
    assert record["total_parameters"] == 115_008
    assert record["trainable_parameters"] == (115_008 if method == "full" else 16 * 2048)
    assert Path(record["adapter"]).is_dir() and Path(record["adapter"]).name == (
        "model" if method == "full" else "adapter"
    )
    assert json.loads((here / "out" / "record.json").read_text()) == record
    assert read_record(here / "out" / "record.json", RunRecord).command.startswith("thriftune train")
    assert len(read_metrics(here / "out" / "metrics.jsonl")) == 2
    assert read_recipe(here / "out" / "recipe.yaml").method == method
    assert "step 2/2" in done.err and "first row" in done.err


def test_without_json_a_person_is_told_what_to_do_next(train):
    done = train("-o", "out").ok()
    assert (
        done.out.startswith("done: lora, 2 steps, loss ") and "trained 8,192 of 115,008 parameters (7.1 %)" in done.out
    )
    assert "result: out/adapter" in done.out and "try it: thriftune chat out" in done.out
    assert "{" not in done.out


def test_a_recipe_is_read_and_the_line_goes_before_it(run, base, here):
    (here / "mine.yaml").write_text(f"model: {base}\ndata: rows.jsonl\nmethod: lora\nmax_steps: 7\nlora_r: 2\n")
    record = run("train", "--config", "mine.yaml", "max_steps=1", "-o", "out", "--json").ok().json
    assert record["steps"] == 1 and record["recipe"]["lora"]["r"] == 2


def test_the_recipe_of_a_run_repeats_it(train, run, here):
    first = train("-o", "one", "--json").ok().json
    second = run("train", "--config", "one/recipe.yaml", "-o", "two", "--json").ok().json
    assert second["loss"] == first["loss"]
    weights = [load_file(here / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_finished_run_is_not_written_over(train, here):
    train("-o", "out").ok()
    before = {name: (here / "out" / name).stat().st_mtime_ns for name in names(here / "out")}
    for words in ([], ["report_to=tensorboard"], ["--json"]):
        train("-o", "out", *words).refused("out already holds a run", "resume_from_checkpoint=auto")
    assert {name: (here / "out" / name).stat().st_mtime_ns for name in names(here / "out")} == before


def test_outputs_that_are_not_named_are_numbered(train, here):
    for expected in ("runs/model-rows-lora", "runs/model-rows-lora-2", "runs/model-rows-lora-3"):
        assert train("--json").ok().json["recipe"]["output"] == expected
    assert train("method=qlora", "--json", "--dry-run").ok().json["recipe"]["output"] == "runs/model-rows-qlora"
    resumed = train("resume_from_checkpoint=auto", "--json", "--dry-run").ok().json
    assert resumed["recipe"]["output"] == "runs/model-rows-lora-3"
    assert sorted(path.name for path in (here / "runs").iterdir()) == [
        *("model-rows-lora", "model-rows-lora-2", "model-rows-lora-3")
    ]


@pytest.mark.parametrize("words", [[], ["--json"], ["report_to=tensorboard"], ["-o", "out"], ["-o", "/nope/out"]])
def test_a_dry_run_writes_nothing_and_loads_no_weights(train, here, monkeypatch, words):
    def loaded(*arguments, **named):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    monkeypatch.setattr("thriftune.run_path.load_model", loaded)
    before = names(here)
    done = train("--dry-run", *words).ok()
    assert names(here) == before
    assert "12 rows" in done.err and "method lora (asked for)" in done.err
    if "--json" in words:
        assert done.json.keys() == {"recipe", "data", "total_parameters"}
        assert done.json["total_parameters"] == 115_008 and done.json["data"]["rows_used"] == 12
    else:
        (here / "again.yaml").write_text(done.out)
        assert read_recipe(here / "again.yaml").lora.r == 4, "what is printed is a recipe"


@pytest.mark.parametrize("output", ["a b", "[bold]", "[/red]", "ä", "{x}", "100%", "-"])
def test_odd_names_of_outputs_are_only_names(train, here, output):
    done = train("-o", output).ok()
    assert (here / output / "record.json").exists() and f"output {output}" in done.err


def test_a_long_value_is_no_file_name(train):
    pattern = "|".join(f"layer_{number}_proj" for number in range(50))
    train(f"target_modules=.*({pattern})", "-o", "out").refused("matches no module of this model")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["another-model"], "2 words that are no KEY=VALUE"),
        (["lerning_rate=1"], "did you mean"),
        (["learning_rate=fast", "seed=-1", "method=loora"], "has 3 problems"),
        (["target_modules=q_proj,vproj"], "did you mean v_proj?"),
        (["optim=adamw_8bit"], "adamw_8bit on cpu"),
        (["--data", "nope.jsonl"], "nope.jsonl"),
        (["--config", "nope.yaml"], "nope.yaml does not exist"),
        (["max_length=300", "--data", "long.jsonl"], "data.max_length up to 256"),
        (["report_to=wandb"], "wandb is not installed"),
        (["report_to=tensorboard,wandb"], "wandb is not installed"),
        (["-o", "rows.jsonl"], "rows.jsonl"),
        (["-o", "rows.jsonl/x"], "cannot be written"),
        (["resume_from_checkpoint=nope", "-o", "out"], "checkpoint nope does not exist"),
    ],
    ids=str,
)
def test_input_that_is_wrong_exits_2_and_leaves_nothing(train, here, words, says):
    (here / "long.jsonl").write_text(json.dumps({"prompt": "x" * 250, "completion": "y" * 40}) + "\n")
    before = names(here)
    train(*words).refused(says)
    assert names(here) == before


def test_too_little_memory_exits_3(run, base, here, monkeypatch):
    monkeypatch.setattr("thriftune.planning.run.machine_memory", lambda: (1000, 1000))
    monkeypatch.setattr("thriftune.planning.devices.machine_memory", lambda: (1000, 1000))
    # On a CPU the engine has all 4-bit layers unpacked beside the packed ones: lora is the smaller.
    run("train", base, "--data", "rows.jsonl", "-o", "out").refused("even with lora", "1000 B free", code=3)
    assert not (here / "out").exists()


def test_a_loss_that_is_no_number_exits_4(run, here):
    model = make_model(here / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    message = run("train", model, "--data", "rows.jsonl", "--method", "lora", "-o", "out").refused(code=4)
    assert "step 1: loss nan" in message and "rows.jsonl row" in message
    assert read_record(here / "out" / "record.json", RunRecord).status == "failed"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits_with_its_code(train, here, monkeypatch, number, code):
    from thriftune.console import ProgressLine

    step = ProgressLine.step

    def interrupted(self, metrics):
        step(self, metrics)
        if metrics.step == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(ProgressLine, "step", interrupted)
    message = train("-o", "out", "max_steps=5").refused(number.name, code=code)
    assert message.startswith("stopped: ") and "thriftune train --config out/recipe.yaml" in message
    assert read_record(here / "out" / "record.json", RunRecord).status == "interrupted"
    monkeypatch.setattr(ProgressLine, "step", step)
    assert "resumed from out/checkpoint-" in train("-o", "out", "max_steps=5", "resume_from_checkpoint=auto").ok().err


def test_an_error_of_ours_is_not_swallowed(train, monkeypatch):
    def broken(*arguments, **named):
        raise AssertionError("a bug")

    monkeypatch.setattr("thriftune.run_path.load_model", broken)
    with pytest.raises(AssertionError, match="a bug"):
        train("-o", "out")


def test_tensorboard_gets_the_numbers(train, here):
    train("report_to=tensorboard", "-o", "out").ok()
    content = b"".join(path.read_bytes() for path in (here / "out").rglob("events.out.tfevents*"))
    assert all(f"train/{name}".encode() in content for name in ("loss", "grad_norm", "learning_rate", "tokens_per_s"))


SILENT = """
import json, os, socket, sys
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CI"):
    os.environ.pop(name, None)
calls = []
def refuse(where):
    def call(*arguments, **named):
        calls.append([where, repr(arguments[-1])])
        raise OSError("no network in this test")
    return call
socket.socket.connect = refuse("connect")
socket.socket.connect_ex = refuse("connect_ex")
socket.socket.sendto = refuse("sendto")
socket.create_connection = refuse("create_connection")
socket.getaddrinfo = refuse("getaddrinfo")
from thriftune.cli import main
codes = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["thriftune", *words]
    try:
        main()
    except SystemExit as end:
        codes.append(end.code)
import threading, time
time.sleep(0.3)  # a thread that phones home has had its chance
print(json.dumps({"calls": calls, "codes": codes}))
"""


def test_nothing_phones_home(base, here):
    """A child without any of the switches that keep libraries quiet, whose sockets refuse and tell."""
    common = [str(base), "--data", "rows.jsonl", "max_steps=1"]
    lines = [
        ["train", *common, "--method", "qlora", "-o", "out", "report_to=tensorboard"],
        ["predict", "--input", "rows.jsonl", "out", "max_new_tokens=2", "-o", "answers.jsonl"],
        ["eval", "out", "--task", "reviews", "--limit", "2", "max_new_tokens=2", "max_length=200"],
        ["merge", "out", "-o", "merged"],
    ]
    environment = {**os.environ, "HF_HOME": str(here / "cache"), "HF_HUB_OFFLINE": ""}
    done = subprocess.run(
        [sys.executable, "-c", SILENT, json.dumps(lines)], env=environment, cwd=here, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["codes"] == [0, 0, 0, 0], done.stderr
    assert told["calls"] == []


# ---------------------------------------------------------------- using what was trained


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory) -> Path:
    from tiny import tiny_recipe, train_tiny

    root = tmp_path_factory.mktemp("tuned")
    train_tiny(tiny_recipe(base, tiny_rows(root / "rows.jsonl", 12), root / "run", train={"max_steps": 2}))
    return root / "run"


def test_shrink_says_what_it_did(run, tuned, here):
    record = run("shrink", tuned, "--keep", "0.5", "--round-to", "1", "-o", "smaller", "--json").ok().json
    assert record.keys() == {
        *("shrunk", "adapter", "parameters_before", "parameters_after", "kept_energy", "ranks"),
    }
    assert 0 < record["parameters_after"] <= record["parameters_before"] / 2
    out = run("shrink", tuned, "--keep", "0.5", "--round-to", "1", "-o", "again").ok().out
    assert out.startswith("shrank ") and "of the update's energy stays" in out
    run("shrink", tuned, "--keep", "0.5", "-o", "smaller").refused("exists and is not empty")
    run("eval", "smaller", "--task", "reviews", "--limit", "2", "--json").ok()


def test_merge_says_what_it_did(run, tuned, here):
    record = run("merge", tuned, "-o", "merged", "--json").ok().json
    told = "merged base adapter dtype difference effect max_abs_difference same_token positions"
    assert record.keys() == {*told.split(), "tensors", "kept", "rounding", "loaded_whole"}
    assert record["merged"] == "merged" and record["difference"] < 1e-5 < record["effect"]
    assert record["loaded_whole"] is None and record["tensors"] > 0 and record["kept"] == pytest.approx(1, abs=0.01)
    out = run("merge", tuned, "-o", "again").ok().out
    assert out.startswith("merged ") and "merged and adapter differ by 0.00%" in out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("thriftune.merging.available_bytes", lambda: 10**6)
        out = run("merge", tuned, "-o", "tight").ok().out
    assert "does not fit in memory, so no logits were compared; 100.00% of the update is in the" in out
    run("merge", tuned, "-o", "merged").refused("exists and is not empty")
    run("merge", "merged", "-o", "twice").refused("has no adapter to merge")
    run("merge", "nowhere", "-o", "twice").refused("nowhere is no folder here", "correct the path")
    run("shrink", "nowhere", "--keep", "0.5", "-o", "twice").refused("nowhere is no folder here")
    run("eval", "merged", "--task", "reviews", "--limit", "2", "--json").ok()


def test_eval_prints_one_object_and_keeps_answers(run, tuned, base, here):
    for target in (tuned, base):
        result = run("eval", target, "--task", "sums", "--limit", "3", "max_new_tokens=4", "--json").ok().json
        assert result.keys() >= {"task", "metric", "value", "low", "high", "rows"}
        assert (
            result["task"] == "sums"
            and result["rows"] == 3
            and 0 <= result["low"] <= result["value"] <= result["high"] <= 1
        )
        assert len(Path(result["answers"]).read_text().splitlines()) == 3
    assert (tuned / "eval-sums-3.json").exists()
    run("eval", tuned, "--task", "sums", "--limit", "2", "--answers", "mine.jsonl").ok()
    assert len((here / "mine.jsonl").read_text().splitlines()) == 2


def test_eval_for_a_person(run, tuned, here):
    out = run("eval", tuned, "--task", "reviews", "--limit", "3").ok().out
    assert out.startswith("reviews: ") and "95 % interval" in out and "3 rows" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--task", "nope"], "nope"), (["nope=1"], "unknown key"), (["--split", "nope"], "nope"),
     (["--task", "perplexity", "--data", "nope.txt"], "nope.txt")],
    ids=str,
)  # fmt: skip
def test_eval_refuses(run, tuned, here, words, says):
    run("eval", tuned, *words).refused(says)


def test_predict_answers_every_row_in_order(run, tuned, here):
    run("predict", "--input", "rows.jsonl", tuned, "max_new_tokens=3", "-o", "answers.jsonl").ok()
    asked = [json.loads(line) for line in (here / "rows.jsonl").read_text().splitlines()]
    answered = [json.loads(line) for line in (here / "answers.jsonl").read_text().splitlines()]
    assert [
        {**row, "prediction": answer["prediction"]} for row, answer in zip(asked, answered, strict=True)
    ] == answered
    assert all(isinstance(answer["prediction"], str) for answer in answered)
    printed = run("predict", "--input", "rows.jsonl", tuned, "max_new_tokens=3").ok()
    assert printed.out == (here / "answers.jsonl").read_text() and "12 rows answered" in printed.err
    (here / "questions.jsonl").write_text('{"prompt": "what?"}\n')
    assert "prediction" in run("predict", "--input", "questions.jsonl", tuned, "max_new_tokens=3").ok().json


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--input", "nope.jsonl"], "nope.jsonl"), (["--input", "bad.jsonl"], "bad.jsonl row 2"),
     (["--input", "rows.jsonl", "-o", "rows.jsonl/x"], "cannot be written"),
     (["--input", "rows.jsonl", "max_new_tokens=0"], "max_new_tokens"),
     (["--input", "rows.jsonl", "max_new_tokens=255"], "256 positions")],
    ids=str,
)  # fmt: skip
def test_predict_refuses_and_leaves_nothing(run, tuned, here, words, says):
    (here / "bad.jsonl").write_text('{"prompt": "what?"}\n{"promt": "what?"}\n')
    before = names(here)
    output = [] if "-o" in words else ["-o", "answers.jsonl"]
    run("predict", tuned, "max_new_tokens=3", *words, *output).refused(says)
    assert names(here) == before


def test_chat_answers_until_the_end_of_input(run, tuned, here, monkeypatch):
    import io

    for text in ("hello\n/exit\nnot this\n", "hello\n", ""):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        out = run("chat", tuned, "max_new_tokens=3").ok().out
        assert "/reset" in out


@pytest.mark.parametrize(
    "verb", [["eval"], ["chat"], ["merge", "-o", "x"], ["predict", "--input", "rows.jsonl"]], ids=str
)
@pytest.mark.parametrize("target", ["../..", "nope/nope/nope", "~nobody-here", "x" * 300, "unfinished"])
def test_targets_that_are_not_there_exit_2(run, here, verb, target):
    (here / "unfinished").mkdir()
    (here / "unfinished" / "recipe.yaml").write_text("method: lora\n")
    before = names(here)
    run(verb[0], target, *verb[1:]).refused()
    assert names(here) == before


def test_doctor_speaks_to_persons_and_programs(run, here):
    findings = run("doctor", "--json").ok().json["findings"]
    assert {"packages", "processor", "NF4", "hub"} <= {finding["subject"] for finding in findings}
    out = run("doctor").ok().out
    assert all(f"{finding['subject']}: " in out for finding in findings)
    assert names(here) == {"rows.jsonl"}


def test_a_reader_that_goes_away_is_no_error(base, here):
    """`thriftune ... | head -1`: no traceback."""
    line = f"{sys.executable} -m thriftune train --help | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
