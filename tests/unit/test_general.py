"""The fixed general text and the loss on it."""

from __future__ import annotations

import hashlib
import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chain_model import byte_tokenizer, chain_model
from small_models import make_model
from thriftune.errors import DataError, InputError
from thriftune.evaluate import GENERAL, evaluate
from thriftune.evaluate.general import general_text
from thriftune.recipe import DataRecipe, GenerationRecipe

# A changed text makes old and new numbers incomparable, so it changes only with this line and a word in the changelog.
SHA256 = "e39efacc807741b368ba9f0c1496721b020934d0c926d6b55cfef5aab3167d05"


def ask(model, tokenizer, **changes):
    options = {
        "data": DataRecipe(),
        "settings": GenerationRecipe(batch_size=8),
        "limit": None,
        "split": "test",
        "answers_path": None,
        "model_name": "m",
        "adapter_name": None,
        "on_progress": lambda progress: None,
    }
    return evaluate(GENERAL, model, tokenizer, **{**options, **changes})


def test_the_text_is_the_one_that_earlier_numbers_are_of():
    text = general_text()
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256
    assert 2500 < len(text.split()) < 4000
    assert text.isascii() and not re.search(r"[ \t]+$", text, re.MULTILINE)


def test_the_sums_and_the_code_in_the_text_are_right():
    text = general_text()
    sums = re.findall(r"^(\d+) ([-+x/]) (\d+) = (\d+)$", text, re.MULTILINE)
    assert len(sums) == 4
    for left, sign, right, result in sums:
        assert eval(f"{left} {sign.replace('x', '*')} {right}") == int(result)
    code = text[text.index("def count_words") : text.index("For the text")]
    names: dict = {}
    exec(code, names)
    assert names["count_words"]("The cat saw the dog.") == {"the": 2, "cat": 1, "saw": 1, "dog": 1}


def test_a_model_that_knows_nothing_loses_the_logarithm_of_its_vocabulary(tmp_path):
    tokenizer = byte_tokenizer()
    model = chain_model(tokenizer, {})
    path = tmp_path / "windows.jsonl"
    result = ask(model, tokenizer, answers_path=path)
    assert (result.task, result.metric) == ("general", "loss")
    assert (result.value, result.low, result.high) == pytest.approx((math.log(model.config.vocab_size),) * 3, rel=1e-5)
    windows = [json.loads(line) for line in path.read_text().splitlines()]
    assert result.rows == len(windows) == result.details["windows_of_text"] > 50
    assert sum(window["tokens"] for window in windows) == result.details["tokens"]
    assert result.details["sha256"] == SHA256


def test_the_loss_is_that_of_the_text_and_the_same_every_time_whatever_the_recipe(tmp_path):
    folder = make_model(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    first = ask(model, tokenizer)
    assert first.low < first.value < first.high
    for data in (
        DataRecipe(name="imdb", max_length=32),
        DataRecipe(name="general", max_length=4096, chat_template="none"),
    ):
        again = ask(model, tokenizer, data=data)
        assert (again.value, again.low, again.high) == (first.value, first.low, first.high)
    ids = tokenizer(general_text())["input_ids"]
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids), 256):
            window = torch.tensor([ids[start : start + 256]])
            loss = model(input_ids=window, labels=window).loss
            total, count = total + float(loss) * (window.shape[1] - 1), count + window.shape[1] - 1
    assert first.value == pytest.approx(total / count, rel=1e-5)


def test_a_text_of_ones_own_stands_in_and_a_short_one_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    model = chain_model(tokenizer, {})
    path = tmp_path / "own.txt"
    path.write_text("All work and no play. " * 40)
    result = ask(model, tokenizer, data=DataRecipe(path=str(path)))
    assert result.details["data"] == str(path) and result.rows == 4
    path.write_text("Too short.")
    with pytest.raises(InputError, match="1 window of text"):
        ask(model, tokenizer, data=DataRecipe(path=str(path)))
    with pytest.raises(DataError, match=r"nothing\.txt cannot be read"):
        ask(model, tokenizer, data=DataRecipe(path=str(tmp_path / "nothing.txt")))
