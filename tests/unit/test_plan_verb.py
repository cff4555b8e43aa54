"""`thriftune plan`, `thriftune gpus`, and what `train` says of the plan before it starts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import runner
from thriftune.catalog.models import all_models
from thriftune.cli import _let_segments_grow
from thriftune.plan.values import PARTS
from thriftune.records import Plan, RunRecord, read_record
from tiny import tiny_model, tiny_rows

FIELDS_OF_THE_ISSUE = {
    *("method", "fits", "peak_bytes", "memory", "trainable_parameters", "total_parameters", "tokens_per_s", "step_s"),
    *("run_s", "cost_usd", "limited_by"),
}
HEAVY = ["torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy", "pyarrow"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return runner(monkeypatch, capsys)


@pytest.fixture
def base(tmp_path) -> Path:
    tiny_rows(tmp_path / "rows.jsonl", 12)
    return tiny_model(tmp_path / "model")


def test_json_has_the_fields_of_the_issue(run):
    content = run("plan", "llama-3-8b", "--gpu", "rtx-4090", "--gpu", "2xh200", "--json").ok().json
    assert [(found["gpu"], found["gpus"]) for found in content["gpus"]] == [("rtx-4090", 1), ("h200", 2)]
    for found in content["gpus"]:
        beside = ["lora-fp8", *(["dynamic", "qlora-offload"] if found["gpus"] == 1 else [])]
        assert [method["method"] for method in found["methods"]] == ["full", "lora", "qlora", *beside]
        assert [method["beside"] for method in found["methods"]] == [False] * 3 + [True] * len(beside)
        assert {"method", "reasons", "command"} == set(found["recommended"])
        for method in found["methods"]:
            assert set(method) >= FIELDS_OF_THE_ISSUE
            assert list(method["memory"]) == list(PARTS) and sum(method["memory"].values()) == method["peak_bytes"]
        assert [method["path"] for method in found["methods"]] == ["generic"] + ["engine"] * (2 + len(beside))
        lora = found["methods"][1]["settings"]
        assert lora["gradient_checkpointing"] == "auto" and lora["tokens_at_once"] <= 16 * 1024
        assert lora["recomputes"] == (lora["layers_keep"] != "everything")
    assert content["gpus"][0]["methods"][1]["trainable_parameters"] == 41_943_040
    Plan.model_validate(content)


def test_a_line_of_8_bit_products_where_a_gpu_has_them_and_never_as_the_recommendation(run):
    content = run("plan", "llama-3-8b", "--gpu", "h200", "--gpu", "a100-80gb", "--json").ok().json
    with_fp8, without = content["gpus"]
    lora, eight = with_fp8["methods"][1], with_fp8["methods"][3]
    assert eight["method"] == "lora-fp8" and eight["tokens_per_s"] > 1.2 * lora["tokens_per_s"]
    assert eight["memory"]["weights"] > 1.8 * lora["memory"]["weights"]  # both layouts beside the 16-bit weights
    assert with_fp8["recommended"]["method"] == "lora"
    assert [method["method"] for method in without["methods"]] == [
        *("full", "lora", "qlora", "dynamic", "qlora-offload")
    ]
    asked = run("plan", "llama-3-8b", "--gpu", "h200", "precision=fp8", "--method", "lora", "--json").ok().json
    assert asked["gpus"][0]["methods"][0]["step_s"] == eight["step_s"]
    assert "precision=fp8" in asked["gpus"][0]["recommended"]["command"]
    refused = run("plan", "llama-3-8b", "--gpu", "a100-80gb", "precision=fp8", "--method", "lora", "--json").ok().json
    (lora,) = refused["gpus"][0]["methods"]
    assert not lora["fits"] and "is refused with precision=fp8" in lora["notes"][0]
    assert refused["gpus"][0]["recommended"]["command"] is None


def test_the_text_and_the_article(run):
    text = run("plan", "meta-llama/Llama-3.1-70B", "offload=off", "--gpu", "rtx-4090").ok().out
    assert "not weights" in text and "recommended: nothing here" in text
    assert re.search(r"(?m)^ +qlora +no, \S+ GiB +\S+ GiB +- +- +- +- +-$", text), (
        "no time and money for what cannot run"
    )
    article = run("plan", "llama-3-8b", "--gpu", "h200", "--article").ok().out
    assert "full" in article and "LoRA" in article and "QLoRA" in article and "41,943,040" in article
    for printed in (text, article):
        assert max(map(len, printed.splitlines())) <= 100


def test_one_method_is_the_recipes_so_that_its_options_can_be_planned(run):
    words = ("plan", "llama-3-8b", "--gpu", "rtx-4090", "offload={resident_layers: 2}", "--method")
    (method,) = run(*words, "qlora", "--json").ok().json["gpus"][0]["methods"]
    assert (method["settings"]["layers_resident"], method["settings"]["layers_streamed"]) == (2, 30)
    run(*words, "lora").refused("use method qlora")


def test_options_of_train_and_methods_and_counts(run):
    words = ("lora_r=64", "max_length=8192", "per_device_train_batch_size=4")
    content = run("plan", "llama3 8b", *words, "--gpu", "h200", "--method", "lora,qlora", "--json").ok().json
    methods = content["gpus"][0]["methods"]
    assert [method["method"] for method in methods] == ["lora", "qlora"]
    assert methods[0]["trainable_parameters"] == 4 * 41_943_040
    assert methods[0]["settings"]["max_length"] == 8192
    named = run("plan", "llama-3-8b", "--gpu", "h200", "--method", "full,lora,qlora", "--json").ok().json
    assert [method["method"] for method in named["gpus"][0]["methods"]] == ["full", "lora", "qlora"]
    twice = run("plan", "llama-3-8b", "--gpu", "h200", "--method", "full", "--method", "lora", "--gpus", "2", "--json")
    assert [method["method"] for method in twice.ok().json["gpus"][0]["methods"]] == ["full", "lora"]


def test_the_command_it_prints_is_one_that_train_takes(run, base):
    content = run("plan", base, "--data", "rows.jsonl", "--gpu", "h200", "--json", "max_steps=2").ok().json
    words = content["gpus"][0]["recommended"]["command"].split()
    assert words[:2] == ["thriftune", "train"]
    assert "max_steps: 2" in run(*words[1:], "--dry-run").ok().out


def test_what_training_would_refuse_is_not_planned_as_fitting(run):
    asked = run("plan", "llama-3-8b", "--gpu", "2xh200", "--method", "dynamic", "--json").ok().json["gpus"][0]
    assert not asked["methods"][0]["fits"] and asked["recommended"]["command"] is None
    assert asked["methods"][0]["notes"] == ["is refused on several GPUs: it runs in one process"]
    for words in (["--gpu", "2xh200"], ["--gpu", "h200", "lora.use_dora=true"]):
        usual = run("plan", "llama-3-8b", *words, "--json").ok().json["gpus"][0]
        assert "dynamic" not in [method["method"] for method in usual["methods"]]


def test_rows_that_max_samples_leaves_are_those_that_are_planned(run):
    planned = run("plan", "llama-3-8b", "--gpu", "h200", "max_samples=100", "--json").ok().json
    assert planned["tokens"] == 100 * 1024


def test_large_sums_have_no_exponents(run):
    shown = run("plan", "llama-3-8b", "--gpu", "h200", "num_train_epochs=5000", "--prefer", "cost").ok().out
    assert "$" in shown and "e+" not in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["llama-3-8b", "--gpu", "rtx-9999"], "thriftune gpus"),
        (["lama-3-8b", "--gpu", "h200"], "did you mean"),
        (["llama3", "8b", "--gpu", "h200"], "put a name that has spaces into quotes"),
        (["llama-3-8b", "--gpu", "h200", "--gpus", "0"], "0 GPUs"),
        (["llama-3-8b", "--gpu", "h200", "--prefer", "fast"], "balanced"),
        (["llama-3-8b", "--gpu", "h200", "--method", "lorra"], "full, lora, qlora"),
        (["llama-3-8b", "--gpu", "h200", "max_length=0"], "max_length"),
        (["llama-3-8b", "--gpu", "h200", "per_device_train_batch_size=-1"], "per_device_train_batch_size"),
        (["llama-3-8b", "--gpu", "h200", "--data", "nope.jsonl"], "nope.jsonl"),
        (["llama-3-8b", "--gpu", "h200", "target_modules=nope"], "nope"),
    ],
)
def test_wrong_words_exit_2(run, monkeypatch, words, says):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    run("plan", *words).refused(says)


def test_the_list_of_gpus(run):
    assert "rtx-4090" in run("gpus").ok().out
    rows = run("gpus", "--json").ok().json["gpus"]
    assert {"gpu", "memory_bytes", "usd_per_hour", "provider", "price_date"} <= set(rows[0]) and len(rows) > 30
    priced = {row["gpu"]: row for row in rows if row["usd_per_hour"] is not None}
    assert all(row["min_gpus"] >= 1 for row in priced.values())
    assert priced["h200"]["min_gpus"] == 1 and "spot" not in priced["h200"]["provider"]


SCRIPT = (
    "import sys; from thriftune.cli import main\n"
    "sys.argv = ['thriftune', 'plan', sys.argv[1], '--gpu', 'rtx-4090']\n"
    "try: main()\nexcept SystemExit: pass\n"
    f"print(*sorted(set({HEAVY}) & sys.modules.keys()), file=sys.stderr)"
)


def cold_start_s(model: str, folder: Path) -> float:
    """Of the processor, the best of six: what a process of one thread takes by the clock where it is alone. On a busy
    machine it would wait for the others. The first start writes the bytecode that an installed package has."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"HF_HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "PYTHONPYCACHEPREFIX": str(folder / "pyc")}
    best = 99.0
    for _ in range(6):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, model], capture_output=True, text=True, env=environment, check=True
        )
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, spent)
        assert done.stderr.strip() == "" and "recommended: " in done.stdout
        if best < 1:
            break
    return best


def test_a_cold_start_takes_less_than_a_second_and_loads_no_torch_for_every_model(run, tmp_path, record_property):
    """The models that take longest once everything is loaded are started cold; the others take less."""
    spent = {}
    for model in all_models():
        started = time.process_time()
        assert "recommended: " in run("plan", model.name, "--gpu", "rtx-4090").ok().out
        spent[model.name] = time.process_time() - started
    slowest = sorted(spent, key=lambda name: -spent[name])[:3]
    for name in ("llama-3-8b", *slowest):
        best = cold_start_s(name, tmp_path)
        record_property(name, best)
        assert best < 1, name


# ---------------------------------------------------------------- measured on this machine


def test_measured_times_take_the_place_of_estimates(run, base):
    outcome = run("plan", base, "--data", "rows.jsonl", "--measure", "--json", "lora_r=4", "max_steps=5").ok()
    (found,) = outcome.json["gpus"]
    assert found["gpu"] == "cpu" and "planned for this computer's CPU" in " ".join(outcome.json["notes"])
    for method in found["methods"]:
        assert method["step_s"] > 0 and method["run_s"] == pytest.approx(5 * method["step_s"])
        assert method["tokens_per_s"] == pytest.approx(outcome.json["tokens"] / method["run_s"], rel=0.2)
        assert "was measured on this machine: all 2 layers timed" in method["notes"][-1]
        assert f"measuring {method['method']} on cpu" in outcome.err
    assert "a step, by all 2 layers; measuring took" in outcome.err
    text = run("plan", base, "--method", "lora", "--measure", "--gpu", "cpu", "max_length=32").ok().out
    assert "lora was measured on this machine" in text and "not estimated for CPUs" not in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu", "h200"], "--measure with --gpu h200"),
        (["--gpu", "local", "--gpu", "h200"], "--gpu local --gpu h200"),
        (["--gpu", "rtx-9999"], "thriftune gpus"),
        (["--gpu", "cpu", "--gpu", "cpu"], "--gpu cpu --gpu cpu"),
        (["--gpus", "2"], "2 GPUs to measure on; this machine has 0"),
        (["--gpu", "2xlocal"], "2 GPUs to measure on; this machine has 0"),
        (["--gpus", "0"], "0 GPUs"),
        (["--method", "lorra"], "full, lora, qlora"),
    ],
)
def test_only_this_machine_is_measured(run, words, says):
    run("plan", "pocket", "--measure", *words).refused(says)


def test_what_cannot_be_measured_says_so_and_the_plan_is_made(run, base, tmp_path, monkeypatch):
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    outcome = run("plan", "./odd", "--measure", "--method", "lora", "--json", "max_length=32").ok()
    (method,) = outcome.json["gpus"][0]["methods"]
    assert method["step_s"] == 0 and method["fits"] and "not measured" in outcome.err
    assert method["notes"][-1].startswith("was not measured: transformers builds no causal language model")
    monkeypatch.setattr("thriftune.planning.devices.machine_memory", lambda: (1000, 1000))
    content = run("plan", base, "--measure", "--json", "max_length=32").ok().json
    for method in content["gpus"][0]["methods"]:
        assert not method["fits"] and method["notes"][-1] == "was not measured, because it does not fit"


# ---------------------------------------------------------------- train


@pytest.mark.parametrize(("engine", "path"), [("auto", "engine"), ("off", "generic")])
def test_train_prints_three_lines_and_keeps_the_plan_beside_the_measurement(run, base, tmp_path, engine, path):
    outcome = run("train", base, "--data", "rows.jsonl", "max_steps=1", f"engine={engine}", "-o", "out").ok()
    lines = [line for line in outcome.err.splitlines() if line.startswith("plan: ")]
    assert len(lines) == 3 and "peak" in lines[0] and "not estimated for CPUs" in lines[1]
    assert "lora" in lines[2]
    record = read_record(tmp_path / "out" / "record.json", RunRecord)
    plan = read_record(tmp_path / "out" / "plan.json", Plan)
    assert record.plan == plan.gpus[0].methods[0] and record.reserved_bytes == 0
    assert record.path == record.plan.path == path
    assert ("layers keep everything" in lines[2]) == (path == "engine")
    assert record.plan.trainable_parameters == record.trainable_parameters
    assert record.plan.total_parameters == record.total_parameters
    assert plan.steps == record.steps == 1


def test_train_refuses_what_cannot_fit_unless_forced(run, base, tmp_path, monkeypatch):
    for place in ("run", "devices"):
        monkeypatch.setattr(f"thriftune.planning.{place}.machine_memory", lambda: (1000, 1000))
    words = ("train", base, "--data", "rows.jsonl", "max_steps=1", "-o", "out")
    for method in ("lora", "full", "auto"):
        run(*words, "--method", method).refused("1000 B free", "--force", code=3)
        assert not (tmp_path / "out").exists()
    forced = run(*words, "--method", "lora", "--force").ok()
    assert "DOES NOT FIT" in forced.err and "done: lora, 1 steps" in forced.out
    assert not read_record(tmp_path / "out" / "record.json", RunRecord).plan.fits


def test_a_refusal_before_the_first_step_leaves_no_plan_behind(run, base, tmp_path):
    run("train", base, "--data", "rows.jsonl", "optim=adamw_8bit", "-o", "out", "--method", "lora").refused("on cpu")
    assert not (tmp_path / "out").exists()


def test_memory_segments_may_grow_unless_the_user_chose(monkeypatch):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    _let_segments_grow()
    assert [os.environ.pop(name) for name in names] == ["expandable_segments:True"] * 2
    monkeypatch.setenv(names[1], "max_split_size_mb:64")
    _let_segments_grow()
    assert names[0] not in os.environ and os.environ[names[1]] == "max_split_size_mb:64"


def test_json_is_one_object_on_one_line(run):
    assert json.loads(run("plan", "pocket", "--gpu", "t4", "--json").ok().out)["model"] == "pocket"
