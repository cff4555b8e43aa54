"""NF4: the trap that an evaluation forward sets on some CPUs, bitsandbytes' own numbers, and gradients through it."""

from __future__ import annotations

import copy
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn import modules as bnb_modules
from safetensors.torch import load_file

from small_models import make_model
from thriftune.methods import METHODS
from thriftune.models import load_model
from thriftune.models.surgery import dequantise, keep_four_bit_weights_as_they_are
from thriftune.recipe import QuantRecipe, Recipe
from tiny import losses_of, tiny_recipe, tiny_rows, train_tiny

CPU = torch.device("cpu")
IDS_BT = torch.tensor([[5, 80, 99, 104, 81, 7, 33, 12], [9, 9, 200, 3, 2, 60, 61, 0]])
repacking_cpu = pytest.mark.skipif(
    not bnb_modules.has_avx512bf16(),
    reason="this CPU has no avx512_bf16, so bitsandbytes never repacks 4-bit weights here",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "llama")


def load(folder: Path, dtype=torch.bfloat16, quant: QuantRecipe | None = None):
    return load_model(recipe_for(folder).model, device=CPU, dtype=dtype, quant=quant or QuantRecipe())


def recipe_for(folder: Path) -> Recipe:
    tree = {"method": "qlora", "model": {"name": str(folder)}, "lora": {"r": 4, "alpha": 8}}
    return Recipe.build(tree, source="the test's recipe")


def four_bit_layers(model) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def weights_of(model) -> dict[str, torch.Tensor]:
    return {
        name: bnb.dequantize_4bit(layer.weight, layer.weight.quant_state).float()
        for name, layer in four_bit_layers(model).items()
    }


def gradients(model, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(input_ids=IDS_BT, labels=IDS_BT).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


def evaluate_once(model) -> None:
    """What sets the trap off: eval mode, no gradient."""
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=IDS_BT)


def with_an_adapter_that_does_something(folder: Path, dtype=torch.bfloat16, quant: QuantRecipe | None = None):
    loaded = load(folder, dtype, quant)
    model = METHODS["qlora"].attach(loaded, recipe_for(folder))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.flatten().float(), other.flatten().float(), dim=0))


# ---------------------------------------------------------------- the trap


@pytest.mark.parametrize("double_quant", [True, False])
def test_an_evaluation_forward_leaves_weights_and_gradients_alone(folder, double_quant):
    """Bit for bit, on every CPU; on one with avx512_bf16 this fails without the switch that the loader sets."""
    quant = QuantRecipe(bnb_4bit_use_double_quant=double_quant)
    model = with_an_adapter_that_does_something(folder, quant=quant)
    weights, before = weights_of(model), gradients(model)
    packed = {name: layer.weight.clone() for name, layer in four_bit_layers(model).items()}
    evaluate_once(model)
    assert all(torch.equal(layer.weight, packed[name]) for name, layer in four_bit_layers(model).items())
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(model).items())
    after = gradients(model)
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


@repacking_cpu
def test_the_trap_is_there_without_the_switch(folder, capsys):
    """The positive control: bitsandbytes as it comes, so that the test above means something."""
    model = with_an_adapter_that_does_something(folder)
    before, weights = gradients(model), weights_of(model)
    for layer in four_bit_layers(model).values():
        layer.support_avx512bf16_for_cpu = True
    evaluate_once(model)
    after = gradients(model)
    lowest = min(cosine(after[name], before[name]) for name in before if "layers.0." in name and "lora_B" in name)
    name = next(iter(weights))
    off = float((weights_of(model)[name] - weights[name]).norm() / weights[name].norm())
    with capsys.disabled():
        print(f"\nwithout the switch: lowest cosine of a first-layer gradient {lowest:.2f}, weights {off:.0%} off")
    assert lowest < 0.99 and off > 0.5


def test_the_switch_is_an_attribute_of_each_layer_and_of_no_class(folder):
    loaded = load(folder)
    layers = four_bit_layers(loaded.model)
    assert keep_four_bit_weights_as_they_are(loaded.model) == len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers.values())
    fresh = Linear4bit(64, 64, quant_type="nf4")
    assert fresh.support_avx512bf16_for_cpu == bnb_modules.has_avx512bf16()


def test_copies_of_a_layer_keep_the_switch(folder):
    model = copy.deepcopy(load(folder).model)
    assert not any(layer.support_avx512bf16_for_cpu for layer in four_bit_layers(model).values())


@pytest.mark.parametrize("width", [48, 96])
def test_widths_that_the_repacked_product_cannot_take_work(tmp_path, width):
    """Without the switch an evaluation forward of such a layer dies of an assertion."""
    loaded = load(make_model(tmp_path / "odd", intermediate_size=width))
    evaluate_once(loaded.model)


def test_a_run_that_evaluates_trains_as_one_that_does_not(folder, tmp_path):
    losses = {}
    for name, eval_steps in (("without", 100), ("with", 2)):
        recipe = tiny_recipe(
            folder,
            tiny_rows(tmp_path / "rows.jsonl", 12),
            tmp_path / name,
            method="qlora",
            data={"eval_fraction": 0.25},
            train={"eval_strategy": "steps", "eval_steps": eval_steps},
        )
        train_tiny(recipe.replace(model={"dtype": "bfloat16"}))
        losses[name] = losses_of(tmp_path / name)
    assert len(losses["with"]) == 6 and losses["with"] == losses["without"]


# ---------------------------------------------------------------- bitsandbytes' own numbers


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_loaded_weight_is_bitsandbytes_own(folder, quant_type, double_quant, capsys):
    quant = QuantRecipe(bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant)
    stored = load_file(folder / "model.safetensors")
    found = weights_of(load(folder, torch.float32, quant).model)
    assert len(found) == 14
    errors = []
    for name, weight in found.items():
        original = stored[f"{name}.weight"]
        packed, state = bnb.quantize_4bit(original, quant_type=quant_type, compress_statistics=double_quant)
        assert torch.equal(weight, bnb.dequantize_4bit(packed, state).float())
        errors.append(float((weight - original).norm() / original.norm()))
    mean = sum(errors) / len(errors)
    with capsys.disabled():
        print(f"\n{quant_type}, double quant {double_quant}: weights come back {mean:.2%} off")
    assert mean == pytest.approx(0.092 if quant_type == "nf4" else 0.122, rel=0.05)


def test_nf4_is_the_published_sixteen_values_by_block_maximum(folder):
    """Dettmers et al. 2023, appendix E, without bitsandbytes' arithmetic: nearest value times the block's maximum."""
    values = torch.tensor(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
         -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
         0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    )  # fmt: skip
    name = "model.layers.0.mlp.up_proj"
    blocks = load_file(folder / "model.safetensors")[f"{name}.weight"].reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / scale).unsqueeze(-1).sub(values).abs().argmin(dim=-1)
    expected = (values[nearest] * scale).reshape(128, 64)
    model = load(folder, torch.float32, QuantRecipe(bnb_4bit_use_double_quant=False)).model
    assert torch.allclose(weights_of(model)[name], expected, atol=1e-6)


# ---------------------------------------------------------------- gradients through it


@pytest.mark.parametrize("double_quant", [True, False])
def test_gradients_through_nf4_are_those_of_the_dequantised_model(folder, double_quant, capsys):
    """In float32, so that nothing but the storage differs; every gradient of the adapter is compared."""
    quant = QuantRecipe(bnb_4bit_use_double_quant=double_quant)
    through_nf4 = gradients(with_an_adapter_that_does_something(folder, torch.float32, quant), torch.float32)

    model = with_an_adapter_that_does_something(folder, torch.float32, quant)
    adapter = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    plain = dequantise(model.unload())
    assert not four_bit_layers(plain)
    import peft

    again = peft.get_peft_model(plain, model.peft_config["default"])
    with torch.no_grad():
        for name, value in again.named_parameters():
            if name in adapter:
                value.copy_(adapter[name])
    reference = gradients(again, torch.float32)

    assert through_nf4.keys() == reference.keys() and len(reference) == 28
    worst = max(float((through_nf4[name] - reference[name]).norm() / reference[name].norm()) for name in reference)
    with capsys.disabled():
        print(f"\ndouble quant {double_quant}: gradients through NF4 differ by at most {worst:.1e}")
    assert worst < 1e-5


def test_dequantising_gives_the_layers_of_the_architecture(tmp_path):
    """GPT-2's linears hold their matrix transposed; a square one would be turned round without any error."""
    loaded = load(make_model(tmp_path / "gpt2", "gpt2"), torch.float32)
    with torch.no_grad():
        expected = loaded.model(IDS_BT).logits
    classes = {name: type(module).__name__ for name, module in load_plain(tmp_path / "gpt2").named_modules()}
    plain = dequantise(loaded.model)
    assert {name: type(module).__name__ for name, module in plain.named_modules()} == classes
    assert not hasattr(plain.config, "quantization_config")
    with torch.no_grad():
        assert torch.allclose(plain(IDS_BT).logits, expected, atol=1e-4)


def load_plain(folder: Path):
    return load_model(recipe_for(folder).model, device=CPU, dtype=torch.float32, quant=None).model
