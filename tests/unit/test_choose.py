"""Which method `auto` takes, and when activations are recomputed: sums over a model's description and free memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from small_models import make_model
from thriftune.errors import DoesNotFitError
from thriftune.methods import METHODS, choose_method, free_memory_bytes, needs_checkpointing, trainable_parameters
from thriftune.methods.choose import bytes_needed
from thriftune.models import describe_model, load_model
from thriftune.models.load import ModelDescription
from thriftune.recipe import QuantRecipe, Recipe
from thriftune.units import GIB

CPU = torch.device("cpu")
# Llama-3.1-8B: 8.03 G parameters, of which 6.98 G in 224 linears.
LLAMA_8B = ModelDescription(
    folder=Path("x"),
    model_type="llama",
    total_parameters=8_030_261_248,
    linear_parameters=6_979_321_856,
    linear_sides=32 * (4 * 4096 + 2 * 1024 + 2 * 4096 + 3 * (4096 + 14336)),
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    vocab_size=128_256,
    max_positions=131_072,
    stored_dtype="BF16",
)


def choose(monkeypatch, free_gib: float, method: str = "auto"):
    monkeypatch.setattr("thriftune.methods.choose.free_memory_bytes", lambda device: int(free_gib * GIB))
    return choose_method(Recipe.build({"method": method}, source="test"), LLAMA_8B, torch.device("cuda"), 2)


@pytest.mark.parametrize(("free_gib", "expected"), [(80, "lora"), (24, "lora"), (16, "qlora"), (8, "qlora")])
def test_auto_takes_the_first_that_fits(monkeypatch, free_gib, expected):
    method, reason = choose(monkeypatch, free_gib)
    assert method == expected and "free on cuda" in reason


def test_nothing_fits(monkeypatch):
    with pytest.raises(DoesNotFitError, match="even with qlora"):
        choose(monkeypatch, 4)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_what_is_asked_for_is_taken(monkeypatch, method):
    assert choose(monkeypatch, 1, method) == (method, "asked for")


def test_published_sizes_of_8b():
    """Dettmers et al. 2023: 4-bit weights of 8B, with a 16-bit embedding and head, are 5.3 GiB."""
    recipe = Recipe()
    weights = {method: bytes_needed(method, LLAMA_8B, recipe, 2) / GIB for method in ("qlora", "lora", "full")}
    assert 6 < weights["qlora"] < 8 and 16 < weights["lora"] < 20
    assert weights["full"] == pytest.approx(8.03e9 * 16 / GIB, rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_sum_covers_what_is_really_there(method, tmp_path):
    tree = {"method": method, "model": {"name": str(make_model(tmp_path / "m"))}, "lora": {"r": 8}}
    recipe = Recipe.build(tree, source="test")
    loaded = load_model(
        recipe.model, device=CPU, dtype=torch.bfloat16, quant=QuantRecipe() if METHODS[method].four_bit else None
    )
    weights = sum(parameter.numel() * parameter.element_size() for parameter in loaded.model.parameters())
    model = METHODS[method].attach(loaded, recipe)
    needed = bytes_needed(method, describe_model(recipe.model), recipe, 2) - GIB // 2
    assert needed >= weights + 16 * trainable_parameters(model)
    assert needed < 1.3 * (weights + 16 * trainable_parameters(model)) + 20_000


def test_free_memory_is_this_machines():
    assert 10**8 < free_memory_bytes(CPU) < 10**14


def test_recomputation_follows_memory(monkeypatch):
    def asks(free_gib: float, rows: int, longest: int) -> bool:
        monkeypatch.setattr("thriftune.methods.choose.free_memory_bytes", lambda device: int(free_gib * GIB))
        return needs_checkpointing(LLAMA_8B, rows, longest, CPU, 2)

    assert not asks(120, 4, 1024)
    assert asks(10, 4, 1024)
    assert asks(120, 64, 4096)
    assert not asks(10, 1, 64)
