"""The time to the first token: what is run, what is counted, what is left out."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from small_models import config_of
from thriftune.errors import InputError
from thriftune.infer.latency import first_token_s

PROMPTS = [[5] * 30, [7, 8]]


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of("llama"), dtype=torch.float32)


def test_every_prompt_is_read_alone_with_a_cache_once_to_warm_up_and_then_so_many_times(model):
    passes = []

    def note(module, args, options, output):
        passes.append((tuple(options["input_ids"].shape), output.past_key_values.get_seq_length()))

    model.train().register_forward_hook(note, with_kwargs=True)
    took_s = first_token_s(model, PROMPTS, device="cpu", repeats=3)
    assert passes == [((1, 30), 30), ((1, 2), 2)] * 4
    assert 0 < took_s < 5
    assert model.training


def test_the_median_counts_neither_the_warm_up_nor_a_single_slow_pass(model):
    waits_s = iter([0.4, 0.4, 0.03, 0.03, 0.03, 0.4, 0.03, 0.03])
    model.register_forward_pre_hook(lambda *_: time.sleep(next(waits_s)))
    assert 0.03 <= first_token_s(model, PROMPTS, device="cpu", repeats=3) < 0.2


@pytest.mark.parametrize(
    ("prompts", "repeats", "words"),
    [
        ([], 1, "0 prompts"),
        ([[5]], 0, "0 times"),
        ([[5], []], 1, "prompt 2 has no token"),
        ([[5] * 256], 1, "prompt 1 has 256"),
    ],
)
def test_what_cannot_be_timed_is_refused(model, prompts, repeats, words):
    with pytest.raises(InputError, match=words):
        first_token_s(model, prompts, device="cpu", repeats=repeats)
