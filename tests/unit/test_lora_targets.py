"""What an adapter can be attached to and with which options: a slip is refused, with what would have been right."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from small_models import make_model
from thriftune.errors import DoesNotFitError, RecipeError
from thriftune.methods import METHODS
from thriftune.methods.lora import REFUSED_OPTIONS
from thriftune.models import LoadedModel, load_model
from thriftune.recipe import ModelRecipe, QuantRecipe, Recipe

WITH_ADAPTER = sorted(name for name, method in METHODS.items() if method.result_folder == "adapter")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: make_model(root / family, family) for family in ("llama", "gpt2")}


def recipe_for(method: str, folder: Path, lora: dict | None = None) -> Recipe:
    rank = {"dynamic": {"r_start": 8}} if method == "dynamic" else {}
    given = {"alpha": 8, **({} if rank else {"r": 4}), **(lora or {})}
    return Recipe.build({"method": method, "model": {"name": str(folder)}, "lora": given, **rank}, "the test's recipe")


@functools.cache
def loaded_once(name: str, four_bit: bool) -> LoadedModel:
    quant = QuantRecipe() if four_bit else None
    return load_model(ModelRecipe(name=name), device=torch.device("cpu"), dtype=torch.float32, quant=quant)


def load_for(recipe: Recipe) -> LoadedModel:
    """A model of its own, copied from one that was loaded once."""
    loaded = loaded_once(recipe.model.name, METHODS[recipe.method].four_bit)
    return dataclasses.replace(loaded, model=copy.deepcopy(loaded.model))


def attach(recipe: Recipe):
    loaded = load_for(recipe)
    return METHODS[recipe.method].attach(loaded, recipe), loaded


def trained(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def refusal(recipe: Recipe) -> str:
    """The problems of a refused recipe, one a line."""
    loaded = load_for(recipe)
    with pytest.raises(RecipeError) as error:
        METHODS[recipe.method].attach(loaded, recipe)
    assert error.value.allowed and error.value.do
    return "\n".join(error.value.problems)


@pytest.mark.parametrize("method", WITH_ADAPTER)
def test_a_partly_wrong_list_of_targets_is_refused(method, folders):
    text = refusal(recipe_for(method, folders["llama"], {"target_modules": ["q_proj", "vproj", "xyz"]}))
    assert "'vproj' matches no" in text and "did you mean v_proj?" in text and "'xyz' matches no" in text
    assert "it has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in text
    assert "'q_proj'" not in text


@pytest.mark.parametrize(
    "targets",
    ["vproj", "q_proj,vproj", r".*\.vproj", "[", "(q_proj", ["mlp"], ["self_attn"], ["layers"], ["norm"], "model", [""],
     ["q_proj", "input_layernorm"], r".*mlp", ".*"],
    ids=str,
)  # fmt: skip
def test_targets_that_are_no_linears_are_refused(targets, folders):
    try:
        recipe = recipe_for("lora", folders["llama"], {"target_modules": targets})
    except RecipeError:
        return  # the recipe itself saw it
    assert "lora.target_modules" in refusal(recipe)


def test_gpt2s_linears_are_listed_though_they_are_of_a_class_of_their_own(folders):
    text = refusal(recipe_for("lora", folders["gpt2"], {"target_modules": ["c_atn"]}))
    assert "did you mean c_attn?" in text and "c_attn, c_fc, c_proj" in text


def test_a_regular_expression_and_a_list_find_the_same(folders):
    by_list = trained(attach(recipe_for("lora", folders["llama"], {"target_modules": ["q_proj", "v_proj"]}))[0])
    by_comma = trained(attach(recipe_for("lora", folders["llama"], {"target_modules": "q_proj, v_proj"}))[0])
    expression = r".*\.(q|v)_proj"
    by_expression = trained(attach(recipe_for("lora", folders["llama"], {"target_modules": expression}))[0])
    assert by_list.keys() == by_comma.keys() == by_expression.keys()
    assert len(by_list) == 2 * 2 * 2


def test_unknown_options_are_refused_with_the_nearest(folders):
    text = refusal(recipe_for("lora", folders["llama"], {"options": {"rank_patern": {}, "lora_bais": True, "zzz": 1}}))
    assert "lora.options.rank_patern" in text and "did you mean rank_pattern?" in text
    assert "did you mean lora_bias?" in text and "lora.options.zzz" in text


@pytest.mark.parametrize(
    ("option", "place"),
    [("r", "lora.r"), ("lora_alpha", "lora.alpha"), ("lora_dropout", "lora.dropout"), ("bias", "lora.bias"),
     ("target_modules", "lora.target_modules"), ("modules_to_save", "lora.modules_to_save"),
     ("use_dora", "lora.use_dora"), ("use_rslora", "lora.use_rslora"), ("init_lora_weights", "lora.init_lora_weights")],
)  # fmt: skip
def test_an_option_that_has_a_place_of_its_own_is_sent_there(option, place, folders):
    assert f"write {place}" in refusal(recipe_for("lora", folders["llama"], {"options": {option: 1}}))


def test_the_table_of_refused_options_is_of_this_peft():
    known = {field.name for field in LoraConfig.__dataclass_fields__.values()}
    assert set(REFUSED_OPTIONS) <= known


@pytest.mark.parametrize("option", sorted(REFUSED_OPTIONS))
def test_options_that_need_more_than_a_word_are_refused(option, folders):
    assert f"lora.options.{option}" in refusal(recipe_for("lora", folders["llama"], {"options": {option: {}}}))


@pytest.mark.parametrize(
    "lora",
    [
        {"options": {"rank_pattern": {"q_porj": 8}}},
        {"options": {"rank_pattern": {"q_proj": 8, "nope": 2}}},
        {"options": {"rank_pattern": {"q_proj": 0}}},
        {"options": {"rank_pattern": {"q_proj": "8"}}},
        {"options": {"rank_pattern": 8}},
        {"options": {"rank_pattern": {"(": 8}}},
        {"options": {"alpha_pattern": {"nope": 2}}},
        {"options": {"layers_to_transform": [1]}},
        {"target_modules": ["q_proj"], "options": {"layers_to_transform": [7]}},
        {"target_modules": ["q_proj"], "options": {"layers_to_transform": [1, 7]}},
        {"target_modules": ["q_proj"], "options": {"layers_to_transform": "x"}},
        {"options": {"exclude_modules": ["nope"]}},
        {"options": {"trainable_token_indices": [320]}},
        {"options": {"trainable_token_indices": [-1]}},
        {"options": {"trainable_token_indices": "x"}},
        {"modules_to_save": ["lm_heads"]},
        {"modules_to_save": ["norm", "nope"]},
        {"init_lora_weights": "guassian"},
        {"init_lora_weights": "orthogonal", "r": 3},
        {"init_lora_weights": "mica", "r": 65},
    ],
    ids=str,
)
def test_options_that_peft_takes_in_silence_or_dies_of_are_refused(lora, folders):
    assert "lora" in refusal(recipe_for("lora", folders["llama"], lora))


@pytest.mark.parametrize("init", ["pissa", "olora", "OLoRA", "orthogonal", "mica", "corda", "loftq", "pissa_niter_4"])
def test_initialisations_that_rewrite_the_base_are_refused_on_four_bits(init, folders):
    text = refusal(recipe_for("qlora", folders["llama"], {"init_lora_weights": init}))
    assert f"lora.init_lora_weights {init!r}" in text and "4 bits" in text


@pytest.mark.parametrize("method", sorted({*WITH_ADAPTER} - {"dynamic"}))  # its recipe refuses every initialisation
@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga", "loftq", "EVA"])
def test_initialisations_that_need_preparation_are_refused(method, init, folders):
    assert "preparation" in refusal(recipe_for(method, folders["llama"], {"init_lora_weights": init}))


def test_pissa_with_random_factors_is_refused(folders):
    assert "use pissa" in refusal(recipe_for("lora", folders["llama"], {"init_lora_weights": "pissa_niter_4"}))


def test_all_problems_come_at_once(folders):
    lora = {"init_lora_weights": "eva", "options": {"zzz": 1, "r": 2}, "target_modules": ["vproj"]}
    assert len(refusal(recipe_for("lora", folders["llama"], lora)).splitlines()) == 4


def test_too_little_memory_for_the_adapter_is_not_called_a_bad_recipe(folders, monkeypatch):
    def full(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory (test)")

    monkeypatch.setattr("peft.get_peft_model", full)
    with pytest.raises(DoesNotFitError):
        attach(recipe_for("lora", folders["llama"]))
