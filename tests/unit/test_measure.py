"""`plan --measure`: random models like those the loader leaves, cuts that keep the mix of layers, and times."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from thriftune.catalog.models import find_model
from thriftune.engine.sizes import Choice, Keep
from thriftune.errors import ModelError
from thriftune.measure import Step, measure_step, random_model
from thriftune.measure import step as step_module
from thriftune.measure.layers import cut_short, number_of_layers, text_config, two_cuts
from thriftune.models import load_model
from thriftune.models.surgery import count_parameters
from thriftune.plan.values import Packed, Work
from thriftune.recipe import ModelRecipe, QuantRecipe, read_recipe
from thriftune.shapes import from_config
from tiny import losses_of, metrics_of, record_of, tiny_model, tiny_recipe, train_tiny

CPU = torch.device("cpu")
# The shape of stories260K, the smallest model that people train.
STORIES = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def work_of(rows: int, length: int, micro_batches: int) -> Work:
    """Steps of rows of one length, every token a target."""
    count = rows * micro_batches
    tokens, targets = float(count * length), float(count * (length - 1))
    packed = Packed(count * length, length, tokens, targets, float(count * length**2))
    return Work(
        rows, length, length - 1, length, length - 1, micro_batches, tokens, tokens, targets, 8, 2048, "made up", packed
    )


WORK = work_of(2, 64, 2)


def random_of(config: dict[str, Any], quant: QuantRecipe | None = None, layers: int | None = None) -> Any:
    return random_model(config, device=CPU, dtype=torch.float32, attention="sdpa", quant=quant, layers=layers)


def step(method: str, work: Work = WORK, checkpointing: bool = False, *words: str) -> Step:
    return Step(read_recipe(None, ["lora_r=4", *words], {"model": "x"}), method, checkpointing, work, CPU, None)


# ---------------------------------------------------------------- models of random weights


@pytest.mark.parametrize("quant", [None, QuantRecipe()])
def test_a_random_model_is_built_like_one_that_was_loaded(tmp_path, quant):
    """The same modules with tensors of the same sizes and types, frozen; only the values differ."""
    folder = tiny_model(tmp_path / "model")
    loaded = load_model(ModelRecipe(name=str(folder)), device=CPU, dtype=torch.float32, quant=quant)
    made = random_of(json.loads((folder / "config.json").read_text()), quant)

    def described(model: nn.Module) -> dict[str, Any]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return {
            name: (tensor.dtype, tensor.shape, tensor.requires_grad, tensor.device.type) for name, tensor in tensors
        }

    assert described(made.model) == described(loaded.model)
    assert {name: type(module) for name, module in made.model.named_modules()} == {
        name: type(module) for name, module in loaded.model.named_modules()
    }
    assert made.four_bit == loaded.four_bit and not made.model.training
    for name, buffer in loaded.model.named_buffers():
        assert torch.equal(buffer, dict(made.model.named_buffers())[name]), name


def test_tied_weights_are_one_and_a_cut_keeps_the_sizes():
    model = random_of(STORIES, layers=2).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert count_parameters(model) == from_config(cut_short(STORIES, 2), "cut").total_parameters


def test_gpt2s_linears_are_quantised_the_right_way_round():
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}
    layer = random_of(config, QuantRecipe()).model.transformer.h[0]
    assert tuple(layer.mlp.c_fc.weight.quant_state.shape) == (256, 64)
    assert layer(torch.zeros(1, 3, 64)).shape == (1, 3, 64)


def test_what_transformers_cannot_build_is_said():
    with pytest.raises(ModelError, match="builds no causal language model of type 'mimo'"):
        random_of({**STORIES, "model_type": "mimo"})
    with pytest.raises(ModelError, match="how many layers"):
        number_of_layers({"model_type": "llama"})


# ---------------------------------------------------------------- cuts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama-3-8B", (2, 6)),
        ("pocket-sized", (5, 5)),
        ("gemma-3-1b-it", (2, 8)),  # five of six layers have sliding attention
        ("Qwen3.5-27B", (4, 8)),  # every fourth layer has full attention
        ("gemma-4-26B-A4B", (2, 9)),  # the last layer always has full attention, in a cut too
        ("DeepSeek-V3", (3, 6)),  # three dense layers, then experts
    ],
)
def test_the_layers_between_two_cuts_are_mixed_like_the_rest(name, expected):
    row = find_model(name)
    config = text_config(row.config) if row else STORIES
    short, longer = two_cuts(config)
    assert (short, longer) == expected

    def kinds(layers: int) -> Counter[Any]:
        shape = from_config(cut_short(config, layers), "cut")
        return Counter({layer: len(indices) for layer, indices in shape.layers})

    whole = number_of_layers(config)
    if longer < whole:
        between, rest = kinds(longer) - kinds(short), kinds(whole) - kinds(short)
        shares = {kind: between[kind] / (longer - short) - rest[kind] / (whole - short) for kind in between | rest}
        assert max(map(abs, shares.values())) < 0.02


def test_a_model_that_sees_is_timed_by_its_text_part():
    text = {key: value for key, value in STORIES.items() if key != "model_type"}
    outer = {"model_type": "qwen3_vl", "text_config": {**text, "head_dim": 8}, "vision_config": {"depth": 2}}
    assert text_config(outer)["model_type"] == "qwen3_vl_text" and number_of_layers(text_config(outer)) == 5
    assert text_config(STORIES) == STORIES


# ---------------------------------------------------------------- times


def test_more_layers_and_more_work_take_longer(monkeypatch):
    """By whole factors, and of several tries beside each other, so that a busy machine does not decide."""
    monkeypatch.setattr(step_module, "LEAST_S", 0.0)

    def seconds(layers: int, work: Work = WORK) -> float:
        return measure_step({**STORIES, "num_hidden_layers": layers}, step("lora", work)).step_s

    two, whole, longer = seconds(2), measure_step(STORIES, step("lora")), seconds(24)
    assert whole.layers == "all 5 layers" and 0 < two < longer
    eight = work_of(2, 64, 8)
    assert any(seconds(2, eight) > 1.5 * seconds(2) for _ in range(5))


def test_long_micro_batches_are_timed_once(monkeypatch):
    timed: list[int] = []
    original = step_module._repeated_s

    def counted(loaded: Any, model: nn.Module, asked: Step, micro_batches: int) -> float:
        timed.append(micro_batches)
        return original(loaded, model, asked, micro_batches)

    monkeypatch.setattr(step_module, "_repeated_s", counted)
    many = work_of(1, 16, 9)
    measure_step(STORIES, step("lora", many))
    assert timed == [1, 4]
    monkeypatch.setattr(step_module, "LONG_S", 0.0)
    assert measure_step(STORIES, step("lora", many)).step_s > 0
    assert timed == [1, 4, 1]


@pytest.mark.parametrize(
    ("method", "engine"), [("full", "off"), ("lora", "off"), ("qlora", "off"), ("lora", "auto"), ("qlora", "auto")]
)
def test_the_measured_step_is_that_of_a_run(tmp_path, method, engine):
    """Within a factor of three of what the very same steps take in a run on this busy machine."""
    folder = tiny_model(tmp_path / "model", hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"{number} " + "film plot " * 60}) for number in range(24)))
    train = {"per_device_train_batch_size": 2}
    recipe = tiny_recipe(folder, rows, tmp_path / "out", method=method, engine=engine, train=train)
    train_tiny(recipe)
    steps = metrics_of(tmp_path / "out")
    tokens = sum(metrics.tokens for metrics in steps) / len(steps)
    targets = sum(metrics.targets for metrics in steps) / len(steps)
    packed = Packed(512, 128, tokens, targets, 128 * tokens)
    work = Work(2, 128, 127, 128, 127, 2, tokens, tokens, targets, 6, 1, "the run's", packed)
    assert record_of(tmp_path / "out").path == ("generic" if engine == "off" else "engine")
    choice = None if engine == "off" else Choice(Keep.ALL, 512, 4, 4)
    asked = Step(recipe, method, False, work, CPU, choice)
    found = measure_step(json.loads((folder / "config.json").read_text()), asked)
    ran_s = sorted(metrics.step_s for metrics in steps[1:])[len(steps) // 2]
    assert ran_s / 3 < found.step_s < ran_s * 3 and len(losses_of(tmp_path / "out")) == 6


def test_short_steps_are_timed_for_a_while(monkeypatch):
    """A machine that has just begun is slow for longer than a few short steps take."""
    steps: list[float] = []
    original = step_module.train_step

    def counted(*words: Any) -> Any:
        steps.append(time.perf_counter())
        return original(*words)

    monkeypatch.setattr(step_module, "train_step", counted)
    monkeypatch.setattr(step_module, "LEAST_S", 0.0)
    measure_step(STORIES, step("lora"))
    few = len(steps)
    monkeypatch.setattr(step_module, "LEAST_S", 1.0)
    measure_step(STORIES, step("lora"))
    assert few == 2 * step_module.STEPS, "with one micro-batch, and with two"
    assert len(steps) > 2 * few and steps[-1] - steps[few] > 1.8


def test_the_settings_that_were_chosen_are_the_ones_that_are_timed(monkeypatch):
    """Recomputation passes each layer twice; the rows at once go through it together."""
    monkeypatch.setattr(step_module, "LEAST_S", 0.0)  # so that both are as many steps
    seen: list[tuple[int, ...]] = []

    def count(module: nn.Module, inputs: Any) -> None:
        if type(module).__name__ == "LlamaMLP":
            seen.append(tuple(inputs[0].shape[:2]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        measure_step(STORIES, step("lora"))
        kept = Counter(seen)
        seen.clear()
        measure_step(STORIES, step("lora", WORK, True))
    finally:
        hook.remove()
    assert set(kept) == {(2, 64)} and Counter(seen) == {(2, 64): 2 * kept[2, 64]}


def test_a_step_planned_for_the_engine_goes_through_it_or_it_is_said():
    seen: list[str] = []

    def count(module: nn.Module, inputs: Any) -> None:
        seen.append(type(module).__name__)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    choice = Choice(Keep.INPUT, 128, 0, 5)
    try:
        found = measure_step(STORIES, replace(step("lora"), choice=choice))
    finally:
        hook.remove()
    assert found.step_s > 0 and "LlamaMLP" not in seen
    with pytest.raises(ModelError, match="does not take this model: a variant of LoRA"):
        measure_step(STORIES, replace(step("lora", WORK, False, "use_dora=true"), choice=choice))


def test_a_step_that_the_model_cannot_make_is_said_and_no_traceback(monkeypatch):
    def stumble(*_: object, **__: object) -> None:
        raise AttributeError("'tuple' object has no attribute 'dtype'")

    monkeypatch.setattr(step_module, "train_step", stumble)
    with pytest.raises(ModelError, match=r"a step of lora .* AttributeError: 'tuple'"):
        measure_step(STORIES, step("lora"))
