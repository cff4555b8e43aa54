"""A merge tensor by tensor against PEFT's merge of the whole model: the files, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from adapter_runs import CPU, distance, left_behind, logits_of, make_run
from small_models import make_model
from thriftune import merging
from thriftune.errors import ModelError
from thriftune.infer import merge_files
from thriftune.infer.merge_files import FileMerge, Kept
from thriftune.merging import by_tensor, merge, merge_whole
from thriftune.methods.full import STORED_DTYPES
from thriftune.models import describe_model
from thriftune.target import find_adapter, find_target, open_target


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    bf16 = {"dtype": torch.bfloat16}
    made = {family: make_model(root / family, family) for family in ("llama", "gpt2", "phi3")}
    made["llama-bf16"] = make_model(root / "llama-bf16", "llama", **bf16)
    made["llama-f16"] = make_model(root / "llama-f16", "llama", dtype=torch.float16)
    made["llama-tied"] = make_model(root / "llama-tied", "llama", tied=True, **bf16)
    made["qwen3"] = make_model(root / "qwen3", "qwen3", **bf16)
    made["qwen2"] = make_model(root / "qwen2", "qwen2", **bf16)
    made["llama-shards"] = shards(made["llama-bf16"], root / "llama-shards", 5)
    return made


def shards(folder: Path, output: Path, count: int) -> Path:
    """The same model with its tensors dealt out to so many files."""
    shutil.copytree(folder, output)
    tensors = load_file(output / "model.safetensors")
    (output / "model.safetensors").unlink()
    places = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[number::count])
        save_file(part, output / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    (output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return output


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def whole_way(run: Path, output: Path) -> None:
    target, adapter = find_adapter(str(run), "merge")
    description = describe_model(target.base)
    merge_whole(target, adapter, output, STORED_DTYPES[description.stored_dtype], CPU)


def assert_same_files(one: Path, other: Path) -> None:
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys() and len(mine) > 10
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor), name
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text()), name


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", {}),
        ("llama-bf16", {}),
        ("llama-f16", {}),
        ("llama-tied", {}),
        ("llama-shards", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("phi3", {}),
        ("llama-bf16", {"use_rslora": True}),
        ("llama-bf16", {"options": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 32}}}),
        ("llama-bf16", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama-bf16", {"target_modules": ["q_proj", "down_proj"], "options": {"layers_to_transform": [1]}}),
    ],
    ids=str,
)
def test_the_files_are_those_of_the_whole_merge(method, kind, lora, folders, tmp_path) -> None:
    run = make_run(tmp_path / "run", folders[kind], method, lora=lora)
    result = merge(str(run), tmp_path / "merged", CPU)
    assert result["loaded_whole"] is None and result["tensors"] > 0
    assert result["kept"] == pytest.approx(1, abs=0.02)
    whole_way(run, tmp_path / "whole")
    assert_same_files(tmp_path / "merged", tmp_path / "whole")


def test_without_double_quantisation_and_in_fp4(folders, tmp_path) -> None:
    run = make_run(tmp_path / "run", folders["llama-bf16"], "qlora")
    text = (run / "recipe.yaml").read_text()
    changed = text.replace("bnb_4bit_quant_type: nf4", "bnb_4bit_quant_type: fp4")
    changed = changed.replace("bnb_4bit_use_double_quant: true", "bnb_4bit_use_double_quant: false")
    assert changed.count("fp4") == 1 and "double_quant: false" in changed
    (run / "recipe.yaml").write_text(changed)
    merge(str(run), tmp_path / "merged", CPU)
    whole_way(run, tmp_path / "whole")
    assert_same_files(tmp_path / "merged", tmp_path / "whole")


def test_a_base_in_shards_is_written_in_the_same_shards(folders, tmp_path) -> None:
    run = make_run(tmp_path / "run", folders["llama-shards"])
    merge(str(run), tmp_path / "merged", CPU)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    before = json.loads((folders["llama-shards"] / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == before["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "merged").values())
    for path in (tmp_path / "merged").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_the_bases_own_generation_settings_come_along(folders, tmp_path) -> None:
    base = shutil.copytree(folders["llama"], tmp_path / "base")
    GenerationConfig(eos_token_id=[0, 3], temperature=0.6, do_sample=True).save_pretrained(base)
    run = make_run(tmp_path / "run", base)
    merge(str(run), tmp_path / "merged", CPU)
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [0, 3]
    whole_way(run, tmp_path / "whole")
    assert_same_files(tmp_path / "merged", tmp_path / "whole")


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_tensors_that_loading_leaves_out_are_left_out(method, folders, tmp_path) -> None:
    base = shutil.copytree(folders["llama-bf16"], tmp_path / "base")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors_of(base) | extra, base / "model.safetensors", metadata={"format": "pt"})
    run = make_run(tmp_path / "run", base, method)
    assert merge(str(run), tmp_path / "merged", CPU)["loaded_whole"] is None
    whole_way(run, tmp_path / "whole")
    assert_same_files(tmp_path / "merged", tmp_path / "whole")


@pytest.mark.parametrize(
    ("kind", "method", "lora", "why"),
    [
        ("llama", "lora", {"use_dora": True}, "DoRA"),
        ("llama", "lora", {"init_lora_weights": "pissa"}, "replaced the base"),
        ("llama", "lora", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("llama", "lora", {"target_modules": ["q_proj", "embed_tokens"]}, "an adapter on model.embed_tokens"),
        ("llama", "lora", {"options": {"trainable_token_indices": [5]}}, "trainable_token_indices"),
        ("gpt2", "qlora", {}, "the other way round"),
    ],
    ids=str,
)
def test_what_needs_the_whole_model_is_merged_so_and_said(kind, method, lora, why, folders, tmp_path) -> None:
    run = make_run(tmp_path / "run", folders[kind], method, lora=lora)
    expected = logits_of(open_target(find_target(str(run)), CPU).model)
    result = merge(str(run), tmp_path / "merged", CPU)
    assert why in result["loaded_whole"] and result["kept"] is None and result["positions"] > 50
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert distance(logits_of(merged), expected) < 1e-4


def test_both_ends_of_a_tie_in_the_files(folders, tmp_path) -> None:
    base = shutil.copytree(folders["llama-tied"], tmp_path / "base")
    tensors = tensors_of(base)
    again = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | again, base / "model.safetensors", metadata={"format": "pt"})
    result = merge(str(make_run(tmp_path / "run", base)), tmp_path / "merged", CPU)
    assert "tied" in result["loaded_whole"]


# ---------------------------------------------------------------- a base that does not fit


@pytest.fixture
def too_large(monkeypatch) -> None:
    """Memory in which a whole model does not fit; loading one all the same is a fault."""
    monkeypatch.setattr(merging, "available_bytes", lambda: 10**6)
    for name in ("load_model", "load_base"):
        monkeypatch.setattr(merging, name, lambda *_, **__: pytest.fail("a whole model was loaded"))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_no_whole_model_is_loaded_where_it_does_not_fit(method, folders, tmp_path, too_large) -> None:
    run = make_run(tmp_path / "run", folders["llama-shards"], method)
    expected = logits_of(open_target(find_target(str(run)), CPU).model)
    result = merge(str(run), tmp_path / "merged", CPU)
    assert result["positions"] is None and result["difference"] is None
    assert result["tensors"] == 14 and result["kept"] == pytest.approx(1, abs=0.01) and result["rounding"] < 0.2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert distance(logits_of(merged), expected) < 0.02
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("a").input_ids


def test_an_update_that_rounding_swallows_is_refused_by_its_weights(folders, tmp_path, too_large) -> None:
    run = make_run(tmp_path / "run", folders["llama-bf16"], size=2e-5)
    with pytest.raises(ModelError, match=r"of the adapter's update .* is in the merged weights"):
        merge(str(run), tmp_path / "merged", CPU)
    assert left_behind(tmp_path) == ["run"]


def test_one_tensor_at_a_time_is_in_memory(folders, tmp_path, too_large, monkeypatch) -> None:
    """Each tensor is let go before the next one is read."""
    import weakref

    alive: list[weakref.ref] = []
    merged = FileMerge.merged

    def watched(files: FileMerge, name: str, stored: torch.Tensor) -> torch.Tensor:
        assert sum(found() is not None for found in alive) <= 1
        alive.append(weakref.ref(stored))
        return merged(files, name, stored)

    monkeypatch.setattr(FileMerge, "merged", watched)
    merge(str(make_run(tmp_path / "run", folders["llama-bf16"])), tmp_path / "merged", CPU)
    assert len(alive) == 21


def test_values_that_are_not_finite_are_refused(folders, tmp_path) -> None:
    """60,000 + 60,000 is more than float16 holds."""
    run = make_run(tmp_path / "run", folders["llama-f16"], size=300.0)
    with pytest.raises(ModelError, match=r"cannot be merged: model\.layers\.0"):
        merge(str(run), tmp_path / "merged", CPU)
    assert left_behind(tmp_path) == ["run"]


def test_the_outline_takes_no_memory(folders, tmp_path) -> None:
    target, adapter = find_adapter(str(make_run(tmp_path / "run", folders["llama-bf16"])), "merge")
    found = by_tensor(target, adapter, describe_model(target.base), torch.bfloat16, CPU)
    assert not isinstance(found, str)
    others = [value for name, value in found.network.named_parameters() if ".lora_" not in name]
    assert len(others) == 21 and all(value.untyped_storage().nbytes() == 4 for value in others)


def test_what_is_kept_is_counted() -> None:
    kept = Kept()
    kept.add(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))
    assert kept.share == 0.5 and kept.noise == pytest.approx(0.5**0.5)
    kept.refuse_a_lost_update()
    kept.add(torch.zeros(1), torch.ones(1))
    assert kept.share == pytest.approx(1 / 3) and kept.tensors == 2
    with pytest.raises(ModelError, match=r"33\.33% is in the merged weights"):
        kept.refuse_a_lost_update()
    assert Kept().share == 1 and Kept().noise == 0
    kept.add(torch.tensor([float("nan")]), torch.ones(1))
    with pytest.raises(ModelError):
        kept.refuse_a_lost_update()


def test_the_head_of_a_file_is_what_the_library_reads(tmp_path) -> None:
    head = merge_files.header_of({"a": [2, 3], "b": [], "c": [0, 4]}, torch.bfloat16)
    assert len(head) % 8 == 0
    values = torch.arange(7, dtype=torch.bfloat16)
    (tmp_path / "x.safetensors").write_bytes(head + values.view(torch.uint8).numpy().tobytes())
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], values[:6].view(2, 3)) and found["b"] == 6 and found["c"].shape == (0, 4)
