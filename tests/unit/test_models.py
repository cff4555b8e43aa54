"""Models from folders: every family loads, quantised or not; what is wrong with the files is said in three lines."""

from __future__ import annotations

import http.server
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from small_models import FAMILIES, make_model, make_tokenizer
from thriftune.errors import DoesNotFitError, InputError, ModelError
from thriftune.methods import METHODS
from thriftune.model_files import tensor_shapes
from thriftune.models import describe_model, find_model_folder, load_model, load_tokenizer, weight_files
from thriftune.models import load as load_module
from thriftune.models.surgery import count_parameters
from thriftune.recipe import ModelRecipe, QuantRecipe, Recipe

CPU = torch.device("cpu")
IDS_1T = torch.tensor([[5, 80, 99, 104, 81, 7, 33, 12]])


def recipe_of(folder: Path | str, **changes) -> ModelRecipe:
    return ModelRecipe(name=str(folder), **changes)


def load(folder: Path | str, dtype=torch.float32, quant: QuantRecipe | None = None, **changes):
    return load_model(recipe_of(folder, **changes), device=CPU, dtype=dtype, quant=quant)


def assert_three_parts(error: pytest.ExceptionInfo) -> str:
    """The message, after checking that all three parts are there and each says something."""
    text = str(error.value)
    given, allowed, do = text.split("\n  allowed: ")[0], error.value.allowed, error.value.do
    assert given and allowed and do and text.endswith(f"\n  allowed: {allowed}\n  do: {do}")
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One folder a family, and Llama and Qwen2 with their head tied to the embedding."""
    root = tmp_path_factory.mktemp("models")
    made = {family: make_model(root / family, family) for family in FAMILIES}
    return made | {
        f"{family}-tied": make_model(root / f"{family}-tied", family, tied=True) for family in ("llama", "qwen2")
    }


KINDS = [*FAMILIES, "llama-tied", "qwen2-tied"]


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_model(tmp_path / "model")


# ---------------------------------------------------------------- what loads


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_model_is_the_one_transformers_loads(folders, kind):
    loaded = load(folders[kind])
    plain = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS_1T).logits, plain(IDS_1T).logits)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.base_dtype == torch.float32 and not loaded.four_bit
    assert count_parameters(loaded.model) == plain.num_parameters() == loaded.description.total_parameters


@pytest.mark.parametrize("kind", KINDS)
def test_a_four_bit_model_keeps_embedding_and_head_and_counts_the_same(folders, kind):
    loaded = load(folders[kind], torch.bfloat16, QuantRecipe())
    plain = load(folders[kind])
    model = loaded.model
    quantised = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight.dtype == head.weight.dtype == torch.bfloat16
    assert not isinstance(head, Linear4bit)
    tied = plain.model.get_output_embeddings().weight is plain.model.get_input_embeddings().weight
    assert (head.weight is embedding.weight) == tied
    assert torch.equal(embedding.weight, plain.model.get_input_embeddings().weight.bfloat16())
    # Everything else that is a matrix is NF4 with double quant, computed in bfloat16.
    assert len(quantised) == {"gpt2": 8, "phi3": 8}.get(kind, 14)
    for module in quantised.values():
        assert module.weight.dtype == torch.uint8 and module.weight.quant_state.quant_type == "nf4"
        assert module.weight.quant_state.nested, "double quantisation was asked for"
        assert module.compute_dtype == torch.bfloat16
    assert count_parameters(model) == count_parameters(plain.model)
    assert sum(parameter.numel() for parameter in model.parameters()) < count_parameters(model)
    # What the description promised before anything was loaded.
    state_shapes = [module.weight.quant_state.shape for module in quantised.values()]
    assert loaded.description.linear_parameters == sum(shape[0] * shape[1] for shape in state_shapes)
    assert loaded.description.linear_sides == sum(shape[0] + shape[1] for shape in state_shapes)
    with torch.no_grad():
        four_bit, exact = model(IDS_1T).logits.float(), plain.model(IDS_1T).logits
    assert 0.01 < float((four_bit - exact).norm() / exact.norm()) < 0.6


@pytest.mark.parametrize(
    "quant", [QuantRecipe(bnb_4bit_use_double_quant=False), QuantRecipe(bnb_4bit_quant_type="fp4")]
)
def test_the_other_ways_to_quantise_are_honoured(folder, quant):
    states = [
        module.weight.quant_state
        for module in load(folder, torch.float32, quant).model.modules()
        if isinstance(module, Linear4bit)
    ]
    assert {state.quant_type for state in states} == {quant.bnb_4bit_quant_type}
    assert {state.nested for state in states} == {quant.bnb_4bit_use_double_quant}


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "phi3"])
def test_the_adapter_trains_in_float32_over_a_bfloat16_base(folders, kind, method):
    loaded = load(folders[kind], torch.bfloat16, QuantRecipe() if METHODS[method].four_bit else None)
    model = METHODS[method].attach(loaded, Recipe(method=method, model=recipe_of(folders[kind])))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and {parameter.dtype for parameter in trained} == {torch.float32}
    assert loaded.model.get_input_embeddings().weight.dtype == torch.bfloat16
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    assert norms and {parameter.dtype for norm in norms for parameter in norm.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_no_wide_copy_of_an_activation_is_kept_over_a_bfloat16_base(folders, method):
    """What the backward pass keeps in float32 is the two norms' inputs a layer, and nothing of the MLP's width."""
    loaded = load(folders["llama"], torch.bfloat16, QuantRecipe() if METHODS[method].four_bit else None)
    model = METHODS[method].attach(loaded, Recipe(method=method, model=recipe_of(folders["llama"])))
    kept = []

    def pack(tensor):
        kept.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(24)[None] + 5, use_cache=False)
    wide = loaded.description.intermediate_size
    assert not [shape for dtype, shape in kept if dtype == torch.float32 and shape[-1:] == (wide,) and len(shape) == 3]
    assert [shape for dtype, shape in kept if dtype == torch.bfloat16 and shape[-1:] == (wide,)]


def test_a_float32_base_keeps_everything_float32(folder):
    model = METHODS["lora"].attach(load(folder), Recipe(method="lora", model=recipe_of(folder)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_description_reads_headers_only(folders):
    description = describe_model(recipe_of(folders["llama"]))
    assert (description.model_type, description.hidden_size, description.intermediate_size) == ("llama", 64, 128)
    assert (description.num_layers, description.vocab_size, description.max_positions) == (2, 320, 256)
    assert description.stored_dtype == "F32"
    gpt2 = describe_model(recipe_of(folders["gpt2"]))
    assert (gpt2.hidden_size, gpt2.intermediate_size, gpt2.num_layers, gpt2.max_positions) == (64, 256, 2, 256)


def shard(folder: Path, index: dict | None = None) -> list[Path]:
    """Cut model.safetensors in two with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"part-1.safetensors": names[:9], "part-2.safetensors": names[9:]}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / part, metadata={"format": "pt"})
    weight_map = {name: part for part, held in parts.items() for name in held}
    content = {"metadata": {"total_size": 0}, "weight_map": weight_map | (index or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    return [folder / part for part in parts]


def test_shards_load_as_one_file_does(folder, tmp_path):
    expected = load(make_model(tmp_path / "whole")).model(IDS_1T).logits
    files = shard(folder)
    assert weight_files(folder) == files
    assert torch.equal(load(folder).model(IDS_1T).logits, expected)


def test_a_single_file_is_checked_when_an_index_lies_beside_it(folder):
    """transformers reads model.safetensors when both are there, so that is the one to check."""
    whole = (folder / "model.safetensors").read_bytes()
    shard(folder)
    (folder / "model.safetensors").write_bytes(whole[:-10])
    assert weight_files_error(folder).count("model.safetensors is damaged") == 1


# ---------------------------------------------------------------- code that a repository ships

EVIL = """
from pathlib import Path
Path({marker!r}).write_text("executed")
from transformers import LlamaConfig, LlamaForCausalLM
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddModel(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def with_code(folder, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A model of a kind that transformers does not know, with its code beside it; and what that code would write."""
    marker = tmp_path / "executed"
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "odd",
        "auto_map": {"AutoConfig": "evil.OddConfig", "AutoModelForCausalLM": "evil.OddModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder, marker


def test_shipped_code_is_refused_and_not_executed(with_code):
    folder, marker = with_code
    with pytest.raises(ModelError) as error:
        load(folder)
    assert "trust_remote_code" in assert_three_parts(error)
    with pytest.raises(ModelError):
        load_tokenizer(recipe_of(folder), folder)
    assert not marker.exists()


def test_shipped_code_runs_when_it_is_trusted(with_code):
    folder, marker = with_code
    assert type(load(folder, trust_remote_code=True).model).__name__ == "OddModel"
    assert marker.exists()


def test_code_beside_a_known_kind_of_model_is_not_executed_either(with_code):
    """Such as Phi-3 on the hub: transformers' own classes are used and the repository's code is left alone."""
    folder, marker = with_code
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert type(load(folder).model).__name__ == "LlamaForCausalLM"
    assert not marker.exists()


def test_a_tokenizers_shipped_code_is_refused_and_not_executed(with_code):
    folder, marker = with_code
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content |= {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": ["evil.OddTokenizer", None]}}
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError) as error:
        load_tokenizer(recipe_of(folder), folder)
    assert "trust_remote_code" in assert_three_parts(error)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.ckpt", "x.pkl"])
def test_pickled_weights_are_refused(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match="can execute code"):
        load(folder)


# ---------------------------------------------------------------- files that are missing or damaged


def weight_files_error(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        weight_files(folder)
    text = assert_three_parts(error)
    with pytest.raises(ModelError):
        load(folder)
    return text


@pytest.mark.parametrize(
    ("missing", "says"),
    [("config.json", "has no config.json"), ("model.safetensors", "holds no weights"), ("tokenizer", "no tokenizer")],
)
def test_a_missing_part_is_named(folder, missing, says):
    for path in folder.glob(f"{missing}*"):
        path.unlink()
    with pytest.raises(ModelError, match=says) as error:
        load(folder)
    assert str(folder) in assert_three_parts(error)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"llama"', b"{}", b'{"model_type": 3}', b"\xff\xfe{}", b"[" * 100_000, b"\0" * 100],
    ids=["empty", "cut", "list", "null", "text", "no type", "number as type", "not utf-8", "nested", "zeros"],
)
def test_a_damaged_config_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "sixty-four"},
        {"hidden_size": 0},
        {"hidden_size": -64},
        {"hidden_size": 64.5},
        {"hidden_size": None},
        {"hidden_size": [64]},
        {"hidden_size": 128},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": "2"},
        {"vocab_size": 100},
        {"model_type": "no_such_type"},
        {"model_type": "vit"},
        {"model_type": "t5"},
        {"rope_parameters": "x"},
        {"rope_parameters": {"rope_type": "no_such_rope"}},
        {"hidden_act": "no_such_function"},
        {"dtype": "no_such_type"},
        {"tie_word_embeddings": "x"},
        {"transformers_weights": "../other.safetensors"},
        {"quantization_config": "x"},
        {"quantization_config": {"quant_method": "no_such_method"}},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused_in_three_lines(folder, change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError) as error:
        load(folder)
    assert_three_parts(error)


@pytest.mark.parametrize("implementation", ["no_such_attention", "flash_attention_2"])
def test_an_attention_that_is_not_here_is_refused(folder, implementation):
    with pytest.raises(ModelError) as error:
        load(folder, attn_implementation=implementation)
    assert_three_parts(error)


def test_weights_that_are_quantised_already_are_refused(folder, tmp_path):
    loaded = load(folder, torch.bfloat16, QuantRecipe())
    loaded.model.save_pretrained(tmp_path / "four_bit")
    loaded.tokenizer.save_pretrained(tmp_path / "four_bit")
    for quant in (None, QuantRecipe()):
        with pytest.raises(ModelError, match="quantised already"):
            load(tmp_path / "four_bit", quant=quant)


def test_an_adapters_folder_is_no_model(folder, tmp_path):
    """transformers would follow base_model_name_or_path to weights that nobody has checked."""
    other = make_model(tmp_path / "other", seed=1)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(other)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is an adapter's folder"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.3, 0.5, 0.9, -1])
def test_a_file_cut_anywhere_is_refused(folder, kept):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = kept if isinstance(kept, int) else int(kept * len(content))
    path.write_bytes(content[:length])
    assert "model.safetensors is damaged" in weight_files_error(folder)


def test_bytes_after_the_end_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    assert "model.safetensors is damaged" in weight_files_error(folder)


def with_header(path: Path, header: bytes, declared: int | None = None) -> None:
    content = path.read_bytes()
    old = struct.unpack("<Q", content[:8])[0]
    path.write_bytes(struct.pack("<Q", len(header) if declared is None else declared) + header + content[8 + old :])


def header_of(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}', b'{"a": {"dtype": "F32"}}'],
    ids=["empty", "cut", "list", "null", "number", "not utf-8", "nested", "no entry", "half an entry"],
)
def test_a_corrupt_header_is_refused(folder, header):
    with_header(folder / "model.safetensors", header)
    assert "model.safetensors is damaged" in weight_files_error(folder)


@pytest.mark.parametrize("declared", [2**63, 2**64 - 1, 10**9, 120_000, 0])
def test_a_header_length_that_cannot_be_is_refused_without_reading_it(folder, declared):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", declared) + content[8:])
    started = time.perf_counter()
    assert "model.safetensors is damaged" in weight_files_error(folder)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 4]},
        {"data_offsets": [-4, 0]},
        {"data_offsets": [0, 2**62]},
        {"data_offsets": ["0", "4"]},
        {"data_offsets": []},
        {"data_offsets": [0.0, 256.0]},
        {"shape": [2**40, 2**40]},
        {"shape": [-1]},
        {"shape": ["64"]},
        {"shape": 64},
        {"shape": [True] * 64},
        {"dtype": "F64"},
        {"dtype": "I32"},
        {"dtype": "NONE"},
        {"dtype": 32},
    ],
    ids=str,
)
def test_a_tensor_entry_that_cannot_be_is_refused(folder, change):
    path = folder / "model.safetensors"
    header = header_of(path)
    header["model.norm.weight"] |= change
    with_header(path, json.dumps(header).encode())
    with pytest.raises(ModelError) as error:
        load(folder)
    assert_three_parts(error)


def test_a_flipped_byte_in_the_header_is_refused_or_harmless(folder):
    """Each flip either raises or leaves every number as it was (a flip inside the format's own metadata or a space)."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    expected = load(folder).model(IDS_1T).logits
    length = struct.unpack("<Q", content[:8])[0]
    refused = checked = 0
    for place in [*range(8), *range(8, 8 + length, 53)]:
        for mask in (0x01, 0x10, 0x80):
            damaged = bytearray(content)
            damaged[place] ^= mask
            path.write_bytes(bytes(damaged))
            checked += 1
            try:
                assert torch.equal(load(folder).model(IDS_1T).logits, expected), f"byte {place} ^ {mask:#x}"
            except ModelError:
                refused += 1
    assert refused > 0.9 * checked > 50


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("quant", [None, QuantRecipe()], ids=["float32", "nf4"])
def test_a_tensor_that_is_not_in_the_file_is_an_error(folder, name, quant):
    """transformers would start it from random numbers with a warning."""
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match="lacks 1 tensors") as error:
        load(folder, quant=quant)
    assert name in assert_three_parts(error)


def test_a_tensor_of_another_shape_is_an_error_that_names_it(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    with pytest.raises(ModelError) as error:
        load(folder)
    assert "model.norm.weight" in assert_three_parts(error)


def test_whole_numbers_are_no_weights(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    ["../../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", ".hidden.safetensors", "x.bin", 7,
     None, "..\\x.safetensors", "x.safetensors\n", ["x"]],
    ids=repr,
)  # fmt: skip
def test_an_index_that_names_other_places_is_refused(folder, tmp_path, name):
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "x.safetensors")
    shard(folder, {"model.norm.weight": name})
    text = weight_files_error(folder)
    assert "model.safetensors.index.json" in text


def test_a_missing_shard_is_named(folder):
    shard(folder)[1].unlink()
    assert "part-2.safetensors is missing" in weight_files_error(folder)


def test_a_cut_shard_is_named(folder):
    part = shard(folder)[1]
    part.write_bytes(part.read_bytes()[:-1])
    assert "part-2.safetensors is damaged" in weight_files_error(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, '{"weight_map": 1}']
)
def test_a_damaged_index_is_refused(folder, content):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in weight_files_error(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff", b'{"model": {"type": "BPE"}}', b"[" * 100_000])
def test_a_damaged_tokenizer_is_refused(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match="no tokenizer can be loaded"):
        load(folder)


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(folder):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra-{number}>" for number in range(60)])  # 260 + 60 ids fit into 320 rows
    tokenizer.save_pretrained(folder)
    load(folder)
    tokenizer.add_tokens(["<one too many>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="ids up to 320, the model's embedding 320 rows"):
        load(folder)


def test_too_little_memory_is_not_called_a_bad_model(folder, monkeypatch):
    def full(*arguments, **named):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(DoesNotFitError):
        load(folder)


def test_an_error_of_ours_in_loading_is_not_swallowed(folder, monkeypatch):
    def broken(*arguments, **named):
        raise AssertionError("a bug")

    monkeypatch.setattr(load_module, "check_vocabulary", broken)
    with pytest.raises(AssertionError, match="a bug"):
        load(folder)


# ---------------------------------------------------------------- names that are no folders


@pytest.mark.parametrize(
    "name",
    ["../..", "..", ".", "a/b/c", "/nope", "C:\\x", "~nobody-here/x", "a\0b", "x" * 5000, "a/" + "b" * 300, "a b", "-x",
     "a//b", "a/", "/", "a..b", "a--b/c", "org/name.git", "org/-x", "org/x-", "http://x.org/y", "org/näme", "%2e%2e/x",
     "a;rm -rf b", "org/name\n"],
    ids=lambda name: repr(name[:20]),
)  # fmt: skip
def test_a_name_that_is_neither_a_folder_nor_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    with pytest.raises(ModelError) as error:
        describe_model(recipe_of(name))
    assert time.perf_counter() - started < 3
    assert_three_parts(error)


def test_a_file_is_no_model_folder(folder):
    with pytest.raises(ModelError, match="is a file"):
        find_model_folder(recipe_of(folder / "config.json"))


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a\0b", ""])
def test_a_revision_does_not_leave_the_cache(revision, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError):
        find_model_folder(recipe_of("org/name", revision=revision))


TIMED = """
import json, os, sys, time
from thriftune.errors import ModelError
from thriftune.model_files import find_model_folder
from thriftune.recipe import ModelRecipe
found = []
for endpoint in sys.argv[1:]:
    os.environ["HF_ENDPOINT"] = endpoint
    started = time.perf_counter()
    try:
        find_model_folder(ModelRecipe(name="some-organisation/some-model"))
    except ModelError as error:
        found.append((time.perf_counter() - started, str(error)))
print(json.dumps(found))
"""


def test_a_hub_id_without_network_is_an_error_within_three_seconds(tmp_path, record_property):
    """A server that takes connections and never answers, a port where nobody listens, a host that does not exist."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    environment = {key: value for key, value in os.environ.items() if key not in names} | {"HF_HOME": str(tmp_path)}
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        endpoints = [f"http://127.0.0.1:{silent.getsockname()[1]}", "http://127.0.0.1:9", "http://hub.invalid"]
        command = [sys.executable, "-c", TIMED, *endpoints, *endpoints]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == 2 * len(endpoints)
    for number, endpoint in enumerate(endpoints):
        (first_s, message), (again_s, _) = outcomes[number], outcomes[number + len(endpoints)]
        record_property(endpoint, first_s)
        assert min(first_s, again_s) < 3, message  # twice, as the first imports the hub's library on a shared machine
        assert f"some-organisation/some-model is not here, and the hub cannot be reached: {endpoint}" in message
        assert "  allowed: " in message and "  do: " in message


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_offline_is_asked_for_and_said(cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = time.perf_counter()
    with pytest.raises(ModelError, match="not in the local cache, and HF_HUB_OFFLINE is set") as error:
        find_model_folder(recipe_of("some-organisation/some-model"))
    assert time.perf_counter() - started < 3
    assert_three_parts(error)


@pytest.mark.parametrize("offline", ["1", "0"])
def test_what_is_in_the_cache_is_used_without_network(folder, cache, monkeypatch, offline):
    """The hub's cache layout: snapshots/<commit>, with refs/main naming it."""
    place = cache / "models--org--name"
    commit = "0" * 40
    (place / "snapshots").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    folder.rename(place / "snapshots" / commit)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert describe_model(recipe_of("org/name")).total_parameters == 115_008
    assert describe_model(recipe_of("org/name", revision=commit)).total_parameters == 115_008


@pytest.mark.parametrize(
    ("status", "code"), [(404, "RepoNotFound"), (404, "RevisionNotFound"), (401, "GatedRepo"), (403, ""), (500, "")]
)
def test_what_the_hub_refuses_is_said(cache, monkeypatch, status, code):
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)
        with pytest.raises(ModelError, match="the hub did not give org/name") as error:
            find_model_folder(recipe_of("org/name"))
        server.shutdown()
    assert str(status) in assert_three_parts(error)


def test_errors_of_this_room_are_input_errors():
    assert issubclass(ModelError, InputError) and ModelError.exit_code == 2 and DoesNotFitError.exit_code == 3


def test_tensor_shapes_reads_what_was_written(folder):
    shapes = tensor_shapes(folder / "model.safetensors")
    assert shapes["model.norm.weight"] == ("F32", [64])
    assert len(shapes) == 21
