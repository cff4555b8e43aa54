"""Method dynamic by the ordinary path: what cuts do to loss, memory, engine and optimizer, resuming, and the export."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from thriftune.engine.choose import engine_path
from thriftune.errors import NonFiniteLossError, RecipeError
from thriftune.methods import METHODS
from thriftune.methods.dynamic_rank import DynamicRankMethod
from thriftune.models import load_model
from thriftune.records import RunRecord
from thriftune.target import find_target, open_target
from thriftune.train import change
from tiny import losses_of, metrics_of, numbers_of, record_of, tiny_model, tiny_recipe, tiny_rows, train_tiny

CPU = torch.device("cpu")
IDS_BT = torch.arange(3, 39).reshape(2, 18)
# Of one module in three nothing stays: half of the rest's energy is asked for with blocks that are large for rank 8.
HARD = {"r_start": 8, "keep": 0.2, "round_to": 4, "first_cut": 0.2, "last_cut": 0.6, "n_cuts": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("tiny") / "rows.jsonl", 22)


def run(model: Path | str, rows: Path | str, output: Path, **changes: Any) -> RunRecord:
    train = {"max_steps": 10, "learning_rate": 3e-3, **changes.pop("train", {})}
    return train_tiny(tiny_recipe(model, rows, output, method="dynamic", train=train, **changes))


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def ranks_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    pattern = re.compile(r"base_model\.model\.(.+)\.lora_A\.weight")
    return {match.group(1): tensor.shape[0] for name, tensor in tensors.items() if (match := pattern.fullmatch(name))}


# -- what a cut does --------------------------------------------------------------------------------------------------


def test_half_of_the_adapter_stays_and_the_record_tells_how(model, rows, tmp_path):
    record = run(model, rows, tmp_path / "run")
    assert [cut.step for cut in record.cuts] == [2, 5]
    first, last = record.cuts
    whole = first.parameters_before
    assert last.parameters_after == record.trainable_parameters <= whole / 2 < 1.1 * last.parameters_after
    assert first.parameters_after == last.parameters_before
    assert 0.45 < 1 - last.held_bytes_after / first.held_bytes_before < 0.55
    assert first.copies_bytes_before == last.copies_bytes_after == 0, "autograd has none"
    ranks = ranks_of(adapter_of(tmp_path / "run"))
    assert {name: rank for name, rank in last.ranks.items() if rank} == ranks and len(last.ranks) == 14
    assert all(rank % 2 == 0 for rank in ranks.values()) and len(set(ranks.values())) > 1
    assert 0 < last.loss_after - last.loss_before < 0.1
    assert sum("ranks cut after step" in event for event in record.events) == 2
    assert record.cuts == record_of(tmp_path / "run").cuts, "they are in record.json"


def test_directions_without_energy_go_without_a_trace(model, rows, tmp_path):
    """Every B has rank 5 of 16. A scale that a cut changed, or factors in another order, would change the output."""
    recipe = tiny_recipe(model, rows, tmp_path / "run", method="dynamic", dynamic={"r_start": 16, "round_to": 1})
    attached, method = attach(recipe), METHODS["dynamic"]
    layers = [module for module in attached.modules() if hasattr(module, "lora_B")]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            b = layer.lora_B["default"].weight
            b.copy_(torch.randn(b.shape[0], 5, generator=draw) @ torch.randn(5, b.shape[1], generator=draw) * 0.05)
    before, scales = logits_of(attached), [layer.scaling["default"] for layer in layers]
    changed = method.between_steps(recipe, 1, 1)(attached)
    assert min(changed.ranks.values()) >= 5 and max(changed.ranks.values()) < 16
    torch.testing.assert_close(logits_of(attached), before, rtol=0, atol=2e-5)
    assert [layer.scaling["default"] for layer in layers] == scales


def attach(recipe: Any) -> Any:
    loaded = load_model(recipe.model, device=CPU, dtype=torch.float32, quant=None)
    return METHODS[recipe.method].attach(loaded, recipe).eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS_BT).logits


@pytest.fixture
def spoil(monkeypatch) -> Callable[[Callable[..., None]], None]:
    """`spoil(after)`: the optimizer's part of a cut is done by `after(replace, optimizer, replacements)`."""
    replace = change.replace_parameters

    def install(after: Callable[..., None]) -> None:
        monkeypatch.setattr(change, "replace_parameters", lambda *given: after(replace, *given))

    return install


def test_resetting_the_moments_instead_ends_with_a_worse_loss(tmp_path, spoil):
    """A cut that forgets Adam's moments lets every parameter jump by a whole rate, wherever its noise points. The model
    and the sums inside the package; seeds 42, 1 and 2 are worse by 0.21 to 0.24, through the engine and autograd alike
    (seed 7 by 0.05)."""
    changes = {
        "train": {"max_steps": 30, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"},
        "dynamic": {"r_start": 32, "round_to": 1, "n_cuts": 4, "first_cut": 0.3, "last_cut": 0.9},
        "lora": {"alpha": 32.0, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
        "data": {"max_samples": 240},
        "engine": "auto",
        "seed": 1,
    }

    def loss_from_the_first_cut_on(output: Path) -> float:
        run("pocket", "sums", output, **{**changes, "train": {**changes["train"], "gradient_accumulation_steps": 1}})
        losses = losses_of(output)
        assert losses[0] - losses[-1] > 3, "the run must learn for the comparison to say much"
        return sum(losses[9:]) / len(losses[9:])

    def reset(replace: Any, optimizer: torch.optim.Optimizer, replacements: Any) -> None:
        replace(optimizer, replacements)
        optimizer.state.clear()

    carried = loss_from_the_first_cut_on(tmp_path / "carried")
    spoil(reset)
    assert loss_from_the_first_cut_on(tmp_path / "reset") > carried + 0.1


def test_the_optimizer_trains_what_is_live(model, rows, tmp_path, spoil, monkeypatch):
    """The tensors after the last cut are not those at the end; with an optimizer that kept the old ones they are."""
    after_cut: list[dict[str, torch.Tensor]] = []
    save = DynamicRankMethod.save

    def at_end(self: Any, model: Any, folder: Path) -> None:
        after_cut.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        save(self, model, folder)

    monkeypatch.setattr(DynamicRankMethod, "save", at_end)
    changes = {"train": {"max_steps": 10, "save_strategy": "steps", "save_steps": 5}}

    def moved(output: Path) -> set[bool]:
        after_cut.clear()
        run(model, rows, output, **changes)
        cut, end = after_cut[0], after_cut[-1]
        assert cut.keys() == end.keys()
        return {not torch.equal(cut[name], end[name]) for name in cut}

    assert moved(tmp_path / "live") == {True}
    spoil(lambda replace, optimizer, replacements: None)
    assert moved(tmp_path / "stale") == {False}


def test_weights_that_are_not_finite_end_the_run_before_they_are_cut(model, rows, tmp_path):
    train = {"weight_decay": 1e38, "learning_rate": 10.0}
    with pytest.raises(NonFiniteLossError, match="the update of step 1 made weights that are NaN or infinite"):
        run(model, rows, tmp_path / "run", train=train, dynamic={"first_cut": 0.1})


# -- the engine -------------------------------------------------------------------------------------------------------


def test_the_engine_follows_every_cut(model, rows, tmp_path):
    """Losses through the engine are those of autograd through the model, before, between and after cuts that take
    adapters off; a stale copy in a stack's buffer would show."""
    for engine in ("auto", "off"):
        run(model, rows, tmp_path / engine, engine=engine, dynamic=HARD, train={"adam_epsilon": 1e-3})
    ours, generic = (record_of(tmp_path / engine) for engine in ("auto", "off"))
    assert (ours.path, generic.path) == ("engine", "generic")
    assert ours.cuts[-1].ranks == generic.cuts[-1].ranks and 0 in ours.cuts[-1].ranks.values()
    assert losses_of(tmp_path / "auto") == pytest.approx(losses_of(tmp_path / "off"), abs=1e-5)
    for mine, theirs in zip(ours.cuts, generic.cuts, strict=True):
        assert mine.loss_after == pytest.approx(theirs.loss_after, abs=1e-5)
        assert mine.loss_after != pytest.approx(mine.loss_before, abs=1e-4)


def test_the_engines_buffers_shrink_and_the_linears_stay_views_of_them(model, rows, tmp_path):
    dynamic = {**HARD, "r_start": 64, "round_to": 16, "keep": 0.3}
    recipe = tiny_recipe(model, rows, tmp_path / "run", method="dynamic", dynamic=dynamic)
    attached = attach(recipe)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    path = engine_path(attached, CPU, [18], 36, 0, "off", False)
    stacks = [stack for layer in path.program.layers for stack in layer.stacks]
    weights = {name: p.detach().clone() for name, p in attached.named_parameters() if "base_layer" in name}
    before, copies_before = sum(stack.buffer_YX.nbytes for stack in stacks), path.copies_bytes()
    changed = METHODS["dynamic"].between_steps(recipe, 1, 1)(attached)
    path.parameters_changed()
    after = sum(stack.buffer_YX.nbytes for stack in stacks)
    frozen = 4 * sum(tensor.numel() for tensor in weights.values())
    assert after - frozen < 0.5 * (before - frozen)
    assert (copies_before, path.copies_bytes()) == (before - frozen, after - frozen)
    assert sum(stack.rank for stack in stacks) < sum(changed.ranks.values()) + 16 * len(stacks)
    for stack in stacks:
        start, end = stack.buffer_YX.data_ptr(), stack.buffer_YX.data_ptr() + stack.buffer_YX.nbytes
        assert all(start <= part.linear.weight.data_ptr() < end for part in stack.parts)
    now = dict(attached.named_parameters())
    for name, weight in weights.items():
        assert torch.equal(now.get(name, now.get(name.replace(".base_layer", ""))), weight), name


@pytest.mark.parametrize("held", [False, True])
def test_stacks_of_4_bit_weights_follow_adapters_of_other_ranks(model, rows, tmp_path, held):
    """A qlora model whose adapters change their rank: the engine's loss is that of the model itself."""
    from thriftune.data import Example
    from thriftune.recipe import QuantRecipe

    recipe = tiny_recipe(model, rows, tmp_path / "run", method="dynamic", dynamic={"r_start": 16, "round_to": 1})
    loaded = load_model(recipe.model, device=CPU, dtype=torch.float32, quant=QuantRecipe())
    attached = DynamicRankMethod(four_bit=True).attach(loaded, recipe).eval()
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0.0, 0.1)
    path = engine_path(attached, CPU, [18], 36, 0, "off", False)
    if held:
        path.program.layers[0].hold()
    tokens = IDS_BT.numpy()
    examples = [Example(row, [False] + [True] * 17) for row in tokens]
    path.losses(examples)
    METHODS["dynamic"].between_steps(recipe, 1, 1)(attached)
    path.parameters_changed()
    for _ in range(2):
        ours, targets = path.losses(examples)
        theirs = attached(input_ids=IDS_BT, labels=IDS_BT).loss
        assert ours / targets == pytest.approx(float(theirs), abs=1e-3)
        path.program.let_go()


# -- resuming, accumulation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "off"])
@pytest.mark.parametrize("at", [1, 2, 3, 6, 8], ids=["before", "at the first", "between", "at the last", "after"])
def test_resuming_changes_no_bit(model, rows, tmp_path, engine, at):
    changes = {"engine": engine, "dynamic": HARD}
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 20}
    run(model, rows, tmp_path / "whole", **changes, train=saving)
    assert [cut.step for cut in record_of(tmp_path / "whole").cuts] == [2, 6]
    shutil.copytree(tmp_path / "whole", tmp_path / "two")
    for name in ("adapter", "record.json"):
        place = tmp_path / "two" / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    train = {**saving, "resume_from_checkpoint": str(tmp_path / "two" / f"checkpoint-{at}")}
    run(model, rows, tmp_path / "two", **changes, train=train)
    assert numbers_of(tmp_path / "two") == numbers_of(tmp_path / "whole")
    whole, two = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "two")
    assert whole.keys() == two.keys() and all(torch.equal(whole[name], two[name]) for name in whole)
    kept = [cut.model_dump(exclude={"cut_s"}) for cut in record_of(tmp_path / "whole").cuts]
    assert [cut.model_dump(exclude={"cut_s"}) for cut in record_of(tmp_path / "two").cuts] == kept


def test_accumulated_micro_batches_are_cut_as_whole_ones_are(model, rows, tmp_path):
    for name, at_once, accumulated in (("whole", 4, 1), ("parts", 1, 4)):
        sizes = {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": accumulated}
        run(model, rows, tmp_path / name, train={**sizes, "adam_epsilon": 1e-3})
    whole, parts = record_of(tmp_path / "whole"), record_of(tmp_path / "parts")
    assert [cut.ranks for cut in whole.cuts] == [cut.ranks for cut in parts.cuts]
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "whole"), abs=1e-5)


@pytest.mark.parametrize("engine", ["off", "auto"])
def test_with_dropout_and_evaluation_a_cut_disturbs_nothing(model, rows, tmp_path, engine):
    """Measuring the loss around a cut draws nothing from the steps' randomness: one that keeps all changes no loss."""
    settings = {"lora": {"alpha": 8.0, "dropout": 0.2}, "data": {"eval_path": str(rows)}, "engine": engine}
    train = {"eval_strategy": "steps", "eval_steps": 2, "adam_epsilon": 1e-3}
    run(model, rows, tmp_path / "kept", **settings, dynamic={"keep": 1.0}, train=train)
    plain = {**settings, "lora": {"alpha": 8.0, "r": 8, "dropout": 0.2}}
    train_tiny(
        tiny_recipe(model, rows, tmp_path / "lora", **plain, train={"max_steps": 10, "learning_rate": 3e-3, **train})
    )
    assert record_of(tmp_path / "kept").path == ("generic" if engine == "off" else "engine")
    assert losses_of(tmp_path / "kept") == losses_of(tmp_path / "lora")
    assert [m.eval_loss for m in metrics_of(tmp_path / "kept")] == [m.eval_loss for m in metrics_of(tmp_path / "lora")]


# -- the export -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(model, rows, tmp_path_factory) -> Path:
    """A run whose adapter has modules of several ranks and lacks some."""
    output = tmp_path_factory.mktemp("trained") / "run"
    lora = {"alpha": 8.0, "use_rslora": True}
    run(model, rows, output, dynamic=HARD | {"round_to": 1, "keep": 0.3}, lora=lora, train={"learning_rate": 2e-2})
    return output


def test_the_export_is_an_ordinary_adapter_with_the_same_logits(model, rows, trained):
    ranks = record_of(trained).cuts[-1].ranks
    assert len(set(ranks.values())) > 2
    ours = logits_of(open_target(find_target(str(trained)), CPU).model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base = logits_of(plain.eval())
    in_peft = PeftModel.from_pretrained(plain, trained / "adapter").eval()
    assert float((ours - base).abs().max()) > 1e-3
    torch.testing.assert_close(logits_of(in_peft), ours, rtol=0, atol=1e-6)
    merged = in_peft.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), ours, rtol=0, atol=1e-5)


def test_the_export_is_the_model_that_was_trained(model, rows, tmp_path, monkeypatch):
    seen: list[torch.Tensor] = []
    export = DynamicRankMethod.export

    def watch(self: Any, model: Any, loaded: Any, folder: Path) -> None:
        seen.append(logits_of(model.eval()))
        export(self, model, loaded, folder)

    monkeypatch.setattr(DynamicRankMethod, "export", watch)
    run(model, rows, tmp_path / "run", dynamic=HARD, engine="auto")
    first, last = record_of(tmp_path / "run").cuts
    assert 0 in last.ranks.values() and first.copies_bytes_before > last.copies_bytes_after > 0
    again = logits_of(open_target(find_target(str(tmp_path / "run")), CPU).model)
    torch.testing.assert_close(again, seen[0], rtol=0, atol=1e-6)


def test_readers_that_know_one_rank_and_one_alpha_get_every_modules_scale(trained):
    """vLLM's PEFTHelper, by its rules: a positive r no larger than max_lora_rank, no DoRA, no modules_to_save; rank and
    alpha of a module from the first pattern that its name ends with, else the common ones; alpha / r is the scale."""
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    tensors = adapter_of(trained)
    assert 0 < config["r"] <= 64 and not config["use_dora"] and not config["modules_to_save"]
    assert config["bias"] == "none" and config["use_rslora"] is False
    scale = 8.0 / 8**0.5
    assert config["lora_alpha"] / config["r"] == pytest.approx(scale), "for readers without patterns"
    for name, rank in ranks_of(tensors).items():
        found = {
            option: next(
                (value for key, value in config[option].items() if re.match(rf"(.*\.)?({key})$", name)), config[common]
            )
            for option, common in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        }
        assert found["rank_pattern"] == rank and rank > 0
        assert found["alpha_pattern"] / found["rank_pattern"] == pytest.approx(scale)
        assert name in config["target_modules"]
    assert len(config["target_modules"]) == len(ranks_of(tensors)) == len(config["rank_pattern"])


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora": {"r": 8}}, "lora.r has no effect with method dynamic; write dynamic.r_start"),
        ({"lora": {"use_dora": True}}, "lora.use_dora is not supported"),
        ({"lora": {"bias": "all"}}, "lora.bias is not supported"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "lora.modules_to_save is not supported"),
        ({"lora": {"init_lora_weights": "pissa"}}, "lora.init_lora_weights is not supported"),
        ({"lora": {"options": {"rank_pattern": {"q_proj": 2}}}}, "lora.options.rank_pattern is not supported"),
        ({"lora": {"options": {"alpha_pattern": {"q_proj": 2}}}}, "lora.options.alpha_pattern is not supported"),
        ({"precision": "fp8"}, "precision fp8 is not built in for a rank that changes"),
        ({"quant": {"bnb_4bit_quant_type": "fp4"}}, "quant.* is of bases in 4 bits"),
        ({"offload": {"resident_layers": 1}}, "offload streams 4-bit layers and method is dynamic"),
        ({"dynamic": {"first_cut": 0.6}}, "first_cut 0.6 comes after dynamic.last_cut 0.5"),
        ({"dynamic": {"min_rank": 6}}, "min_rank 6 in every module is more than"),
        ({"train": {"load_best_model_at_end": True}}, "could go back to before a cut"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_refused(model, rows, tmp_path, changes, says):
    with pytest.raises(RecipeError) as caught:
        tiny_recipe(model, rows, tmp_path / "run", method="dynamic", **changes)
    assert any(says in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora": {"target_modules": ["embed_tokens", "q_proj"]}}, "model.embed_tokens is no linear"),
        ({"dynamic": {"keep": 0.001}}, "is less than one block of dynamic.round_to 2"),
    ],
)
def test_what_this_model_cannot_have_is_refused(model, rows, tmp_path, changes, says):
    with pytest.raises(RecipeError, match=re.escape(says)):
        run(model, rows, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
