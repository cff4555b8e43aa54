"""Finding what a plan is made of: the model by its name, the rows of the data, the GPUs; and refusals."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from thriftune.catalog.gpus import built_in_gpus
from thriftune.catalog.models import all_models
from thriftune.errors import DataError, DoesNotFitError, InputError, ModelError
from thriftune.plan.search import Device
from thriftune.plan.work import Rows, assumed_rows
from thriftune.planning import cpu_device, own_gpu, plan_run, plan_words, unknown_gpu
from thriftune.planning.devices import DEFAULT_GPUS, find_devices, machine_memory, read_market, split_count
from thriftune.planning.model import find_planned_model
from thriftune.recipe import ModelRecipe, Recipe, read_recipe
from thriftune.records import Plan
from thriftune.run import run_place
from thriftune.units import GIB, MIB
from tiny import tiny_model, tiny_rows

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
POCKET = Path(__file__).resolve().parents[2] / "src" / "thriftune" / "pocket"


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path) -> Path:
    """No hub, an empty cache, no rows of the user's own, no GPU."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("THRIFTUNE_CONFIG_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "own").mkdir()
    return tmp_path


def folder_with(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def cached(home: Path, name: str, commit: str, **changes: object) -> Path:
    place = home / "hf" / "hub" / f"models--{name.replace('/', '--')}"
    return folder_with(place / "snapshots" / commit, **changes)


def point_main_to(home: Path, name: str, commit: str) -> None:
    reference = home / "hf" / "hub" / f"models--{name.replace('/', '--')}" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text(commit)


def found(name: object, **options: object):
    return find_planned_model(ModelRecipe(name=str(name), **options))


def plan(
    *words: str, gpu: tuple[str, ...] = ("rtx-4090",), gpus=None, methods=(), prefer="balanced", **options
) -> Plan:
    values = {"model": "llama-3-8b", **options}
    return plan_words(read_recipe(None, words, values), gpu_names=gpu, gpus=gpus, methods=methods, prefer=prefer)


# ---------------------------------------------------------------- the model


def test_a_folder_goes_before_everything(nowhere, monkeypatch):
    folder_with(nowhere / "llama-3-8b")
    monkeypatch.chdir(nowhere)
    model = found("llama-3-8b")
    assert model.shape.hidden_size == 64 and model.name == "llama-3-8b" and "config.json" in model.source


def test_the_cache_goes_before_the_catalogue_and_refs_main_is_respected(nowhere):
    name = "meta-llama/Meta-Llama-3-8B"
    assert found(name).shape.hidden_size == 4096
    cached(nowhere, name, "aaa", hidden_size=128)
    assert found(name).shape.hidden_size == 128
    cached(nowhere, name, "bbb", hidden_size=256)
    point_main_to(nowhere, name, "aaa")
    assert found(name).shape.hidden_size == 128 and "cache" in found(name).source
    assert found(name, revision="bbb").shape.hidden_size == 256


@pytest.mark.parametrize("name", ["llama3 8b", "Llama-3-8B", "LLAMA 3 8B Instruct", "meta-llama/Meta-Llama-3-8B"])
def test_catalogue_names_in_any_spelling_become_the_hubs(name):
    model = found(name)
    assert model.name == "meta-llama/Meta-Llama-3-8B" and model.shape.total_parameters == 8_030_261_248
    assert "catalogue" in model.source and model.folder is None


@pytest.mark.parametrize("row", all_models(), ids=lambda row: row.name)
def test_every_model_of_the_catalogue_is_found_by_its_name(row):
    model = found(row.name)
    assert model.name == (row.hub_ids[0] if row.hub_ids else row.name)
    assert model.config is row.config and "catalogue" in model.source
    assert bool(model.notes) == (not row.hub_ids)


def test_the_pocket_model_is_planned_from_the_package():
    model = found("pocket")
    assert model.folder == POCKET and model.shape.total_parameters == 3_410_176 and not model.notes


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lama-3-8b", "did you mean Llama-3-8B"),
        ("no/such-model-of-mine", "the hub cannot be reached"),
        ("./nope", "nope"),
        ("a b c d", "no hub id"),
    ],
)
def test_unknown_models_are_refused_within_3_s(name, says):
    started = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        found(name)
    assert says in str(caught.value) and time.perf_counter() - started < 3


def test_what_is_missing_or_wrong_in_a_config_is_named(nowhere):
    folder = folder_with(nowhere / "m", hidden_size="absent", num_hidden_layers=0, vocab_size=-3)
    with pytest.raises(ModelError) as caught:
        found(folder)
    for word in ("hidden_size is missing", "num_hidden_layers", "vocab_size"):
        assert word in str(caught.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not readable JSON"):
        found(folder)


def test_adapters_folders_and_files_are_refused(nowhere):
    folder = folder_with(nowhere / "m")
    with pytest.raises(ModelError, match="is a file"):
        found(folder / "config.json")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="an adapter's folder"):
        found(folder)


def test_weights_that_differ_from_the_config_are_told(nowhere):
    folder = tiny_model(nowhere / "m")
    assert found(folder).notes == ()
    save_file({"x": torch.zeros(10, 10)}, folder / "model.safetensors")
    assert "hold 100" in found(folder).notes[0]
    (folder / "model.safetensors").write_bytes(b"x")
    assert "could not be counted" in found(folder).notes[0]
    assert not found(folder_with(nowhere / "none")).notes


# ---------------------------------------------------------------- the rows


def test_without_data_every_row_is_as_long_as_allowed_and_it_is_said():
    answer = plan("max_length=512")
    assert "1,000 rows of 512 tokens assumed" in answer.data and answer.tokens == 512_000
    assert "no data was named" in " ".join(answer.notes)
    assert "--data rows.jsonl" in answer.gpus[0].recommended.command


def test_data_are_tokenised_with_the_models_tokenizer(nowhere):
    rows = tiny_rows(nowhere / "rows.jsonl", 30)
    answer = plan(model="pocket", data=str(rows))
    assert "30 rows" in answer.data and "counted with the tokenizer" in answer.data
    assert answer.tokens < 30 * 100 and "no data was named" not in " ".join(answer.notes)
    assert "only 30 rows" in " ".join(answer.notes)
    assert answer.gpus[0].recommended.command.split()[4] == str(rows)


def test_data_of_a_catalogue_model_are_estimated_and_it_is_said(nowhere):
    answer = plan(data=str(tiny_rows(nowhere / "rows.jsonl", 200)))
    assert "without the model's tokenizer" in answer.data
    assert "estimates" in " ".join(answer.notes)


def test_data_that_are_not_there_are_refused(nowhere):
    with pytest.raises(DataError, match="nope"):
        plan(data=str(nowhere / "nope.jsonl"))


def test_rows_longer_than_the_models_positions(nowhere):
    folder = folder_with(nowhere / "m", max_position_embeddings=100)
    assert "1,000 rows of 100 tokens" in plan(model=str(folder)).data
    with pytest.raises(InputError, match="up to 100"):
        plan("max_length=101", model=str(folder))


# ---------------------------------------------------------------- the GPUs and the words


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("h200", None, (1, "h200")),
        ("2xa100-80gb", None, (2, "a100-80gb")),
        ("8 x H100", None, (8, "H100")),
        ("h200", 4, (4, "h200")),
        ("4xh200", 4, (4, "h200")),
    ],
)
def test_counts_of_gpus(name, gpus, expected):
    assert split_count(name, gpus) == expected


@pytest.mark.parametrize(
    ("name", "gpus"), [("0xh200", None), ("-2xh200", None), ("h200", 0), ("h200", -1), ("2xh200", 3)]
)
def test_counts_that_are_none_are_refused(name, gpus):
    with pytest.raises(InputError):
        split_count(name, gpus)


def test_an_unknown_gpu_gets_the_nearest_names_and_how_to_add_one(nowhere):
    with pytest.raises(InputError) as caught:
        plan(gpu=("rtx-4091",))
    for word in ("rtx-4090", "gpus.yaml", "thriftune gpus"):
        assert word in str(caught.value)


def test_without_a_gpu_a_few_usual_ones_are_planned_and_it_is_said():
    for names in ((), ("local",)):
        answer = plan(gpu=names)
        assert tuple(found.gpu for found in answer.gpus) == DEFAULT_GPUS
        assert "planned for rtx-4090" in " ".join(answer.notes)
    assert [found.gpu for found in plan(gpu=("local", "a6000")).gpus] == ["a6000"]


def test_this_computers_cpu_can_be_asked_for_by_name():
    (found_place,) = plan(model="pocket", gpu=("cpu",)).gpus
    assert found_place.gpu == "cpu" and "--measure" in " ".join(found_place.notes)
    assert [method.step_s for method in found_place.methods] == [0, 0, 0]


def test_several_gpus_in_the_order_asked():
    devices, _ = find_devices(["h200", "2xt4"], None, read_market())
    assert [(device.gpu.key, device.count) for device in devices] == [("h200", 1), ("t4", 2)]


def test_methods_and_preferences_are_checked():
    assert [one.method for one in plan(methods=("qlora", "lora")).gpus[0].methods] == ["qlora", "lora"]
    assert [one.method for one in plan("method=lora").gpus[0].methods] == ["lora"]
    assert [one.method for one in plan().gpus[0].methods] == [
        "full", "lora", "qlora", "lora-fp8", "dynamic", "qlora-offload",
    ]  # fmt: skip
    with pytest.raises(InputError, match="full, lora, qlora"):
        plan(methods=("lorra",))
    with pytest.raises(InputError, match="balanced, speed"):
        plan(prefer="fast")


def test_a_users_price_without_a_date_is_refused(nowhere):
    (nowhere / "own" / "x.yaml").write_text(
        "prices:\n  - {gpu: rtx-4090, provider: us, kind: spot, usd_per_hour: 0.1, source: me}\n"
    )
    with pytest.raises(InputError, match="date is missing"):
        plan()


def test_a_users_gpu_and_price_are_used(nowhere):
    (nowhere / "own" / "x.yaml").write_text(
        "gpus:\n  my-card: {name: Mine, memory: 24GiB, bandwidth_gb_per_s: 900, tflops_bf16: 100, tflops_fp16: 100, "
        "tflops_fp32: 50, link_gb_per_s: 20, power_w: 300, gpu_class: ada-consumer, source: me, date: 2026-01-01}\n"
        "prices:\n  - {gpu: my-card, provider: us, kind: spot, usd_per_hour: 0.1, source: me, date: 2026-11-01}\n"
        "electricity_usd_per_kwh: 0\n"
    )
    one = plan(gpu=("my-card",)).gpus[0].methods[1]
    assert one.cost_usd["us spot"] == pytest.approx(one.run_s / 3600 * 0.1)
    assert one.cost_usd["electricity at home"] == 0


def test_this_machines_memory_and_cards_the_catalogue_lacks():
    available, total = machine_memory()
    assert 10**8 < available <= total and cpu_device().usable_bytes <= total
    assert own_gpu([0], 1) is None
    strange = unknown_gpu("NVIDIA X", 20 * GIB, 15 * GIB, 1)
    assert (strange.gpu.name, strange.usable_bytes, strange.gpu.unified_memory) == ("NVIDIA X", 15 * GIB, False)


def driver_says(home: Path, monkeypatch, *lines: str) -> None:
    """A driver with these GPUs: nvidia-smi as a script at the front of PATH."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program = home / "nvidia-smi"
    program.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines) + "\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:/usr/bin:/bin")


def test_every_process_of_a_machine_plans_for_its_fullest_gpu(nowhere, monkeypatch):
    """Free memory differs from GPU to GPU; settings must not."""
    lines = [
        f"{index}, GPU-{index}, NVIDIA H200, 143771, {free}, 700.00, 9.0"
        for index, free in enumerate((140_000, 90_000, 60_000))
    ]
    driver_says(nowhere, monkeypatch, *lines)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    places = [run_place(torch.device("cuda", rank)) for rank in range(2)]
    assert places[0] == places[1]
    assert (places[0].gpu.key, places[0].count, places[0].usable_bytes) == ("h200", 2, 90_000 * MIB)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run_place(torch.device("cuda", 2)).usable_bytes == 60_000 * MIB
    assert own_gpu([0, 3], 2) is None


def test_a_gpu_that_the_catalogue_lacks_is_planned_with_its_own_memory(nowhere, monkeypatch):
    driver_says(nowhere, monkeypatch, "0, GPU-0, NVIDIA GeForce RTX 9999, 65536, 65000, 800.00, 15.0")
    place = own_gpu([0], 1)
    assert (place.gpu.name, place.gpu.memory_bytes, place.usable_bytes) == (
        "NVIDIA GeForce RTX 9999",
        64 * GIB,
        65_000 * MIB,
    )
    driver_says(nowhere, monkeypatch, "0, GPU-0, NVIDIA GeForce RTX 9999, [N/A], [N/A], 800.00, 15.0")
    assert own_gpu([0], 1) is None


# ---------------------------------------------------------------- a run that is about to start


def run_recipe(*words: str) -> Recipe:
    return read_recipe(None, words, {"model": "pocket"})


ROWS = Rows((300, 200, 100), (30, 20, 10), 3, "three rows")


def with_memory(gib: float) -> Device:
    return Device(built_in_gpus()["rtx-4090"], 1, int(gib * GIB))


@pytest.fixture
def llama_8b(nowhere) -> Path:
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    return folder_with(nowhere / "8b", intermediate_size=14336, vocab_size=128256, **sizes)


@pytest.mark.parametrize(("gib", "expected"), [(80, "lora"), (24, "lora"), (14, "qlora"), (9, "qlora")])
def test_auto_takes_the_first_that_fits(llama_8b, gib, expected):
    planned = plan_run(run_recipe(), assumed_rows(run_recipe()), llama_8b, with_memory(gib))
    assert planned.method == expected and planned.chosen.fits and planned.chosen.method == expected
    assert planned.rows_at_once * planned.accumulation == 16 and len(planned.lines()) == 3


def test_what_cannot_fit_is_refused_with_what_does_unless_forced(llama_8b):
    rows = assumed_rows(run_recipe())
    with pytest.raises(DoesNotFitError, match="even with qlora") as caught:
        plan_run(run_recipe("offload=off"), rows, llama_8b, with_memory(4))
    assert "fits on" in caught.value.do and "--force" in caught.value.do
    with pytest.raises(DoesNotFitError) as caught:
        plan_run(run_recipe("method=lora"), rows, llama_8b, with_memory(14))
    assert "take --method qlora" in caught.value.do and "with lora" not in caught.value.given
    forced = plan_run(run_recipe("method=lora"), rows, llama_8b, with_memory(14), force=True)
    assert forced.method == "lora" and forced.reason == "asked for" and "DOES NOT FIT" in forced.lines()[0]


def test_what_would_not_fit_is_streamed_and_a_cap_is_kept(llama_8b):
    rows = assumed_rows(run_recipe())
    planned = plan_run(run_recipe(), rows, llama_8b, with_memory(6))
    assert planned.method == "qlora" and planned.streams and planned.chosen.fits
    assert "streamed from the computer's memory" in planned.lines()[2]
    assert not plan_run(run_recipe(), rows, llama_8b, with_memory(80)).streams
    capped = plan_run(run_recipe("max_memory=6GiB"), rows, llama_8b, with_memory(80))
    assert capped.streams and capped.chosen.usable_bytes == 6 * GIB
    assert capped.chosen.settings == planned.chosen.settings


def test_a_cap_is_refused_where_nothing_would_keep_it():
    with pytest.raises(InputError, match="max_memory=6GiB on cpu"):
        plan_run(run_recipe("max_memory=6GiB"), ROWS, POCKET, Device(None, 1, 16 * GIB))
    with pytest.raises(InputError, match="max_memory=6GiB on cpu"):
        plan("max_memory=6GiB", gpu=("rtx-4090", "cpu"))


def test_8_bit_products_are_refused_before_anything_is_loaded_where_the_engine_does_not_run(llama_8b):
    def planned(gpu: str, *words: str):
        row = built_in_gpus()[gpu]
        return plan_run(run_recipe("precision=fp8", *words), ROWS, llama_8b, Device(row, 1, row.usable_bytes))

    assert planned("h100-pcie").chosen.path == "engine"
    with pytest.raises(InputError, match="no products in 8-bit floats"):
        planned("a100-80gb")
    assert planned("h100-pcie", "method=lora", "lora_dropout=0.1").chosen.path == "engine"
    with pytest.raises(InputError, match="a variant of LoRA"):
        planned("h100-pcie", "method=lora", "use_dora=true")


def test_recomputation_follows_memory_and_the_recipes_word(llama_8b):
    rows = Rows((2048,), (2047,), 1000, "long rows")

    def planned(gib: float, *words: str):
        fixed = ("per_device_train_batch_size=4", "method=lora", "engine=off", *words)
        return plan_run(run_recipe(*fixed), rows, llama_8b, with_memory(gib), force=True)

    assert not planned(120).checkpointing and planned(32).checkpointing
    assert planned(120, "gradient_checkpointing=on").checkpointing
    assert not planned(32, "gradient_checkpointing=off").checkpointing


def test_on_a_cpu_only_weights_larger_than_the_machine_are_refused(llama_8b, monkeypatch):
    small = Device(None, 1, 1000)
    assert plan_run(run_recipe("method=lora"), ROWS, POCKET, small).method == "lora"
    lines = plan_run(run_recipe(), ROWS, POCKET, cpu_device()).lines()
    assert "time is not estimated for CPUs" in lines[1]
    monkeypatch.setattr("thriftune.planning.run.machine_memory", lambda: (10**9, 10**9))
    with pytest.raises(DoesNotFitError):
        plan_run(run_recipe("method=lora"), ROWS, llama_8b, small)


def test_a_model_that_cannot_be_planned_is_trained_without_a_plan_and_it_is_said(nowhere):
    folder = folder_with(nowhere / "odd", hidden_size="absent")
    planned = plan_run(run_recipe("gradient_checkpointing=on"), ROWS, folder, with_memory(24))
    assert (planned.method, planned.plan, planned.checkpointing, planned.rows_at_once) == ("lora", None, True, 4)
    assert len(planned.lines()) == 1 and planned.lines()[0].startswith("no plan: ")
    assert plan_run(run_recipe("target_modules=nope", "method=lora"), ROWS, POCKET, with_memory(24)).plan is None
