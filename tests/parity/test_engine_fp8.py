"""Frozen products in 8-bit floats: that everything around the rounding is exact, and how far the rounding goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engine_gradients import FAMILIES, SIZES, examples, gradients
from torch import Tensor, nn

from thriftune.engine import fp8 as engine_fp8
from thriftune.engine import read as engine_read
from thriftune.engine.attention import ReferenceAttention
from thriftune.engine.choose import why_not_here
from thriftune.engine.packing import pack
from thriftune.engine.program import Program
from thriftune.engine.read import read_program
from thriftune.engine.sizes import Keep
from thriftune.engine.takes import refuse_fp8
from thriftune.errors import InputError
from thriftune.kernels import fp8
from thriftune.measure import random_model
from thriftune.methods import METHODS
from thriftune.plan.adapter import adapter_of
from thriftune.plan.engine import engine_case, why_not_engine
from thriftune.plan.memory import setup_of
from thriftune.recipe import QuantRecipe, Recipe, read_recipe
from thriftune.shapes import from_config

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16, "vocab_size": 61}
ROWS = examples((9, 2, 17, 5))


def build(family: str, **lora: Any) -> nn.Module:
    """Adapters of a trained size beside weights of the usual one, in float32."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, changes = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes, **WIDE})
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    for parameter in base.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.05)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **lora}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.05)
    return model.eval()


def step(program: Program, model: nn.Module, keep: Keep = Keep.ALL) -> tuple[float, dict[str, Tensor]]:
    program.copy_masters()
    kept = [keep] * len(program.layers)
    loss = program.add_gradients(pack(ROWS, CPU), 0.1, kept, ReferenceAttention())
    return float(loss), gradients(model)


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(float((found[name] - gradient).norm() / gradient.norm()) for name, gradient in wanted.items())


def put_wide_numbers_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have float32 in the place of 8-bit floats, scales and layouts as they are."""

    def wide(size_out: int, size_in: int, rank: int, device: torch.device) -> engine_fp8.Fp8Values:
        return engine_fp8.Fp8Values(
            torch.zeros(size_out, size_in + 3 * rank), torch.zeros(size_in, size_out + 3 * rank)
        )

    monkeypatch.setattr(fp8, "E4M3", torch.float32)
    monkeypatch.setattr(engine_fp8, "E4M3", torch.float32)
    monkeypatch.setattr(engine_read.Fp8Values, "empty", wide)


@pytest.mark.parametrize("family", ["llama", "llama tied, biases", "mistral, window", "qwen2", "qwen3"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_with_wide_numbers_in_the_place_of_8_bits_it_is_exact(family, targets, monkeypatch):
    """Scales, layouts, side columns and their powers of two: all that is not the rounding itself."""
    model = build(family, target_modules=targets)
    loss, wanted = step(read_program(model, 64, 16, fp8=False), model)
    put_wide_numbers_in(monkeypatch)
    found_loss, found = step(read_program(model, 64, 16, fp8=True), model)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert furthest(found, wanted) < 2e-5


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_rounding_stays_within_what_three_bits_of_mantissa_cost(family):
    model = build(family)
    loss, wanted = step(read_program(model, 64, 16, fp8=False), model)
    found_loss, found = step(read_program(model, 64, 16, fp8=True), model)
    assert found_loss == pytest.approx(loss, rel=0.01)
    off, whole = (
        sum(float(part.square().sum()) for part in parts) ** 0.5
        for parts in ([found[name] - gradient for name, gradient in wanted.items()], wanted.values())
    )
    assert 0.005 < off / whole < 0.2


@pytest.mark.parametrize("keep", [Keep.NO_MLP, Keep.RESIDUALS, Keep.INPUT])
def test_what_is_computed_again_is_the_same_bit_for_bit(keep):
    model = build("qwen3")
    program = read_program(model, 64, 16, fp8=True)
    loss, wanted = step(program, model)
    found_loss, found = step(program, model, keep)
    assert found_loss == loss
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_an_adapter_beside_8_bit_weights_counts_as_in_16_bits():
    """Beside weights of zero the product is the adapter's alone; a factor rounded to 8 bits would be 2.6 % off."""
    torch.manual_seed(0)
    x, side, adapter = torch.randn(50, 64), torch.randn(50, 16), torch.randn(32, 16) * 1e-3
    for size in (1e-6, 1.0, 300.0):  # from an adapter that has hardly begun to one far above its weight
        values, side_scales = torch.zeros(32, 64 + 48).to(fp8.E4M3), torch.ones(16)
        scales = torch.full((32, 1), 0.02 / fp8.LARGEST)
        fp8.Sides([fp8.Side(adapter * size, 2.0, scales, values[:, 64:80], 16, side_scales)])()
        left = torch.zeros(50, 64 + 48).to(fp8.E4M3)
        of_left = fp8.quantise_rows(x * size, side, side_scales, left)
        found = fp8.product(left, of_left, values, scales, torch.float32, None)
        wanted = 2 * side @ (adapter * size).T
        assert float((found - wanted).norm() / wanted.norm()) < 2**-8


def qlora(words: list[str]) -> tuple[Recipe, dict[str, Any], nn.Module]:
    config = {"model_type": "llama", **SIZES, **WIDE, "hidden_size": 128, "intermediate_size": 192}
    recipe = read_recipe(None, ["method=qlora", "precision=fp8", *words])
    loaded = random_model(config, device=CPU, dtype=torch.float32, attention="sdpa", quant=QuantRecipe())
    model = METHODS["qlora"].attach(loaded, recipe)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.05)
    return recipe, config, model


@pytest.mark.parametrize("words", [[], ["lora.options={rank_pattern: {layers.1.mlp.up_proj: 20, k_proj: 3}}"]])
def test_4_bit_weights_unpacked_anew_or_once_give_the_same_bits(words):
    """With other ranks in each layer, whose adapters leave traces in memory that is shared."""
    _, _, model = qlora(words)
    program = read_program(model, 64, 16, fp8=True)
    found = {keep: step(program, model, keep) for keep in Keep}
    for layer in program.layers[1:]:
        layer.hold()
    found_held = {keep: step(program, model, keep) for keep in Keep}
    assert program.let_go() and not program.let_go()
    found_again = {keep: step(program, model, keep) for keep in Keep}
    loss, wanted = found[Keep.ALL]
    for steps in (found, found_held, found_again):
        for found_loss, of_step in steps.values():
            assert found_loss == loss
            assert all(torch.equal(of_step[name], gradient) for name, gradient in wanted.items())


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_planned_sizes_and_memory_are_the_programs_own(method):
    recipe, config, model = qlora([])
    if method == "lora":
        recipe = read_recipe(None, ["method=lora", "precision=fp8"])
        loaded = random_model(config, device=CPU, dtype=torch.float32, attention="sdpa", quant=None)
        model = METHODS["lora"].attach(loaded, recipe)
    program = read_program(model, 64, 16, fp8=True)
    shape = from_config(config, "tiny")
    adapter = adapter_of(shape, recipe.lora, method)
    case = engine_case(shape, adapter, setup_of(recipe, method, False, on_gpu=False), None)
    assert case.sizes == program.sizes
    stacks = [stack for layer in program.layers for stack in layer.stacks]
    masters = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    copies = sum(stack.a_RI.nbytes + stack.b_OR.nbytes for stack in stacks)
    assert case.resident.adapter == masters + copies
    layouts = {stack.memory.data_ptr(): stack.fp8.bytes for stack in stacks}
    if method == "qlora":
        assert case.resident.unpacked == sum(layouts.values())
        assert case.sizes.unpacked_bytes == sum(stack.fp8.bytes for stack in program.layers[0].stacks)
    else:
        frozen = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
        assert case.resident.weights == frozen + sum(layouts.values())


def test_what_has_no_8_bit_products_is_refused_aloud():
    assert "has no products in 8-bit" in (engine_case_reason(["precision=fp8"], {}, "a100-80gb") or "")
    assert "side of 40" in (engine_case_reason(["precision=fp8"], {"intermediate_size": 40}, "h100-sxm") or "")
    assert engine_case_reason(["precision=fp8"], {}, "h100-sxm") is None
    assert engine_case_reason([], {"intermediate_size": 40}, "a100-80gb") is None
    odd = build("llama")
    recipe = read_recipe(None, ["method=lora", "precision=fp8", "engine=off"])
    reason = why_not_here(odd, recipe, CPU)
    assert reason is not None
    with pytest.raises(InputError, match="engine: off"):
        refuse_fp8(recipe, reason)


def engine_case_reason(words: list[str], changes: dict[str, Any], gpu: str) -> str | None:
    from thriftune.catalog.gpus import find_gpu

    recipe = read_recipe(None, ["method=lora", *words])
    shape = from_config({"model_type": "llama", **SIZES, **WIDE, **changes}, "tiny")
    adapter = adapter_of(shape, recipe.lora, "lora")
    return why_not_engine(shape, recipe, "lora", adapter, find_gpu(gpu, {}))
