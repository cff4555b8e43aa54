"""Every method with every kind of option: how it starts, what trains, what is saved, and who else can read it.

A method added to METHODS is taken up by the tests of `EVERY_METHOD` by itself.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, PrefixTuningConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from small_models import make_model
from thriftune.errors import CheckpointError, ModelError
from thriftune.methods import METHODS, trainable_parameters
from thriftune.methods.lora import ADAPTER_FILE
from thriftune.models import LoadedModel, load_model
from thriftune.models.surgery import count_parameters, keep_four_bit_weights_as_they_are
from thriftune.recipe import ModelRecipe, QuantRecipe, Recipe
from thriftune.target import attach_adapter, find_target, open_target
from tiny import tiny_recipe, tiny_rows, train_tiny

CPU = torch.device("cpu")
IDS_BT = torch.tensor([[5, 80, 99, 104, 81, 7, 33, 12], [9, 9, 200, 3, 2, 60, 61, 0]])
EVERY_METHOD = sorted(METHODS)
WITH_ADAPTER = sorted(name for name, method in METHODS.items() if method.result_folder == "adapter")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# name -> (lora options, kind of model). Rank 4 and all-linear where nothing else is said.
OPTIONS = {
    "plain": ({}, "llama"),
    "plain on gpt2": ({}, "gpt2"),
    "plain on phi3": ({}, "phi3"),
    "plain on a tied head": ({}, "llama-tied"),
    "rank 1": ({"r": 1, "alpha": 1}, "llama"),
    "rank beyond the matrices": ({"r": 96}, "llama"),
    "list": ({"target_modules": ["q_proj", "v_proj"]}, "llama"),
    "comma list": ({"target_modules": "q_proj,v_proj"}, "llama"),
    "regular expression": ({"target_modules": r".*layers\.1\..*\.(q|v)_proj"}, "llama"),
    "one name": ({"target_modules": "down_proj"}, "llama"),
    "head too": ({"target_modules": [*ATTENTION, "lm_head"]}, "llama"),
    "embedding too": ({"target_modules": ["q_proj", "embed_tokens"]}, "llama"),
    "gpt2's own names": ({"target_modules": ["c_attn"]}, "gpt2"),
    "rslora": ({"use_rslora": True}, "llama"),
    "dora": ({"use_dora": True}, "llama"),
    "gaussian": ({"init_lora_weights": "gaussian"}, "llama"),
    "dropout": ({"dropout": 0.3}, "llama"),
    "bias all": ({"bias": "all"}, "qwen2"),
    "bias lora_only": ({"bias": "lora_only"}, "qwen2"),
    "head whole": ({"modules_to_save": ["lm_head"]}, "llama"),
    "head and embedding whole": ({"modules_to_save": ["lm_head", "embed_tokens"]}, "llama"),
    "norm whole": ({"modules_to_save": ["norm"]}, "llama"),
    "tied head whole": ({"modules_to_save": ["lm_head"]}, "llama-tied"),
    "tied head and embedding whole": (
        {"modules_to_save": ["embed_tokens"], "options": {"ensure_weight_tying": True}},
        "llama-tied",
    ),
    "ranks by name": ({"options": {"rank_pattern": {"q_proj": 8, "down_proj": 2}}}, "llama"),
    "scales by name": ({"options": {"alpha_pattern": {"q_proj": 64}}}, "llama"),
    "one layer": ({"target_modules": ATTENTION, "options": {"layers_to_transform": [1]}}, "llama"),
    "without some": ({"options": {"exclude_modules": ["down_proj", "o_proj"]}}, "llama"),
    "with bias": ({"options": {"lora_bias": True}}, "llama"),
    "some tokens": ({"options": {"trainable_token_indices": [0, 5]}}, "llama"),
}
# Initialisations that rewrite or read the base weight: on an unquantised base only.
ON_PLAIN_BASE = {
    "pissa": ({"init_lora_weights": "pissa"}, "llama"),
    "olora": ({"init_lora_weights": "olora"}, "llama"),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, "llama"),
    "mica": ({"init_lora_weights": "mica"}, "llama"),
    "pissa on gpt2": ({"init_lora_weights": "pissa"}, "gpt2"),
}
ON_FOUR_BITS = [
    *("plain", "plain on gpt2", "plain on phi3", "plain on a tied head", "list", "head too", "embedding too", "rslora"),
    *("dora", "gaussian", "bias all", "head whole", "tied head and embedding whole", "ranks by name", "some tokens"),
]
CASES = [
    *(("lora", name) for name in (*OPTIONS, *ON_PLAIN_BASE)),
    *(("qlora", name) for name in ON_FOUR_BITS),
]
# How far the start may be from the base's logits, as a share: exactly nothing, but for these.
START_MAY_DIFFER = {"pissa": 1e-4, "olora": 1e-4, "pissa on gpt2": 1e-4, "orthogonal": 1e-5, "dora": 1e-5}
START_MAY_DIFFER_IN_4_BIT = {"dora": 3e-2}  # its magnitudes are computed from the de-quantised weight


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    made = {family: make_model(root / family, family) for family in ("llama", "qwen2", "gpt2", "phi3")}
    return made | {"llama-tied": make_model(root / "llama-tied", "llama", tied=True)}


def recipe_for(method: str, folder: Path, lora: dict | None = None, **changes) -> Recipe:
    tree = {"method": method, "model": {"name": str(folder)}, **changes}
    if method in WITH_ADAPTER:
        tree["lora"] = {"r": 4, "alpha": 8, **(lora or {})}
    if method == "dynamic":
        tree["dynamic"] = {"r_start": tree["lora"].pop("r"), "round_to": 1}
    return Recipe.build(tree, source="the test's recipe")


@functools.cache
def loaded_once(name: str, dtype: torch.dtype, four_bit: bool) -> LoadedModel:
    quant = QuantRecipe() if four_bit else None
    return load_model(ModelRecipe(name=name), device=CPU, dtype=dtype, quant=quant)


def load_for(recipe: Recipe, dtype=torch.float32) -> LoadedModel:
    """A model of its own, copied from one that was loaded once."""
    loaded = loaded_once(recipe.model.name, dtype, METHODS[recipe.method].four_bit)
    return dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))


def attach(recipe: Recipe, dtype=torch.float32):
    loaded = load_for(recipe, dtype)
    return METHODS[recipe.method].attach(loaded, recipe).eval(), loaded


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS_BT).logits.float()


def trained(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_a_little(model, seed: int = 5) -> None:
    """Move everything that trains, as steps would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def case(method: str, name: str, folders) -> Recipe:
    lora, kind = {**OPTIONS, **ON_PLAIN_BASE}[name]
    return recipe_for(method, folders[kind], lora)


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize(("method", "name"), CASES)
def test_the_start_is_the_base_model(method, name, folders):
    recipe = case(method, name, folders)
    loaded = load_for(recipe)
    base = logits_of(loaded.model)
    model = METHODS[method].attach(loaded, recipe).eval()
    share = distance(logits_of(model), base)
    limits = {**START_MAY_DIFFER, **(START_MAY_DIFFER_IN_4_BIT if METHODS[method].four_bit else {})}
    assert share <= limits.get(name, 0.0), f"the start is {share:.2g} away from the base"


@pytest.mark.parametrize(("method", "name"), CASES)
def test_only_what_is_meant_trains_and_in_float32(method, name, folders):
    recipe = case(method, name, folders)
    model, _ = attach(recipe, torch.bfloat16)
    found = trained(model)
    assert found and {parameter.dtype for parameter in found.values()} == {torch.float32}
    allowed = [".lora_"]
    if recipe.lora.modules_to_save:
        allowed.append(".modules_to_save.")
    if recipe.lora.bias != "none":
        allowed.append(".bias")
    if "trainable_token_indices" in recipe.lora.options:
        allowed.append(".trainable_tokens_")
    assert not [key for key in found if not any(part in key for part in allowed)]
    # What PEFT says it is, and what get_base_model holds besides.
    assert trainable_parameters(model) == model.get_nb_trainable_parameters()[0]
    # A gradient reaches all of it, through the base in bfloat16 or four bits.
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=IDS_BT, labels=IDS_BT).loss
    loss.backward()
    without = [key for key, parameter in found.items() if parameter.grad is None]
    assert not without
    assert any(float(parameter.grad.abs().sum()) > 0 for parameter in found.values())
    assert not [
        key for key, parameter in model.named_parameters() if not parameter.requires_grad and parameter.grad is not None
    ]


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "phi3", "qwen2"])
@pytest.mark.parametrize("method", WITH_ADAPTER)
def test_the_count_is_rank_times_both_sides(method, kind, folders):
    recipe = recipe_for(method, folders[kind])
    model, loaded = attach(recipe)
    assert trainable_parameters(model) == 4 * loaded.description.linear_sides
    adapter = trainable_parameters(model)
    assert count_parameters(model) == loaded.description.total_parameters + adapter


def test_the_count_of_full_is_the_whole_model(folders):
    model, loaded = attach(recipe_for("full", folders["llama-tied"]))
    assert trainable_parameters(model) == count_parameters(model) == loaded.description.total_parameters
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())


def test_full_trains_in_float32_over_a_bfloat16_base(folders):
    model, _ = attach(recipe_for("full", folders["llama"]), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_the_same_seed_gives_the_same_start(method, folders):
    torch.manual_seed(1)
    first = trained(attach(recipe_for(method, folders["llama"], seed=11))[0])
    torch.manual_seed(2)
    second = trained(attach(recipe_for(method, folders["llama"], seed=11))[0])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", WITH_ADAPTER)
def test_another_seed_gives_another_start(method, folders):
    first = trained(attach(recipe_for(method, folders["llama"], seed=11))[0])
    second = trained(attach(recipe_for(method, folders["llama"], seed=12))[0])
    assert not [name for name in first if "lora_A" in name and torch.equal(first[name], second[name])]


# ---------------------------------------------------------------- saved, loaded, exported


@pytest.mark.parametrize(("method", "name"), [*CASES, ("full", "plain"), ("full", "plain on a tied head")])
def test_what_is_saved_comes_back_bit_for_bit(method, name, folders, tmp_path):
    recipe = case(method, name, folders)
    model, _ = attach(recipe)
    train_a_little(model)
    METHODS[method].save(model, tmp_path)
    again, _ = attach(recipe.replace(seed=99))
    METHODS[method].load(again, tmp_path)
    before, after = trained(model), trained(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits_of(again), logits_of(model))


@functools.cache
def plain_base_once(name: str, four_bit: bool):
    quant = None
    if four_bit:
        quant = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, quantization_config=quant)
    keep_four_bit_weights_as_they_are(base)
    return base.eval()


def plain_base(recipe: Recipe):
    """The base as anybody loads it with transformers, quantised in the same way for qlora."""
    return copy.deepcopy(plain_base_once(recipe.model.name, METHODS[recipe.method].four_bit))


@pytest.mark.parametrize(("method", "name"), CASES)
def test_an_exported_adapter_is_the_same_in_peft_and_here(method, name, folders, tmp_path):
    recipe = case(method, name, folders)
    model, loaded = attach(recipe)
    train_a_little(model)
    METHODS[method].export(model, loaded, tmp_path)
    expected = logits_of(model)
    assert distance(expected, logits_of(plain_base(recipe))) > 1e-3, "the test needs an adapter that does something"
    # An initialisation that rewrites the base computes it once more.
    most = 1e-4 if name in ("pissa", "olora", "pissa on gpt2") else 1e-6
    in_peft = PeftModel.from_pretrained(plain_base(recipe), tmp_path).eval()
    assert distance(logits_of(in_peft), expected) <= most
    here = attach_adapter(load_for(recipe).model, tmp_path)
    assert not here.training, "dropout would be on"
    assert distance(logits_of(here), expected) <= most


@pytest.mark.parametrize("method", WITH_ADAPTER)
def test_a_saved_adapter_is_the_same_bytes_each_time(method, folders, tmp_path):
    recipe = recipe_for(method, folders["llama"])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        METHODS[method].save(attach(recipe)[0], tmp_path / name)
    for file in (ADAPTER_FILE, "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    targets = json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets), "a set's order would change from process to process"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_an_exported_whole_model_is_read_by_transformers(stored, tmp_path):
    folder = make_model(tmp_path / "base", dtype=stored)
    recipe = recipe_for("full", folder)
    model, loaded = attach(recipe)
    train_a_little(model)
    expected = {name: parameter.detach().to(stored) for name, parameter in model.named_parameters()}
    (tmp_path / "out").mkdir()
    METHODS["full"].export(model, loaded, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    found = dict(again.named_parameters())
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == stored and torch.equal(found[name], expected[name]) for name in expected)
    from_here = load_model(recipe_for("lora", tmp_path / "out").model, device=CPU, dtype=torch.float32, quant=None)
    assert from_here.tokenizer("what").input_ids == loaded.tokenizer("what").input_ids


def test_odd_generation_defaults_of_a_base_do_not_stop_the_export(tmp_path):
    """Models on the hub carry a temperature beside do_sample=false; transformers refuses to save such a pair."""
    folder = make_model(tmp_path / "base")
    odd = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 2]}
    (folder / "generation_config.json").write_text(json.dumps(odd))
    model, loaded = attach(recipe_for("full", folder))
    (tmp_path / "out").mkdir()
    METHODS["full"].export(model, loaded, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, 2]


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_what_a_run_leaves_is_read_by_everybody(method, tmp_path):
    """A run of three steps, then its result by PEFT or transformers alone, and by this package."""
    base = make_model(tmp_path / "base")
    rows = tiny_rows(tmp_path / "rows.jsonl", 12)
    recipe = tiny_recipe(base, rows, tmp_path / "run", method=method, train={"max_steps": 3, "save_strategy": "steps"})
    record = train_tiny(recipe)
    result = Path(record.adapter)
    opened = open_target(find_target(str(tmp_path / "run")), CPU)
    expected = logits_of(opened.model)
    assert distance(expected, logits_of(plain_base(recipe))) > 1e-3
    if method == "full":
        plain = AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32)
    else:
        assert sorted(path.name for path in result.glob("*.safetensors")) == [ADAPTER_FILE]
        plain = PeftModel.from_pretrained(plain_base(recipe), result)
        assert json.loads((result / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert torch.equal(logits_of(plain.eval()), expected)
    if method == "lora":
        auto = AutoPeftModelForCausalLM.from_pretrained(result, dtype=torch.float32).eval()
        assert torch.equal(logits_of(auto), expected)
    if method == "full":
        assert record.trainable_parameters == sum(parameter.numel() for parameter in plain.parameters())
    else:
        assert record.trainable_parameters == sum(
            tensor.numel() for tensor in load_file(result / ADAPTER_FILE).values()
        )


def test_the_bases_revision_is_written_into_the_adapter(folders, tmp_path):
    recipe = recipe_for("lora", folders["llama"], model={"name": str(folders["llama"]), "revision": "v1.0"})
    METHODS["lora"].save(attach(recipe)[0], tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v1.0"
    assert find_target(str(tmp_path)).base.revision == "v1.0"


# ---------------------------------------------------------------- adapters that do not belong


@pytest.fixture
def adapter(folders, tmp_path) -> Path:
    recipe = recipe_for("lora", folders["llama"])
    model, loaded = attach(recipe)
    train_a_little(model)
    (tmp_path / "adapter").mkdir()
    METHODS["lora"].export(model, loaded, tmp_path / "adapter")
    return tmp_path / "adapter"


def change_tensors(adapter: Path, change) -> None:
    tensors = load_file(adapter / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, adapter / ADAPTER_FILE)


def attached(folders, adapter: Path, kind: str = "llama"):
    return attach_adapter(load_for(recipe_for("lora", folders[kind])).model, adapter)


A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(A), rf"1 missing \(first: {A}\)"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), r"1 unexpected \(first: extra\)"),
        (lambda tensors: tensors.update({A: torch.ones(3, 64)}), rf"1 of another shape \(first: {A}\)"),
        (lambda tensors: tensors.update({f"{A}x": tensors.pop(A)}), "1 missing .*, 1 unexpected"),
        (lambda tensors: tensors.clear(), "28 missing"),
    ],
    ids=["missing", "unexpected", "misshapen", "renamed", "empty"],
)
def test_tensors_that_do_not_belong_are_errors(folders, adapter, change, says):
    change_tensors(adapter, change)
    with pytest.raises(CheckpointError, match=says):
        attached(folders, adapter)


def test_tensors_that_are_no_numbers_are_errors(folders, adapter):
    change_tensors(adapter, lambda tensors: tensors[A].fill_(math.nan))
    with pytest.raises(CheckpointError, match="not finite"):
        attached(folders, adapter)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_an_adapter_of_another_model_is_an_error(folders, adapter, kind):
    if kind == "qwen2":  # the same names and shapes would fit; another width does not
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 8}))
    with pytest.raises((CheckpointError, ModelError)):
        attached(folders, adapter, kind)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_cut_adapter_is_an_error(folders, adapter, kept):
    path = adapter / ADAPTER_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="is damaged"):
        attached(folders, adapter)


def test_a_missing_adapter_file_is_an_error(folders, adapter):
    (adapter / ADAPTER_FILE).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        attached(folders, adapter)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b"\xff", b'{"peft_type": "NOPE"}', b'{"peft_type": "LORA", "r": "x"}',
     b'{"peft_type": "LORA", "target_modules": ["nope"]}', b'{"peft_type": "LORA", "target_modules": 3}',
     b'{"peft_type": 7}', b"[" * 100_000, None],
    ids=repr,
)  # fmt: skip
def test_a_damaged_adapter_config_is_an_error(folders, adapter, content):
    path = adapter / "adapter_config.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises((ModelError, CheckpointError)) as error:
        attached(folders, adapter)
    assert str(adapter) in error.value.given


def test_an_adapter_of_another_kind_is_an_error(folders, adapter):
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4).save_pretrained(str(adapter))
    with pytest.raises(ModelError, match="PREFIX_TUNING"):
        attached(folders, adapter)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_checkpoint_of_another_recipe_is_an_error(method, folders, tmp_path):
    METHODS[method].save(attach(recipe_for(method, folders["llama"]))[0], tmp_path)
    other = recipe_for(method, folders["llama-tied"] if method == "full" else folders["llama"], {"r": 8})
    with pytest.raises(CheckpointError, match="does not belong to this model and recipe"):
        METHODS[method].load(attach(other)[0], tmp_path)
