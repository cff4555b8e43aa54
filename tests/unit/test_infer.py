"""Streams, chats, predictions and prompts; batches against single rows are in tests/parity/test_generate.py."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chain_model import byte_tokenizer, chain_model, says
from thriftune.data import Rows, encode_prompt
from thriftune.data.sources import Places
from thriftune.errors import DataError, InputError
from thriftune.infer import predict
from thriftune.infer.batching import Progress
from thriftune.infer.chat import chat_loop
from thriftune.infer.generate import decode, generate, stream
from thriftune.infer.predict import predict_rows
from thriftune.infer.prompts import pad_token_id_of, prompt_of, room_for_answer
from thriftune.recipe import DataRecipe, GenerationRecipe

SETTINGS = GenerationRecipe(max_new_tokens=8, batch_size=4)
DATA = DataRecipe(name="rows.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def random_model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def ignore(progress: Progress) -> None:
    pass


def rows_of(rows: list[dict]) -> Rows:
    return Rows(rows, Places("rows.jsonl", range(1, len(rows) + 1)), f"{len(rows)} rows")


def pieces(model, tokenizer, prompt, settings=SETTINGS, stop=(0,), seed=0):
    return stream(model, prompt, settings, stop, 1, tokenizer, seed=seed)


# ------------------------------------------------------------------------------------------------------------- stream


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_joined_is_the_text_that_generate_gives(random_model, tokenizer, temperature):
    settings = GenerationRecipe(max_new_tokens=40, temperature=temperature)
    for prompt in ([5, 9, 30], [77] * 20, [200, 3]):
        ids = generate(random_model, [prompt], settings, [0], 1, seed=5, on_progress=ignore)[0]
        assert "".join(pieces(random_model, tokenizer, prompt, settings, seed=5)) == decode(tokenizer, ids)


def test_a_character_comes_when_all_its_bytes_are_there_and_a_half_one_at_the_end(tokenizer):
    model = chain_model(tokenizer, says(tokenizer, "hé€!"))
    assert list(pieces(model, tokenizer, [3])) == ["h", "é", "€", "!"]
    cut = GenerationRecipe(max_new_tokens=2)
    assert list(pieces(model, tokenizer, [3], cut)) == ["h", "\ufffd"]


def test_closing_a_stream_stops_the_model_and_restores_its_mode(tokenizer):
    model = chain_model(tokenizer, {3: 70, 70: 71, 71: 70}).train()
    passes = []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    answer = pieces(model, tokenizer, [3], GenerationRecipe(max_new_tokens=4000))
    first = [next(answer) for _ in range(3)]
    answer.close()
    assert "".join(first) == decode(tokenizer, [70, 71, 70])
    assert len(passes) < 3000 and model.training and model.model.layers[0].training


def test_an_error_of_the_model_reaches_the_reader_of_the_stream(tokenizer):
    model = chain_model(tokenizer, {})
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(pieces(model, tokenizer, [3]))
    with pytest.raises(InputError, match="no token"):
        list(pieces(model, tokenizer, []))


# --------------------------------------------------------------------------------------------------------------- chat


class Person:
    """Says the lines given, an exception among them is raised, and keeps what is written."""

    def __init__(self, *lines):
        self.lines = list(lines)
        self.heard = ""

    def read_line(self) -> str:
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text: str) -> None:
        self.heard += text


def talk(model, tokenizer, person, settings=SETTINGS, **more):
    return chat_loop(model, tokenizer, DataRecipe(), settings, person.read_line, person.write, seed=0, **more)


def test_a_chat_answers_and_remembers(tokenizer):
    model = chain_model(tokenizer, says(tokenizer, "Hello"[:3]))
    person = Person("who are you?", "  ", "and now?")
    messages = talk(model, tokenizer, person)
    assert [message["content"] for message in messages] == ["who are you?", "Hel", "and now?", "Hel"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert person.heard.count("Hel\n") == 2


def test_reset_forgets_exit_leaves_and_other_commands_are_not_sent(tokenizer):
    model = chain_model(tokenizer, says(tokenizer, "ok"))
    person = Person("one", "/reset", "/bye", "two", "/exit", "never read")
    assert [m["content"] for m in talk(model, tokenizer, person)] == ["two", "ok"]
    assert person.lines == ["never read"]
    assert "forgotten" in person.heard and "/bye is no command" in person.heard


def test_ctrl_c_stops_the_answer_only_and_at_the_prompt_nothing(tokenizer):
    class Impatient(Person):
        def write(self, text):
            super().write(text)
            if self.heard.endswith("ababab"):
                raise KeyboardInterrupt

    a, b = (tokenizer(letter)["input_ids"][0] for letter in "ab")
    model = chain_model(tokenizer, {3: a, a: b, b: a}).train()
    person = Impatient("go", KeyboardInterrupt(), "/exit", "never read")
    messages = talk(model, tokenizer, person, GenerationRecipe(max_new_tokens=3000))
    assert messages == [{"role": "user", "content": "go"}, {"role": "assistant", "content": "ababab"}]
    assert "(stopped)" in person.heard and person.heard.count("/exit") == 2
    assert person.lines == ["never read"] and model.training


def test_old_turns_are_left_out_aloud_and_a_message_too_long_is_not_sent(tokenizer):
    model = chain_model(tokenizer, says(tokenizer, "ok"), positions=64)
    person = Person("x" * 30, "y" * 30, "z" * 60, "w" * 20)
    messages = talk(model, tokenizer, person)
    assert [m["content"] for m in messages] == ["w" * 20, "ok"]
    assert "room for; its first 2 messages are left out" in person.heard
    assert "your message has 62 tokens and the model room for 56; it was not sent" in person.heard


def test_a_chat_keeps_to_the_memory_that_there_is(tokenizer):
    """A conversation has fewer tokens than the model positions: `most_tokens` less those of an answer."""
    model = chain_model(tokenizer, says(tokenizer, "ok"))
    room = 90
    person = Person("x" * 50, "y" * 50, "z" * 200)
    messages = talk(model, tokenizer, person, most_tokens=room + SETTINGS.max_new_tokens)
    assert [m["content"] for m in messages] == ["y" * 50, "ok"]
    assert f"more than the {room} tokens there is room for; its first 2 messages are left out" in person.heard
    assert f"the model room for {room}; it was not sent" in person.heard


def test_a_chat_that_runs_out_of_memory_goes_on_shorter(tokenizer, monkeypatch):
    model = chain_model(tokenizer, says(tokenizer, "ok"))
    generate = type(model).generate

    def of_limited_memory(self, *words, **settings):
        if settings["input_ids"].shape[1] > 100:
            raise torch.OutOfMemoryError("no room")
        return generate(self, *words, **settings)

    monkeypatch.setattr(type(model), "generate", of_limited_memory)
    person = Person("x" * 50, "y" * 50, "y" * 50)
    messages = talk(model, tokenizer, person)
    assert [m["content"] for m in messages] == ["y" * 50, "ok"]
    assert "ran out of memory at 1" in person.heard and "its first 2 messages are left out" in person.heard


def test_an_empty_answer_is_said_and_left_out(tokenizer):
    person = Person("hm")
    assert talk(chain_model(tokenizer, {3: 0}), tokenizer, person) == []
    assert "no answer" in person.heard


# ------------------------------------------------------------------------------------------------------------ predict


def test_predictions_come_in_order_over_windows_and_equal_single_ones(random_model, tokenizer, monkeypatch):
    rows = rows_of([{"question": "why " * (7 * number % 11), "n": number} for number in range(1, 11)])

    def ask(recipe, window):
        monkeypatch.setattr(predict, "WINDOW_ROWS", window)
        return list(predict_rows(random_model, tokenizer, rows, DATA, recipe, seed=1, on_progress=ignore))

    expected = ask(SETTINGS, 1)
    assert [row["n"] for row in expected] == list(range(1, 11))
    assert all(row.keys() == {"question", "n", "prediction"} for row in expected)
    assert ask(SETTINGS, 4) == ask(SETTINGS, 512) == expected
    warm = GenerationRecipe(max_new_tokens=8, batch_size=4, temperature=1.0)
    assert ask(warm, 4) == ask(warm, 512) != expected


def test_progress_runs_over_all_windows(random_model, tokenizer, monkeypatch):
    monkeypatch.setattr(predict, "WINDOW_ROWS", 3)
    seen: list[Progress] = []
    rows = rows_of([{"question": "a"}] * 7)
    list(predict_rows(random_model, tokenizer, rows, DATA, SETTINGS, seed=1, on_progress=seen.append))
    assert [(step.done, step.total) for step in seen] == [(3, 7), (6, 7), (7, 7)]


def test_a_row_that_cannot_be_asked_is_named(random_model, tokenizer):
    rows = rows_of([{"question": "a"}, {"question": " "}])
    with pytest.raises(DataError, match=r"rows.jsonl row 2: .*empty question"):
        list(predict_rows(random_model, tokenizer, rows, DATA, SETTINGS, seed=1, on_progress=ignore))


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "options", "prompt"),
    [
        ({"question": "q"}, {}, [USER]),
        ({"question": "q", "answer": "a"}, {}, [USER]),
        ({"question": "q", "answer": None}, {}, [USER]),
        ({"prompt": "q"}, {}, "q"),
        ({"prompt": "q", "completion": ""}, {}, "q"),
        ({"prompt": [USER]}, {}, [USER]),
        ({"instruction": "q", "input": ""}, {}, [USER]),
        ({"messages": [USER]}, {}, [USER]),
        ({"messages": [USER, ASSISTANT]}, {}, [USER]),
        ({"messages": [USER, ASSISTANT, USER]}, {}, [USER, ASSISTANT, USER]),
        ({"conversations": [{"from": "human", "value": "q"}]}, {}, [USER]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {}, [USER]),
        ({"text": "q"}, {}, "q"),
        ({"frage": "q"}, {"columns": {"question": "frage"}}, [USER]),
        ({"frage": "q"}, {"columns": {"prompt": "frage", "completion": "antwort"}}, "q"),
        ({"frage": "q"}, {"columns": {"text": "frage"}}, "q"),
    ],
)
def test_what_a_row_asks_is_known_with_and_without_its_answer(row, options, prompt):
    before = dict(row)
    assert prompt_of(row, DataRecipe(name="rows.jsonl", **options)) == prompt
    assert row == before


@pytest.mark.parametrize("row", [{"text": "Fine."}, {"text": "Fine.", "label": 1}, {"text": "Fine.", "label": None}])
def test_a_review_without_a_label_is_asked_as_in_training(row):
    (message,) = prompt_of(row, DataRecipe(name="imdb"))
    assert message["content"].startswith("Fine.\n\nIs this review")


def test_a_prompts_room_is_max_length_or_what_the_positions_leave(tokenizer):
    model = chain_model(tokenizer, {}, positions=100)
    assert room_for_answer(DataRecipe(max_length=64), model, 30).max_length == 64
    assert room_for_answer(DataRecipe(max_length=640), model, 30).max_length == 70
    with pytest.raises(InputError, match="100 positions"):
        room_for_answer(DataRecipe(), model, 93)
    cut = encode_prompt([{"role": "user", "content": "ab" * 200}], tokenizer, room_for_answer(DATA, model, 30))
    assert len(cut) == 70 and cut[0] == 2 and cut[-1] == 3


def test_padding_without_a_pad_token_takes_the_end_token_or_0():
    tokenizer = byte_tokenizer()
    assert pad_token_id_of(tokenizer) == 1
    tokenizer.pad_token = None
    assert pad_token_id_of(tokenizer) == 0
