"""The `shrink` verb: a finished adapter, smaller, read by PEFT and by this package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from thriftune.errors import InputError, ModelError, OutputError
from thriftune.shrinking import shrink
from thriftune.target import find_target, open_target
from tiny import tiny_model, tiny_recipe, tiny_rows, train_tiny

CPU = torch.device("cpu")
IDS_BT = torch.arange(3, 39).reshape(2, 18)
STEM = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def trained(model: Path, folder: Path, **lora: Any) -> Path:
    options = {"r": 8, "alpha": 16.0, **lora}
    train_tiny(tiny_recipe(model, tiny_rows(folder / "rows.jsonl", 22), folder / "run", lora=options))
    return folder / "run"


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory) -> Path:
    return trained(model, tmp_path_factory.mktemp("tuned"))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS_BT).logits


def opened(target: Path) -> torch.Tensor:
    return logits_of(open_target(find_target(str(target)), CPU).model)


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"options": {"rank_pattern": {"q_proj": 3}}}])
def test_all_of_an_adapter_is_the_same_adapter(model, tmp_path, lora):
    run = trained(model, tmp_path, **lora)
    told = shrink(str(run), tmp_path / "same", 1.0, 1)
    assert told["parameters_after"] == told["parameters_before"] and told["kept_energy"] == pytest.approx(1.0)
    torch.testing.assert_close(opened(tmp_path / "same"), opened(run), rtol=0, atol=1e-5)


def test_half_is_written_as_an_ordinary_adapter(model, tuned, tmp_path):
    told = shrink(str(tuned), tmp_path / "half", 0.5, 1)
    tensors = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == told["parameters_after"]
    assert told["parameters_after"] <= told["parameters_before"] / 2 < 1.1 * told["parameters_after"]
    whole = load_file(tuned / "adapter" / "adapter_model.safetensors")
    total = lost = 0.0
    for name, a in whole.items():
        if ".lora_A." in name:
            update = whole[name.replace("_A", "_B")] @ a
            smaller = tensors[name.replace("_A", "_B")] @ tensors[name] if name in tensors else 0 * update
            total, lost = total + float(update.square().sum()), lost + float((update - smaller).square().sum())
    assert told["kept_energy"] == pytest.approx(1 - lost / total, abs=1e-4) and 0.8 < told["kept_energy"] < 1
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    in_peft = logits_of(PeftModel.from_pretrained(plain, tmp_path / "half"))
    torch.testing.assert_close(in_peft, opened(tmp_path / "half"), rtol=0, atol=1e-6)
    near, base = opened(tuned), logits_of(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    assert float((in_peft - near).norm()) < 0.5 * float((base - near).norm())
    assert (tmp_path / "half" / "tokenizer.json").read_bytes() == (tuned / "adapter" / "tokenizer.json").read_bytes()


def test_blocks_and_modules_that_lose_their_adapter(tuned, tmp_path):
    ranks = shrink(str(tuned / "adapter"), tmp_path / "few", 0.2, 4)["ranks"]
    assert set(ranks.values()) == {0, 4}
    config = json.loads((tmp_path / "few" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(name for name, rank in ranks.items() if rank)
    assert opened(tmp_path / "few").shape == (2, 18, 320)


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(tuned, tmp_path, keep):
    with pytest.raises(InputError, match="--keep"):
        shrink(str(tuned), tmp_path / "out", keep, None)


def test_what_cannot_be_shrunk_is_refused_and_leaves_nothing(model, tuned, tmp_path):
    with pytest.raises(InputError, match="has no adapter to shrink"):
        shrink(str(model), tmp_path / "out", 0.5, None)
    with pytest.raises(InputError, match="leaves no whole block"):
        shrink(str(tuned), tmp_path / "out", 0.01, 8)
    with pytest.raises(InputError, match="--round-to 0"):
        shrink(str(tuned), tmp_path / "out", 0.5, 0)
    with pytest.raises(OutputError, match="not empty"):
        shrink(str(tuned), tuned, 0.5, None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["dora", "bias", "pissa"])
def test_other_kinds_of_adapters_are_refused(tuned, tmp_path, kind):
    shutil.copytree(tuned / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    changes = {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}, "bias": {}}[kind]
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if kind == "bias":
        weights = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file(load_file(weights) | {f"{STEM}.lora_B.bias": torch.zeros(128)}, weights)
    with pytest.raises(ModelError, match="is no plain LoRA"):
        shrink(str(tmp_path / "adapter"), tmp_path / "out", 0.5, None)
    assert not (tmp_path / "out").exists()
