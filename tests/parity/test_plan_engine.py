"""The plan of the engine's path against the engine itself: its rule, sizes, buffers, and what each keep level keeps."""

from __future__ import annotations

import gc
import weakref
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from thriftune.catalog.gpus import find_gpu
from thriftune.data import Example
from thriftune.engine import program as program_module
from thriftune.engine import weights
from thriftune.engine.attention import ReferenceAttention
from thriftune.engine.choose import why_not_here
from thriftune.engine.layer import forward
from thriftune.engine.packing import pack
from thriftune.engine.program import Program
from thriftune.engine.read import read_program
from thriftune.engine.sizes import RANK_MULTIPLE, Keep
from thriftune.measure import random_model
from thriftune.methods import METHODS
from thriftune.plan.adapter import adapter_of
from thriftune.plan.engine import EngineCase, engine_case, why_not_engine
from thriftune.plan.engine_memory import gradient_bytes
from thriftune.plan.memory import setup_of
from thriftune.recipe import QuantRecipe, Recipe, read_recipe
from thriftune.shapes import from_config

CPU = torch.device("cpu")
LENGTHS = (40, 17, 39)
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "llama tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True, "num_key_value_heads": 8},
    "mistral": {"model_type": "mistral", **SIZES, "head_dim": 32, "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", **SIZES},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 32},
}
ADAPTERS: dict[str, list[str]] = {
    "all linears": [],
    "rank 24": ["lora_r=24"],
    "attention": ["target_modules=q_proj,v_proj"],
    "MLP": ["target_modules=gate_proj,up_proj,down_proj"],
    "dropout": ["lora.dropout=0.1"],
    "dropout, odd ranks": ["lora.dropout=0.1", "lora_r=3", "target_modules=q_proj,v_proj,down_proj"],
}


def program_of(config: dict[str, Any], recipe: Recipe, dtype: torch.dtype) -> tuple[Program, nn.Module]:
    quant = QuantRecipe() if recipe.method == "qlora" else None
    loaded = random_model(config, device=CPU, dtype=dtype, attention="sdpa", quant=quant)
    model = METHODS[recipe.method].attach(loaded, recipe)
    return read_program(model, max(LENGTHS), RANK_MULTIPLE["cpu"], fp8=False), model


def planned(config: dict[str, Any], recipe: Recipe) -> EngineCase:
    shape = from_config(config, "tiny")
    adapter = adapter_of(shape, recipe.lora, recipe.method)
    return engine_case(shape, adapter, setup_of(recipe, recipe.method, False, on_gpu=False), None)


def examples() -> list[Example]:
    drawn = np.random.default_rng(0)
    return [
        Example(drawn.integers(4, 320, length, dtype=np.int32), np.ones(length, dtype=bool), index)
        for index, length in enumerate(LENGTHS)
    ]


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [found for field in fields(value) for found in tensors_in(getattr(value, field.name))]
    return [found for part in value for found in tensors_in(part)] if isinstance(value, (list, tuple)) else []


def kept_bytes(program: Program, keep: Keep) -> int:
    """Bytes of everything that the layers' forward passes leave for their backward passes, each storage once."""
    batch = pack(examples(), CPU)
    step = program.step_of(batch, ReferenceAttention(), program.key_of_step())
    found: dict[int, int] = {}
    saved = []
    with torch.no_grad():
        x = program.embedding_VD[batch.tokens_T]
        for layer in program.layers:
            layer.acquire_forward()
            x, of_layer = forward(layer, x, step, keep)
            saved.append(of_layer)
    for tensor in tensors_in(saved):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("keep", Keep)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_keep_level_keeps_what_is_planned(shape, adapter, keep):
    recipe = read_recipe(None, ["method=lora", *ADAPTERS[adapter]])
    program, _ = program_of(SHAPES[shape], recipe, torch.float32)
    sizes = planned(SHAPES[shape], recipe).sizes
    assert sizes.kept_bytes(keep) * sum(LENGTHS) == pytest.approx(kept_bytes(program, keep), rel=0.05)


@pytest.mark.parametrize("shape", ["llama", "qwen3", "mistral"])
def test_each_keep_level_keeps_what_is_planned_in_16_bits(shape):
    recipe = read_recipe(None, ["method=lora", "model.dtype=bfloat16"])
    program, _ = program_of(SHAPES[shape], recipe, torch.bfloat16)
    sizes = planned(SHAPES[shape], recipe).sizes
    assert sizes.element == 2
    for keep in Keep:
        assert sizes.kept_bytes(keep) * sum(LENGTHS) == pytest.approx(kept_bytes(program, keep), rel=0.05)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_planned_sizes_and_buffers_are_the_programs_own(shape, adapter, method):
    recipe = read_recipe(None, [f"method={method}", *ADAPTERS[adapter]])
    program, model = program_of(SHAPES[shape], recipe, torch.float32)
    case = planned(SHAPES[shape], recipe)
    sizes, held = case.sizes, case.resident
    assert sizes == program.sizes
    buffers = {stack.buffer_YX.untyped_storage().data_ptr(): stack.buffer_YX.untyped_storage().nbytes()
               for layer in program.layers for stack in layer.stacks}  # fmt: skip
    masters = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    if method == "qlora":
        assert held.unpacked == sum(buffers.values())
        assert held.adapter == masters
        assert sizes.unpacked_bytes == sum(stack.buffer_YX.nbytes for stack in program.layers[0].stacks)
    else:
        frozen = sum(part.linear.weight.nbytes for layer in program.layers for stack in layer.stacks
                     for part in stack.parts)  # fmt: skip
        assert held.adapter == masters + sum(buffers.values()) - frozen
        assert held.unpacked == 0
        whole = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
                 for parameter in model.parameters()}  # fmt: skip
        assert held.weights + held.adapter == pytest.approx(sum(whole.values()), rel=0.001)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_gradients_take_what_is_planned(adapter):
    recipe = read_recipe(None, ["method=lora", *ADAPTERS[adapter]])
    program, model = program_of(SHAPES["llama"], recipe, torch.float32)
    case = planned(SHAPES["llama"], recipe)
    program.copy_masters()
    key = program.key_of_step()
    program.add_gradients(pack(examples(), CPU), 1.0, [Keep.ALL] * 3, ReferenceAttention(), key)
    gradients = {parameter.grad.untyped_storage().data_ptr(): parameter.grad.untyped_storage().nbytes()
                 for parameter in model.parameters() if parameter.grad is not None}  # fmt: skip
    assert gradient_bytes(case) == sum(gradients.values())


def test_nothing_of_a_layer_stays_when_its_backward_pass_is_done(monkeypatch):
    """What the last layer kept would else stay to the end of the step."""
    recipe = read_recipe(None, ["method=lora"])
    program, _ = program_of(SHAPES["llama"], recipe, torch.float32)
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []
    forward_of, backward_of = program_module.forward, program_module.backward

    def noted_forward(*arguments: Any) -> Any:
        y, saved = forward_of(*arguments)
        alive.append(weakref.ref(saved))
        return y, saved

    def noted_backward(*arguments: Any) -> Any:
        gc.collect()
        counts.append(sum(found() is not None for found in alive))
        return backward_of(*arguments)

    monkeypatch.setattr(program_module, "forward", noted_forward)
    monkeypatch.setattr(program_module, "backward", noted_backward)
    program.copy_masters()
    program.add_gradients(pack(examples(), CPU), 1.0, [Keep.INPUT] * 3, ReferenceAttention())
    assert counts == [3, 2, 1]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["engine=off"],
        ["method=qlora"],
        ["lora.dropout=0.1"],
        ["use_dora=true"],
        ["lora.bias=lora_only"],
        ["modules_to_save=[lm_head]"],
        ["lora.options={lora_bias: true}"],
        ["lora.options={rank_pattern: {q_proj: 8}}"],
        ["lora.options={layers_to_transform: [1]}", "target_modules=[q_proj, v_proj]"],
        ["lora.options={trainable_token_indices: [5, 6]}"],
        ["target_modules=[lm_head, q_proj]"],
        ["target_modules=[embed_tokens, q_proj]"],
        ["use_rslora=true", "lora.init_lora_weights=gaussian"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3", "gemma2"])
def test_the_plan_knows_the_path_that_a_run_takes(kind, words):
    """The planner asks a config and a recipe, the run asks the model: they agree on yes and no."""
    if kind == "phi3" and any(name in " ".join(words) for name in ("q_proj", "v_proj")):
        pytest.skip("phi3 has no such linear")
    config = {"model_type": kind, **SIZES, **({"pad_token_id": 0} if kind == "phi3" else {})}
    recipe = read_recipe(None, ["method=lora", *words])
    if recipe.method == "qlora":
        model = program_of_nothing(config, recipe)
    else:
        sizes = {key: value for key, value in config.items() if key != "model_type"}
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        base.requires_grad_(False)
        model = peft.get_peft_model(base, lora_config(recipe))
    shape = from_config(config, "tiny")
    adapter = adapter_of(shape, recipe.lora, recipe.method)
    expected = why_not_here(model, recipe, CPU)
    found = why_not_engine(shape, recipe, recipe.method, adapter, None)
    assert (found is None) == (expected is None), (found, expected)


def test_heads_that_no_attention_kernel_takes_are_left_to_transformers() -> None:
    """As OpenLLaMA 3B's of 100 elements. On a CPU the reference takes any."""
    recipe = read_recipe(None, ["method=lora"])
    for size, taken in ((100, False), (264, False), (8, True), (256, True)):
        shape = from_config({"model_type": "llama", **SIZES, "head_dim": size}, "tiny")
        adapter = adapter_of(shape, recipe.lora, "lora")
        reason = why_not_engine(shape, recipe, "lora", adapter, find_gpu("h100-sxm", {}))
        assert reason is None if taken else f"and this model's have {size}" in (reason or "")
        assert why_not_engine(shape, recipe, "lora", adapter, None) is None


def program_of_nothing(config: dict[str, Any], recipe: Recipe) -> nn.Module:
    loaded = random_model(config, device=CPU, dtype=torch.float32, attention="eager", quant=QuantRecipe())
    return METHODS["qlora"].attach(loaded, recipe)


def lora_config(recipe: Recipe) -> peft.LoraConfig:
    lora = recipe.lora
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights,
        bias=lora.bias,
        modules_to_save=lora.modules_to_save,
        **lora.options,
    )


@pytest.mark.parametrize("keep", Keep)
def test_what_lies_beside_masked_inputs_is_counted(keep, monkeypatch):
    """All tensors that are there when a mask is applied, of a model whose MLP needs most then."""
    config = {**SHAPES["llama"], "intermediate_size": 1024}
    recipe = read_recipe(None, ["method=lora", "lora.dropout=0.1"])
    program, _ = program_of(config, recipe, torch.float32)
    sizes, batch, found = planned(config, recipe).sizes, pack(examples(), CPU), []

    def watched(apply: Any) -> Any:
        def noted(*arguments: Any) -> None:
            found.append(sum(storages().values()) - held)
            apply(*arguments)

        return noted

    for name in ("drop", "add_dropped"):
        monkeypatch.setattr(weights, name, watched(getattr(weights, name)))
    program.copy_masters()
    held = 0
    gc.collect()
    gc.freeze()  # what is there already is not looked through at every mask: in a whole suite, millions of objects
    try:
        program.add_gradients(
            batch, 1.0, [keep] * 3, ReferenceAttention(), (1, 2)
        )  # from here on gradients have places
        held = sum(storages().values())
        found.clear()
        program.add_gradients(batch, 1.0, [keep] * 3, ReferenceAttention(), (1, 2))
    finally:
        gc.unfreeze()
    counted = batch.segments.tokens * (sizes.kept_bytes(keep) + sizes.working_bytes(keep))
    assert 0.8 * counted < max(found) <= counted


def storages() -> dict[int, int]:
    """Bytes of all memory that a tensor of this process is in, by its address; of tensors not frozen."""
    alive = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    return {found.untyped_storage().data_ptr(): found.untyped_storage().nbytes() for found in alive}
