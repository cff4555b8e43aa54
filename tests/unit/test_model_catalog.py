"""The catalogue of models: found by the names that people write, quickly, and plausible rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thriftune.catalog.models import CatalogModel, all_models, find_model, near_models

MODELS = all_models()


def found(text: str) -> str | None:
    model = find_model(text)
    return None if model is None else model.name


def test_there_are_65_with_names_of_their_own() -> None:
    assert len(MODELS) == 65
    assert max(Counter(model.name for model in MODELS).values()) == 1
    assert [model.name for model in MODELS if model.parameters is None] == ["MiMo-7B-Base"]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_row_is_plausible_and_found_by_all_its_names(model: CatalogModel) -> None:
    for name in (model.name, *model.hub_ids, *model.aliases):
        for written in (name, name.upper(), name.lower(), name.replace("-", " "), name.replace("-", "_")):
            assert found(written) == model.name, written
    assert model.source.startswith("huggingface.co/")
    assert date(2026, 1, 1) < model.date <= date.today()
    assert model.max_positions is not None and model.max_positions >= 512
    assert model.stored_dtype in ("bfloat16", "float16", "float32", None)
    assert (model.stored_dtype is None) == model.name.startswith("gpt-oss")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Llama-3-8B", "Llama-3-8B"),
        ("llama3 8b", "Llama-3-8B"),
        ("llama3:8b", "Llama-3-8B"),
        ("meta-llama/Meta-Llama-3-8B", "Llama-3-8B"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "Llama-3-8B"),
        ("meta-llama/Llama-3.1-70B", "Llama-3.1-70B"),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", "Llama-3.1-70B"),
        ("Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("llama31 8b", "Llama-3.1-8B"),
        ("llama318b", "Llama-3.1-8B"),
        ("Llama-3_1-8B", "Llama-3.1-8B"),
        ("llama-2-7b-chat-hf", "Llama-2-7B"),
        ("Llama-3.3-70B", "Llama-3.3-70B-Instruct"),
        ("mistralai/Mistral-Large-Instruct-2407", "Mistral-Large-Instruct-2407 (123B)"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "Mistral-7B-v0.1"),
        ("google/gemma-3-4b-pt", "gemma-3-4b-it (text part)"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("Qwen/Qwen3-8B-Base", "Qwen3-8B"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("deepseek-ai/DeepSeek-R1", "DeepSeek-V3"),
        ("EleutherAI/pythia-160m-deduped", "pythia-160m"),
        ("GPT2", "gpt2"),
        ("phi-4 mini", "Phi-4-mini-instruct"),
        ("TinyLlama", "TinyLlama-1.1B-Chat-v1.0"),
    ],
)
def test_usual_names(text: str, name: str) -> None:
    assert found(text) == name


@pytest.mark.parametrize(
    "text",
    [
        *["", " ", "-", "Instruct", "(text part)", "/", "llama", "Mistral-7B", "Llama 3 18B", "Llama-3", "8B"],
        *["./models/gpt2", "/data/models/gpt2", "Qwen2.5-7B-Instruct-AWQ", "unsloth/llama-3-8b-bnb-4bit", "gpt3"],
    ],
)
def test_what_is_unknown_or_may_mean_several_is_not_guessed(text: str) -> None:
    assert find_model(text) is None


def test_what_was_meant() -> None:
    assert near_models("Llama-3.1-9B")[0] == "Llama-3.1-8B"
    assert near_models("qwen25 coder 7b")[0] == "Qwen2.5-7B"
    assert near_models("google/gemma-4-26b")[0] == "gemma-4-26B-A4B"
    assert len(near_models("Mistral-7B")) == 3
    assert all(name.startswith("Mistral-7B") for name in near_models("Mistral-7B"))
    assert near_models("") == near_models("zzzzzzzz") == []


@given(st.text(max_size=300))
def test_any_text_is_looked_up(text: str) -> None:
    assert find_model(text) is None or not near_models("zzzzzzzz")
    assert len(near_models(text)) <= 3


def test_a_first_lookup_is_quick_and_needs_no_torch() -> None:
    script = (
        "import sys, time, thriftune.errors\n"
        "started = time.perf_counter()\n"
        "from thriftune.catalog.models import find_model\n"
        "assert find_model('llama3 8b').name == 'Llama-3-8B'\n"
        "print(time.perf_counter() - started, 'torch' in sys.modules)\n"
    )
    best_s = 1.0
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        took_s, has_torch = done.stdout.split()
        assert has_torch == "False"
        best_s = min(best_s, float(took_s))
    assert best_s < 0.15  # 0.04 on an idle core


def test_every_model_that_was_counted_beside_the_checkout(shared: Path) -> None:
    """configs/models.json holds the counts that were made there, on the meta device, model by model."""
    counted = json.loads((shared / "configs" / "models.json").read_text(encoding="utf-8"))["models"]
    assert len(counted) == 65
    for name, values in counted.items():
        model = find_model(name)
        assert model is not None and model.name == name
        assert model.parameters == values["parameters"]
        assert model.model_type == values["model_type"]
        for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"):
            assert model.text_config.get(key, values[key]) == values[key]
