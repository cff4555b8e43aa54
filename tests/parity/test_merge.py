"""A merged model is the adapter's model: for every kind of adapter, on plain and on 4-bit bases, or it is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter_runs import CPU, distance, left_behind, logits_of, make_run
from small_models import make_model
from thriftune.errors import DiskFullError, InputError, ModelError, OutputError
from thriftune.infer import merge as merge_module
from thriftune.infer.merge import MergeCheck, compare, merge_adapter, probe_logits, refuse_a_lost_tune
from thriftune.infer.merge_files import FileMerge
from thriftune.merging import merge
from thriftune.methods import METHODS
from thriftune.target import attach_adapter, find_target, load_base, open_target
from tiny import tiny_recipe, tiny_rows, train_tiny

DEPTH = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    made = {family: make_model(root / family, family) for family in ("llama", "qwen2", "gpt2", "phi3")}
    made["llama-tied"] = make_model(root / "llama-tied", "llama", tied=True)
    made["llama-bf16"] = make_model(root / "llama-bf16", "llama", dtype=torch.bfloat16)
    return made


# ---------------------------------------------------------------- a merged model is the adapter's


@pytest.mark.parametrize("stored", ["llama", "llama-bf16"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_trained_run_becomes_a_plain_model(method, stored, folders, tmp_path, capsys):
    rows = tiny_rows(tmp_path / "rows.jsonl", 12)
    train_tiny(tiny_recipe(folders[stored], rows, tmp_path / "run", method=method, train={"learning_rate": 2e-2}))
    result = merge(str(tmp_path / "run"), tmp_path / "merged", CPU)

    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    dtype = torch.bfloat16 if stored == "llama-bf16" else torch.float32
    assert "quantization_config" not in config and "peft_config" not in config
    assert result["dtype"] == config["dtype"] == str(dtype).removeprefix("torch.")
    assert "model.safetensors" in left_behind(tmp_path / "merged")
    assert left_behind(tmp_path) == ["merged", "rows.jsonl", "run"]

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert not hasattr(plain, "peft_config") and not getattr(plain, "is_quantized", False)
    tuned = open_target(find_target(str(tmp_path / "run")), CPU)
    base = load_base(find_target(str(tmp_path / "run")), CPU)
    expected, before = logits_of(tuned.model), logits_of(base.model)
    assert distance(expected, before) > 0.05, "the test needs a tune that shows"
    rounding = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert distance(logits_of(plain), expected) < rounding
    # The numbers that are printed are the ones that are there.
    assert result["difference"] < rounding and result["effect"] > 0.02
    assert result["same_token"] > 0.9 and result["positions"] > 50
    text = "what a film"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer(text).input_ids == tuned.tokenizer(text).input_ids
    with capsys.disabled():
        print(f"\n{method} on {stored}: merged differs by {result['difference']:.2e}, effect {result['effect']:.2e}")


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", {"use_dora": True}),
        ("llama", {"use_rslora": True}),
        ("llama", {"dropout": 0.5}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
        ("llama", {"options": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 32}}}),
        ("llama", {"options": {"lora_bias": True}}),
        ("llama", {"options": {"trainable_token_indices": [5, 80]}}),
        ("llama-tied", {}),
        ("llama-tied", {"modules_to_save": ["lm_head"]}),
        ("llama-tied", {"modules_to_save": ["embed_tokens"], "options": {"ensure_weight_tying": True}}),
        ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("qwen2", {"bias": "all"}),
        ("gpt2", {}),
        ("phi3", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_every_kind_of_adapter_merges_to_itself_or_is_refused(method, kind, lora, folders, tmp_path):
    run = make_run(tmp_path / "run", folders[kind], method, lora=lora)
    expected = logits_of(open_target(find_target(str(run)), CPU).model)
    try:
        merge(str(run), tmp_path / "merged", CPU)
    except ModelError as error:
        # PEFT cannot merge an adapter with a bias of its own on a linear that has none: that is said, and nothing left.
        assert lora == {"options": {"lora_bias": True}}, error
        assert left_behind(tmp_path) == ["run"]
        return
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert distance(logits_of(merged), expected) < 1e-5
    if {"embed_tokens", "lm_head"} & set(lora.get("target_modules", ())):
        assert not merged.config.tie_word_embeddings


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "mica", "gaussian"])
def test_starts_that_rewrote_the_base_merge_into_the_plain_one(init, folders, tmp_path):
    run = make_run(tmp_path / "run", folders["llama"], lora={"init_lora_weights": init})
    expected = logits_of(open_target(find_target(str(run)), CPU).model)
    assert distance(expected, logits_of(load_base(find_target(str(run)), CPU).model)) > 1e-3
    merge(str(run), tmp_path / "merged", CPU)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert distance(logits_of(merged), expected) < 1e-4


def test_an_adapter_from_elsewhere_merges_into_the_base_it_names(folders, tmp_path):
    run = make_run(tmp_path / "run", folders["llama"])
    (run / "adapter").rename(tmp_path / "downloaded")
    result = merge(str(tmp_path / "downloaded"), tmp_path / "merged", CPU)
    assert result["base"] == str(folders["llama"]) and result["difference"] < 1e-5


def test_a_checkpoint_merges(folders, tmp_path):
    rows = tiny_rows(tmp_path / "rows.jsonl", 12)
    train_tiny(tiny_recipe(folders["llama"], rows, tmp_path / "run", train={"save_strategy": "steps", "save_steps": 3}))
    early = merge(str(tmp_path / "run" / "checkpoint-3"), tmp_path / "early", CPU)
    final = merge(str(tmp_path / "run"), tmp_path / "final", CPU)
    assert early["difference"] < 1e-5 and early["effect"] != final["effect"]


def test_few_positions_shorten_the_probes(tmp_path):
    base = make_model(tmp_path / "base", "gpt2", n_positions=24)
    result = merge(str(make_run(tmp_path / "run", base)), tmp_path / "merged", CPU)
    assert result["positions"] == 4 * 24 and result["difference"] < 1e-5


# ---------------------------------------------------------------- why not into 4 bits


def test_an_adapter_of_usual_size_survives_here_and_not_in_four_bits(folders, tmp_path, capsys):
    """dW is 1 % of W, as after an ordinary run. What is left of it: the cosine of what was added with dW."""
    run = make_run(tmp_path / "run", folders["llama"], "qlora", size=0.0)
    target = find_target(str(run))
    opened = open_target(target, CPU)
    layer = opened.model.base_model.model.get_submodule(DEPTH)
    before = dequantize_4bit(layer.base_layer.weight, layer.base_layer.weight.quant_state).float()
    draw = torch.Generator().manual_seed(3)
    lora_B = torch.randn(layer.lora_B["default"].weight.shape, generator=draw)
    scale = 0.01 * before.norm() / (layer.scaling["default"] * lora_B @ layer.lora_A["default"].weight).norm()
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(scale * lora_B)
    wanted = layer.get_delta_weight("default").detach()
    assert float(wanted.norm() / before.norm()) == pytest.approx(0.01, rel=1e-3)
    METHODS["qlora"].save(opened.model, run / "adapter")

    def kept(after: torch.Tensor) -> float:
        added = after.float() - before
        return float((added * wanted).sum() / (added.norm() * wanted.norm()))

    result = merge(str(run), tmp_path / "merged", CPU)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    here = kept(ours.get_submodule(DEPTH).weight.detach())

    naive = PeftModel.from_pretrained(load_base(target, CPU).model, run / "adapter").merge_and_unload()
    weight = naive.get_submodule(DEPTH).weight
    there = kept(dequantize_4bit(weight, weight.quant_state))
    with capsys.disabled():
        print(f"\ndW of 1 %: cosine kept {here:.4f} here, {there:.4f} in 4 bits; difference {result['difference']:.1e}")
    assert here > 0.999
    assert there < 0.5


def test_merging_into_four_bits_is_refused(folders, tmp_path):
    run = make_run(tmp_path / "run", folders["llama"], "qlora")
    target = find_target(str(run))
    with pytest.raises(ModelError, match="still in 4 bits"):
        merge_adapter(attach_adapter(load_base(target, CPU).model, target.adapter))


# ---------------------------------------------------------------- what is refused, and that nothing is left


@pytest.fixture
def run(folders, tmp_path) -> Path:
    return make_run(tmp_path / "run", folders["llama"])


def test_a_full_run_has_no_adapter(folders, tmp_path):
    rows = tiny_rows(tmp_path / "rows.jsonl", 12)
    train_tiny(tiny_recipe(folders["llama"], rows, tmp_path / "run", method="full", train={"max_steps": 1}))
    for target in (tmp_path / "run", tmp_path / "run" / "model", folders["llama"]):
        with pytest.raises(InputError, match="has no adapter to merge"):
            merge(str(target), tmp_path / "merged", CPU)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("content", ["file in it", "a file", "hidden file in it"])
def test_an_output_that_is_taken_is_refused_before_anything_is_loaded(run, tmp_path, content, monkeypatch):
    output = tmp_path / "merged"
    if content == "a file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / ("x" if content == "file in it" else ".x")).write_text("mine")
    monkeypatch.setattr("thriftune.merging.load_base", None)
    with pytest.raises(OutputError, match="exists and is not empty"):
        merge(str(run), output, CPU)
    assert left_behind(tmp_path) == ["merged", "run"]


def test_an_empty_folder_is_taken(run, tmp_path, monkeypatch):
    (tmp_path / "merged").mkdir()
    monkeypatch.chdir(tmp_path / "merged")
    merge(str(run), Path("../merged"), CPU)
    assert "config.json" in left_behind(tmp_path / "merged")
    assert not [path for path in (tmp_path / "merged").iterdir() if path.stat().st_mode & 0o077 == 0]


def test_an_output_below_a_file_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written"):
        merge(str(run), tmp_path / "file" / "merged", CPU)
    assert left_behind(tmp_path) == ["file", "run"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), DiskFullError),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), DiskFullError),
        (PermissionError(13, "Permission denied"), OutputError),
    ],
)
def test_nothing_is_left_when_writing_fails(run, tmp_path, monkeypatch, error, kind):
    def failing(files, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(FileMerge, "write", failing)
    with pytest.raises(kind, match="cannot be written"):
        merge(str(run), tmp_path / "merged", CPU)
    assert left_behind(tmp_path) == ["run"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_nothing_is_left_when_we_are_at_fault_or_stopped(run, tmp_path, monkeypatch, error):
    def failing(*arguments, **named):
        raise error

    monkeypatch.setattr("thriftune.merging.load_model", failing)
    with pytest.raises(type(error)):
        merge(str(run), tmp_path / "merged", CPU)
    assert left_behind(tmp_path) == ["run"]


def test_a_lost_tune_is_noticed_and_not_kept(run, tmp_path, monkeypatch):
    """The merge is replaced by one that forgets the adapter."""
    monkeypatch.setattr(FileMerge, "merged", lambda files, name, stored: stored.to(files.dtype))
    with pytest.raises(ModelError, match="away from the adapter's") as error:
        merge(str(run), tmp_path / "merged", CPU)
    assert "unmerged" in error.value.do
    assert left_behind(tmp_path) == ["run"]


def test_a_naive_merge_into_four_bits_would_be_noticed(folders, tmp_path, monkeypatch):
    """The weights after PEFT's own merge into 4 bits, written as plain ones, are not the tuned model."""
    run = make_run(tmp_path / "run", folders["llama"], "qlora", size=0.01)
    target = find_target(str(run))

    opened = open_target(target, CPU)
    wrong = opened.model.merge_and_unload().dequantize().state_dict()
    monkeypatch.setattr(FileMerge, "merged", lambda files, name, stored: wrong[name])
    with pytest.raises(ModelError, match="away from the adapter's"):
        merge(str(run), tmp_path / "merged", CPU)


def test_an_adapter_that_rounding_would_swallow_is_refused(folders, tmp_path):
    run = make_run(tmp_path / "run", folders["llama-bf16"], size=5e-4)
    with pytest.raises(ModelError, match="swallow"):
        merge(str(run), tmp_path / "merged", CPU)
    assert left_behind(tmp_path) == ["run"]


def test_an_adapter_that_does_nothing_merges_to_the_base(folders, tmp_path):
    result = merge(str(make_run(tmp_path / "run", folders["llama"], size=0.0)), tmp_path / "merged", CPU)
    assert result["effect"] == 0 and result["difference"] == 0 and result["same_token"] == 1


GOOD = MergeCheck(difference=0.01, effect=0.3, max_abs_difference=0.1, same_token=0.98, positions=60)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"rounded": False}, True),
        ({"rounded": False, "difference": 0.005}, False),
        ({"rounded": False, "difference": 0.007}, True),
        ({"rounded": False, "difference": 9e-4, "effect": 0.001}, False),
        ({}, False),
        ({"difference": 0.149}, False),
        ({"difference": 0.151}, True),
        ({"difference": math.nan}, True),
        ({"difference": math.inf}, True),
        ({"effect": math.nan}, True),
        ({"effect": 0.0, "difference": 0.0}, False),
        ({"effect": 0.0, "difference": 5e-4}, False),
        ({"effect": 0.0, "difference": 0.3}, True),
        ({"effect": 1e-4, "difference": 9e-4}, False),
        ({"effect": 1e-4, "difference": 5e-3}, True),
    ],
    ids=str,
)
def test_where_a_tune_counts_as_lost(change, lost):
    rounded = change.get("rounded", True)
    check = dataclasses.replace(GOOD, **{name: value for name, value in change.items() if name != "rounded"})
    if lost:
        with pytest.raises(ModelError):
            refuse_a_lost_tune(check, rounded)
    else:
        refuse_a_lost_tune(check, rounded)


def test_the_comparison_is_what_it_says():
    adapter_NV = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    check = compare(adapter_NV, torch.zeros(2, 2), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    assert check.effect == 1 and check.positions == 2 and check.same_token == 0.5
    assert check.difference == pytest.approx(math.sqrt(17) / 5) and check.max_abs_difference == 4


def test_probing_does_not_change_the_model(folders):
    model = load_base(find_target(str(folders["llama"])), CPU).model
    before = logits_of(model)
    probes = [[1, 2, 3], [4]]
    assert probe_logits(model, probes).shape == (4, 320)
    assert torch.equal(logits_of(model), before)


def test_not_finite_adapters_are_refused(run, tmp_path):
    opened = open_target(find_target(str(run)), CPU)
    layer = opened.model.base_model.model.get_submodule(DEPTH)
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(math.inf)
    with pytest.raises(ModelError, match="cannot be merged"):
        merge_adapter(opened.model)


def test_the_module_says_which_difference_is_rounding():
    assert merge_module.ROUNDING <= 1e-3 and merge_module.MOST_OF_THE_TUNE <= 0.5
