"""What a name stands for: a run, an adapter, a checkpoint, a model; and what each lacks when it lacks something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from small_models import make_model
from thriftune.errors import InputError, ModelError, RecipeError, ThriftuneError
from thriftune.recipe import Recipe
from thriftune.target import find_target, open_target
from tiny import tiny_recipe, tiny_rows, train_tiny

CPU = torch.device("cpu")
IDS_BT = torch.tensor([[5, 80, 99, 104, 81, 7, 33, 12]])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run of each method, with a checkpoint at step 1 and its result at step 2."""
    root = tmp_path_factory.mktemp("runs")
    base, rows = make_model(root / "base"), tiny_rows(root / "rows.jsonl", 8)
    found = {"base": base}
    for method in ("lora", "qlora", "full"):
        train = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        train_tiny(tiny_recipe(base, rows, root / method, method=method, train=train))
        found[method] = root / method
    return found


def logits_of(name: Path | str) -> torch.Tensor:
    with torch.no_grad():
        return open_target(find_target(str(name)), CPU).model(input_ids=IDS_BT).logits


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_and_its_adapter_are_the_same(runs, method):
    run, adapter = find_target(str(runs[method])), find_target(str(runs[method] / "adapter"))
    for target in (run, adapter):
        assert target.is_run and target.adapter == runs[method] / "adapter"
        assert target.four_bit == (method == "qlora") and target.base.name == str(runs["base"])
        assert target.recipe.method == method and target.recipe.train.max_steps == 2
    assert torch.equal(logits_of(runs[method]), logits_of(runs[method] / "adapter"))
    assert not torch.equal(logits_of(runs[method]), logits_of(runs["base"]))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_checkpoint_is_the_model_of_its_step(runs, method):
    early, last = runs[method] / "checkpoint-1", runs[method] / "checkpoint-2"
    assert find_target(str(early)).is_run
    assert torch.equal(logits_of(last), logits_of(runs[method]))
    assert not torch.equal(logits_of(early), logits_of(last))


def test_a_full_run_is_its_model(runs):
    target = find_target(str(runs["full"]))
    assert target.adapter is None and target.is_run and target.base.name == str(runs["full"] / "model")
    assert torch.equal(logits_of(runs["full"]), logits_of(runs["full"] / "model"))


def test_a_full_runs_checkpoint_says_what_it_is(runs):
    with pytest.raises(InputError, match="checkpoint of a full run") as error:
        find_target(str(runs["full"] / "checkpoint-1"))
    assert str(runs["full"] / "model") in error.value.do or "resume" in error.value.do


def test_a_model_and_a_hub_id_stand_for_themselves(runs):
    for name in (str(runs["base"]), "some-organisation/some-model", "pocket"):
        target = find_target(name)
        assert target.base.name == name and target.adapter is None and not target.is_run and not target.four_bit
        assert target.recipe == Recipe(model=target.base)


def test_open_targets_do_not_train(runs):
    for method in ("lora", "qlora", "full"):
        opened = open_target(find_target(str(runs[method])), CPU)
        assert not opened.model.training and not any(module.training for module in opened.model.modules())
        assert not any(parameter.requires_grad for parameter in opened.model.parameters())
        assert opened.stop_token_ids == [0]


def test_an_adapter_away_from_its_run_names_its_own_base(runs, tmp_path):
    (runs["lora"] / "adapter").rename(tmp_path / "mine")
    try:
        target = find_target(str(tmp_path / "mine"))
        assert target.base.name == str(runs["base"]) and not target.is_run
        logits_of(tmp_path / "mine")
    finally:
        (tmp_path / "mine").rename(runs["lora"] / "adapter")


@pytest.mark.parametrize("folder", ["downloaded", "adapter"])
def test_a_neighbouring_recipe_is_not_a_runs(runs, tmp_path, folder):
    """An adapter in a folder where somebody keeps a recipe of another model, with nothing decided yet."""
    copied = tmp_path / folder
    copied.mkdir()
    for part in (runs["lora"] / "adapter").iterdir():
        (copied / part.name).write_bytes(part.read_bytes())
    (tmp_path / "recipe.yaml").write_text("model: pocket\nmethod: auto\n")
    target = find_target(str(copied))
    assert target.base.name == str(runs["base"]) and not target.is_run


def test_a_run_without_a_result_says_how_to_finish_it(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for content in ("method: lora\n", "method: full\n", "method: auto\n"):
        recipe.write_text(content)
        with pytest.raises(InputError, match="has no result yet") as error:
            find_target(str(tmp_path))
        assert f"--config {recipe} resume_from_checkpoint=auto" in error.value.do


def test_a_run_with_an_empty_result_is_an_error(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "recipe.yaml").write_text(f"method: lora\nmodel: {make_model(tmp_path / 'base')}\n")
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        open_target(find_target(str(tmp_path)), CPU)


@pytest.mark.parametrize("content", ["[", "method: nope", "- a", "a: {b: 1}", "\x00"])
def test_a_damaged_recipe_of_a_run_is_an_input_error(tmp_path, content):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises((InputError, RecipeError)):
        find_target(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", *(f'{{"base_model_name_or_path": {base}}}' for base in ("null", "7", '""')), "[" * 100_000],
    ids=lambda content: content[:40],
)
def test_an_adapter_that_names_no_base_is_an_error(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match="names no base_model_name_or_path"):
        find_target(str(tmp_path))


def test_an_adapters_base_may_not_be_an_adapter(runs, tmp_path):
    (tmp_path / "a").mkdir()
    config = json.loads((runs["lora"] / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is an adapter's folder"):
        open_target(find_target(str(tmp_path / "a")), CPU)


@pytest.mark.parametrize("name", ["../..", "a/b/c", "/nope", "~nobody-here", "a\0b", "x" * 5000, "a/" + "b" * 300, ""])
def test_names_that_stand_for_nothing_are_input_errors(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ThriftuneError) as error:
        open_target(find_target(name), CPU)
    assert error.value.exit_code == 2
