"""Rows of every shape, to ids and masks written out by hand.

The tokenizer has one token a character, and its id is the character's code: `[*b"Hi"]` is what "Hi" encodes to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from thriftune.data import encode_answer, encode_prompt, encode_rows, stop_token_ids, to_conversation
from thriftune.data.encoding import Example
from thriftune.data.formats import REVIEW_QUESTION
from thriftune.data.sources import Places, Rows
from thriftune.errors import DataError
from thriftune.recipe import DataRecipe

BEGIN, END, USER, ASSISTANT, TURN_END, SPACE_4, TWO_BREAKS = 1, 2, 3, 4, 5, 200, 201
SPECIAL = {"<s>": BEGIN, "</s>": END, "<|user|>": USER, "<|assistant|>": ASSISTANT, "<|im_end|>": TURN_END}
VOCABULARY = {**SPECIAL, "<unk>": 0, **{chr(code): code for code in (10, *range(32, 127), 0x2581)}}

ASKING = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}<|im_end|>{{ '\\n' }}"
    "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}" + ASKING
)
MARKED = CHAT.replace("{{ m.content }}<|im_end|>", "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}", 1)


def characters(
    template: str | None = None, begins: bool = False, ends: bool = False, merges: bool = False, words: bool = False
) -> Any:
    """One token a character. `begins`, `ends`: it writes <s>, </s> by habit; `merges`: " 4" and two line breaks are one
    token; `words`: it writes a space before every text, as sentencepiece does."""
    vocabulary = dict(VOCABULARY)
    pairs = []
    if merges:
        vocabulary |= {" 4": SPACE_4, "\n\n": TWO_BREAKS}
        pairs = [(" ", "4"), ("\n", "\n")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    if words:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    habit = f"{'<s> ' if begins else ''}$A{' </s>' if ends else ''}"
    if begins or ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=habit, special_tokens=[("<s>", BEGIN), ("</s>", END)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    made.chat_template = template
    return made


class SlowCharacters(PreTrainedTokenizer):
    """The same in Python: a tokenizer that knows no offsets."""

    def __init__(self) -> None:
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    @property
    def vocab_size(self) -> int:
        return 127

    def get_vocab(self) -> dict[str, int]:
        return VOCABULARY

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return VOCABULARY.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return next(token for token, each in VOCABULARY.items() if each == index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def recipe(**options: Any) -> DataRecipe:
    return DataRecipe(**{"name": "rows.jsonl", **options})


def rows_of(*rows: Any) -> Rows:
    return Rows(list(rows), Places("rows.jsonl", range(1, len(rows) + 1)), "the test's rows")


def encoded(row: dict[str, Any], tokenizer: Any, **options: Any) -> Example:
    (example,) = encode_rows(rows_of(row), tokenizer, recipe(**options)).examples
    return example


def parts(example: Example) -> tuple[list[int], list[int]]:
    """(ids that are not trained, ids that are), and the mask is: first none, then all."""
    untrained = int((~example.trained).sum())
    assert not example.trained[:untrained].any()
    assert example.trained[untrained:].all()
    return example.tokens[:untrained].tolist(), example.tokens[untrained:].tolist()


ROW = {"prompt": "Hi", "completion": "Yo"}
PLAIN = [*b"User:\nHi\n\nAssistant:\n"]
SHAPES = [
    ({"prompt": "Hi", "completion": "Yo"}, [*b"Hi"]),
    ({"question": "Hi", "answer": "Yo"}, PLAIN),
    ({"instruction": "Hi", "output": "Yo"}, PLAIN),
    ({"instruction": "Hi", "output": "Yo", "input": "", "system": None}, PLAIN),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}, PLAIN),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                   {"role": "assistant", "content": "Yo"}]}, PLAIN),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}, PLAIN),
    ({"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Yo"}]}, PLAIN),
]  # fmt: skip


@pytest.mark.parametrize(("row", "plain_prompt"), SHAPES)
def test_each_shape_plain_and_with_a_template(row: dict[str, Any], plain_prompt: list[int]) -> None:
    assert parts(encoded(row, characters())) == (plain_prompt, [*b"Yo", END])
    for template in (CHAT, MARKED):
        # The line break that the template writes after the end token teaches nothing and is left out.
        assert parts(encoded(row, characters(template))) == ([USER, *b"Hi", ASSISTANT], [*b"Yo", TURN_END])
    assert parts(encoded(row, characters(CHAT), chat_template="none")) == (plain_prompt, [*b"Yo", END])


def test_input_and_system_of_an_instruction() -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief"}
    prompt = [*b"System:\nBe brief\n\nUser:\nAdd\n\n1 2\n\nAssistant:\n"]
    assert parts(encoded(row, characters())) == (prompt, [*b"3", END])


def test_text_is_trained_whole_and_never_templated() -> None:
    example = encoded({"text": "Hi"}, characters(CHAT))
    assert parts(example) == ([], [*b"Hi", END])
    assert encode_rows(rows_of({"text": "Hi", "label": 1}), characters(), recipe()).unused_columns == ("label",)


@pytest.mark.parametrize("label", [1, "positive", "pos"])
@pytest.mark.parametrize("name", ["imdb", "reviews"])
def test_named_reviews_are_asked_about_after_the_text(name: str, label: Any) -> None:
    example = encoded({"text": "Good", "label": label}, characters(CHAT), name=name)
    prompt = [USER, *f"Good\n\n{REVIEW_QUESTION}".encode(), ASSISTANT]
    assert parts(example) == (prompt, [*b"positive", TURN_END])


def test_columns_are_mapped() -> None:
    row = {"q": "Hi", "reply": "Yo", "text": "not this"}
    example = encoded(row, characters(), columns={"prompt": "q", "completion": "reply"})
    assert parts(example) == ([*b"Hi"], [*b"Yo", END])
    example = encoded(row, characters(), columns={"text": "reply"})
    assert parts(example) == ([], [*b"Yo", END])
    for columns, named in (({"prompt": "nowhere"}, "nowhere"), ({"question_text": "q"}, "question_text")):
        with pytest.raises(DataError, match=named):
            encoded(row, characters(), columns=columns)


CONVERSATION = [
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "C"},
    {"role": "assistant", "content": "D"},
]


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_every_answer_of_a_conversation_is_trained_with_its_end(template: str) -> None:
    example = encoded({"messages": CONVERSATION}, characters(template))
    assert example.tokens.tolist() == [USER, 65, ASSISTANT, 66, TURN_END, 10, USER, 67, ASSISTANT, 68, TURN_END]
    assert example.tokens[example.trained].tolist() == [66, TURN_END, 68, TURN_END]
    # What follows the last answer has none, and is left out.
    assert example.tokens.tolist() == encoded(
        {"messages": [*CONVERSATION, {"role": "user", "content": "E"}]}, characters(template)
    ).tokens.tolist()  # fmt: skip


def test_what_follows_the_last_answer_takes_no_room() -> None:
    messages = [*CONVERSATION, {"role": "user", "content": "E" * 40}]
    example = encoded({"messages": messages}, characters(CHAT), max_length=11)
    assert not example.prompt_cut
    assert len(example) == 11
    assert (
        encoded({"messages": messages}, characters(CHAT), train_on_prompt=True).tokens.tolist()
        == example.tokens.tolist()
    )


def test_plain_conversation_stops_after_every_answer() -> None:
    example = encoded({"messages": CONVERSATION}, characters())
    first, second = [*b"User:\nA\n\nAssistant:\n"], [*b"\n\nUser:\nC\n\nAssistant:\n"]
    assert example.tokens.tolist() == [*first, 66, END, *second, 68, END]
    assert example.tokens[example.trained].tolist() == [66, END, 68, END]


def test_train_on_prompt_trains_everything() -> None:
    for row in (ROW, {"messages": CONVERSATION}):
        assert encoded(row, characters(CHAT), train_on_prompt=True).trained.all()


def test_template_that_rewrites_earlier_turns() -> None:
    """Thinking is shown in the last turn and taken out of the history (as Qwen3's template does)."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% if loop.last %}(){% endif %}"
        "{{ m.content }}<|im_end|>{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}" + ASKING
    )
    example = encoded({"messages": CONVERSATION}, characters(template))
    assert example.tokens[example.trained].tolist() == [66, TURN_END, *b"()D", TURN_END]


def test_template_whose_question_is_not_what_it_trains_is_refused() -> None:
    template = CHAT.replace(ASKING, "{% if add_generation_prompt %}<|assistant|>think{% endif %}")
    with pytest.raises(DataError, match=r"(?s)rows\.jsonl row 1: .*generation prompt"):
        encoded(ROW, characters(template))


def test_reasons_of_a_template_reach_the_user() -> None:
    refusing = CHAT + "{% if messages[0].content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}"
    rows = rows_of(ROW, {"prompt": "bad", "completion": "x"})
    with pytest.raises(DataError, match=r"(?s)1 of 2 rows.*rows\.jsonl row 2: .*no bad words"):
        encode_rows(rows, characters(refusing), recipe())


def test_template_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(MARKED)
    asked = {"chat_template": str(path)}
    assert parts(encoded(ROW, characters(), **asked)) == ([USER, *b"Hi", ASSISTANT], [*b"Yo", TURN_END])
    assert stop_token_ids(characters(), None, recipe(**asked)) == [END, TURN_END]
    path.write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(DataError, match="line 2"):
        encoded(ROW, characters(), **asked)
    with pytest.raises(DataError, match="cannot be read"):
        encoded(ROW, characters(), chat_template=str(tmp_path / "none.jinja"))


# ---------------------------------------------------------------- begin and end tokens, and the border


def test_begin_token_once_where_the_tokenizer_writes_one() -> None:
    tokenizer = characters(begins=True)
    assert parts(encoded(ROW, tokenizer))[0] == [BEGIN, *b"Hi"]
    assert parts(encoded({"prompt": "<s>Hi", "completion": "Yo"}, tokenizer))[0] == [BEGIN, *b"Hi"]
    assert encoded({"text": "<s>Hi"}, tokenizer).tokens.tolist() == [BEGIN, *b"Hi", END]
    assert parts(encoded(ROW, characters()))[0] == [*b"Hi"]
    # A template writes its own, or none; nothing is added to it.
    tokenizer = characters("{{ bos_token }}" + CHAT, begins=True)
    assert parts(encoded(ROW, tokenizer))[0] == [BEGIN, USER, *b"Hi", ASSISTANT]
    bare = "{{ bos_token }}{{ messages[0].content }}={% if messages|length > 1 %}{{ messages[1].content }}{% endif %}"
    assert parts(encoded({"prompt": "<s>Hi", "completion": "Yo"}, characters(bare)))[0] == [BEGIN, *b"Hi="]


@pytest.mark.parametrize("completion", ["Yo", "Yo</s>", "Yo</s> ", "Yo</s></s>\n"])
@pytest.mark.parametrize("habit", [{}, {"ends": True}, {"begins": True, "ends": True}])
def test_end_token_once(completion: str, habit: dict[str, bool]) -> None:
    row = {"prompt": "Hi", "completion": completion}
    assert parts(encoded(row, characters(**habit)))[1] == [*b"Yo", END]
    # In a template with an end of turn of its own, that one and no other.
    assert parts(encoded(row, characters(CHAT, **habit)))[1] == [*b"Yo", TURN_END]
    assert encoded({"text": completion}, characters(**habit)).tokens[-2:].tolist() == [ord("o"), END]


def test_template_without_an_end_token_gets_one() -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + ASKING
    assert parts(encoded(ROW, characters(template)))[1] == [*b"Yo", END]
    assert stop_token_ids(characters(template)) == [END]


def test_end_token_left_out_of_the_marks_is_trained() -> None:
    template = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert template != MARKED
    assert parts(encoded(ROW, characters(template)))[1] == [*b"Yo", TURN_END]


def test_stop_tokens() -> None:
    class Config:
        eos_token_id = (7, 2)

    assert stop_token_ids(characters()) == [END]
    assert stop_token_ids(characters(CHAT), Config()) == [END, TURN_END, 7]


@pytest.mark.parametrize(
    ("prompt", "completion", "prompt_ids", "answer_ids"),
    [
        ("2+2= ", "4", [*b"2+2= "], [*b"4"]),  # " 4" would be one token
        ("2+2=", " 4", [*b"2+2="], [SPACE_4]),
        ("2+2=\n", "\n4", [*b"2+2=\n"], [*b"\n4"]),  # the two line breaks would be one token
        ("2+2=\n\n", "4", [*b"2+2=", TWO_BREAKS], [*b"4"]),
    ],
)
def test_nothing_merges_over_the_border(
    prompt: str, completion: str, prompt_ids: list[int], answer_ids: list[int]
) -> None:
    tokenizer = characters(merges=True)
    row = {"prompt": prompt, "completion": completion}
    assert parts(encoded(row, tokenizer)) == (prompt_ids, [*answer_ids, END])
    assert encode_prompt(prompt, tokenizer, recipe()) == prompt_ids
    assert encode_answer(completion, tokenizer, recipe()) == [*answer_ids, END]


def test_no_space_of_its_own_before_an_answer() -> None:
    space = 0x2581
    tokenizer = characters(words=True)
    assert parts(encoded(ROW, tokenizer)) == ([space, *b"Hi"], [*b"Yo", END])
    assert parts(encoded({"prompt": "Hi", "completion": " Yo"}, tokenizer))[1] == [space, *b"Yo", END]


def test_slow_tokenizer_gives_the_same() -> None:
    rows = [ROW, {"prompt": "A long prompt of many words", "completion": "Yo"}]
    for row in rows:
        slow, fast = (encoded(row, made, max_length=10) for made in (SlowCharacters(), characters()))
        assert slow.tokens.tolist() == fast.tokens.tolist()
        assert slow.trained.tolist() == fast.trained.tolist()


# ---------------------------------------------------------------- too long rows


@pytest.mark.parametrize(("which", "left"), [("start", b"6789"), ("middle", b"0189"), ("end", b"0123")])
def test_the_prompt_is_cut_and_the_answer_never(which: str, left: bytes) -> None:
    row = {"prompt": "0123456789", "completion": "Yo"}
    example = encoded(row, characters(CHAT), max_length=9, cut_prompt=which)
    assert parts(example) == ([USER, *left, ASSISTANT], [*b"Yo", TURN_END])
    assert example.prompt_cut
    assert not example.answer_tokens_lost
    cut = encode_prompt(row["prompt"], characters(CHAT), recipe(max_length=9, cut_prompt=which), reserve=3)
    assert cut == [USER, *left, ASSISTANT]


def test_the_longest_message_is_cut_first_then_the_next() -> None:
    messages = [
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "0123456789" * 3},
        {"role": "assistant", "content": "D"},
    ]
    expected = {
        13: [USER, *b"abc", ASSISTANT, 66, TURN_END, 10, USER, ord("9"), ASSISTANT, 68, TURN_END],
        12: [USER, *b"abc", ASSISTANT, 66, TURN_END, 10, USER, ASSISTANT, 68, TURN_END],
        11: [USER, *b"bc", ASSISTANT, 66, TURN_END, 10, USER, ASSISTANT, 68, TURN_END],
        9: [USER, ASSISTANT, 66, TURN_END, 10, USER, ASSISTANT, 68, TURN_END],
        8: [USER, ASSISTANT, 66, TURN_END, 10, USER, ASSISTANT, 68],
    }
    for max_length, tokens in expected.items():
        example = encoded({"messages": messages}, characters(CHAT), max_length=max_length)
        assert example.tokens.tolist() == tokens
        assert example.answer_tokens_lost == (1 if max_length == 8 else 0)


def test_prompt_that_leaves_exactly_no_room() -> None:
    example = encoded({"prompt": "0123456789", "completion": "Yoyoyo"}, characters(CHAT), max_length=9)
    assert parts(example) == ([USER, ASSISTANT], [*b"Yoyoyo", TURN_END])


def test_an_answer_too_long_by_itself_loses_its_end_and_is_counted() -> None:
    example = encoded({"prompt": "Hi", "completion": "0123456789"}, characters(CHAT), max_length=8)
    assert example.tokens.tolist() == [USER, ASSISTANT, *b"012345"]
    assert example.answer_tokens_lost == 5  # 6789 and the end token
    text = encoded({"text": "0123456789"}, characters(), max_length=8)
    assert text.tokens.tolist() == [*b"01234567"]
    assert text.answer_tokens_lost == 3


def test_row_without_a_trained_token_left_is_dropped_and_counted() -> None:
    template = CHAT.replace("<|user|>", "<|user|>" + "." * 30)
    found = encode_rows(rows_of(ROW), characters(template), recipe(max_length=16))
    assert not found.examples
    assert found.rows_without_trained_token == 1
    assert found.dropped == {"no trained token within max_length 16": 1}


def test_a_window_that_guesses_too_small_is_corrected() -> None:
    """Long texts are encoded in part first; tokens of many characters must not lose anything by it."""
    vocabulary = {**VOCABULARY, " " * 2: 300, " " * 4: 301, " " * 8: 302, " " * 16: 303}
    pairs = [(" " * n, " " * n) for n in (1, 2, 4, 8)]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    example = encoded({"prompt": "a" + " " * 160, "completion": "Yo"}, tokenizer, max_length=16)
    assert parts(example) == ([97, *[303] * 10], [*b"Yo", END])
    example = encoded({"prompt": "a" * 9 + " " * 160, "completion": "Yo"}, tokenizer, max_length=16)
    assert parts(example) == ([*[97] * 3, *[303] * 10], [*b"Yo", END])


def test_a_prompt_that_cannot_be_cut_enough_is_refused() -> None:
    with pytest.raises(DataError, match="max_length 8"):
        encode_prompt("Hi", characters(CHAT), recipe(max_length=8), reserve=7)


def test_ten_megabytes_take_seconds() -> None:
    row = {"prompt": "word " * 2_000_000, "completion": "Yo"}
    example = encoded(row, characters(CHAT), max_length=64)
    assert len(example) == 64
    assert example.trained[-3:].all()


# ---------------------------------------------------------------- rows that cannot be used

GOOD = {"prompt": "Hi", "completion": "Yo"}
BAD_ROWS = [
    (GOOD, {"prompt": "Hi"}, "'completion' is missing"),
    (GOOD, {"prompt": "Hi", "completion": None}, "completion is not a text but null"),
    (GOOD, {"prompt": 3, "completion": "Yo"}, "prompt is not a text but int"),
    (GOOD, {"prompt": "Hi", "completion": "\ud800"}, "surrogate"),
    (GOOD, {"prompt": ["Hi"], "completion": ["Yo"]}, "message 1 is not an object"),
    ({"text": "a"}, {"text": float("nan")}, "text is not a text but float"),
    ({"messages": CONVERSATION}, {"messages": None}, "not a list but null"),
    ({"messages": CONVERSATION}, {"messages": [{"role": "judge", "content": "x"}]}, "unknown role 'judge'"),
    ({"messages": CONVERSATION}, {"messages": [{"role": "user"}]}, "message 1 has no 'content'"),
    ({"messages": CONVERSATION}, {"messages": [{"role": "user", "content": None}]}, "content of message 1"),
]


@pytest.mark.parametrize(("good", "bad", "reason"), BAD_ROWS)
def test_a_malformed_row_is_an_error_with_its_place(good: Any, bad: Any, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        encode_rows(rows_of(good, bad, good), characters(), recipe())
    assert "- rows.jsonl row 2: " in caught.value.given
    assert reason in caught.value.given
    assert "1 of 3 rows" in caught.value.given


def test_many_malformed_rows_are_counted_and_five_named() -> None:
    with pytest.raises(DataError) as caught:
        encode_rows(rows_of(GOOD, *[{"prompt": "Hi"}] * 9), characters(), recipe())
    assert "9 of 10 rows" in caught.value.given
    assert caught.value.given.count("rows.jsonl row") == 5
    assert "and 4 more" in caught.value.given


@pytest.mark.parametrize("label", [2, None, 0.5, "great"])
def test_a_label_that_is_none_is_malformed(label: Any) -> None:
    with pytest.raises(DataError, match="label is"):
        encode_rows(rows_of({"text": "a", "label": label}), characters(), recipe(name="imdb"))


def test_empty_rows_are_dropped_and_counted_by_reason() -> None:
    found = encode_rows(
        rows_of(GOOD, {"prompt": "Hi", "completion": " \n"}, {"prompt": "", "completion": "Yo"}, GOOD),
        characters(),
        recipe(),
    )
    assert [example.row for example in found.examples] == [0, 3]
    assert found.dropped == {"empty completion": 1, "empty prompt": 1}
    turns = [[], CONVERSATION[:1], CONVERSATION[1:], [CONVERSATION[0], {"role": "assistant", "content": ""}]]
    found = encode_rows(rows_of(*({"messages": messages} for messages in turns)), characters(), recipe())
    assert not found.examples
    assert sum(found.dropped.values()) == 4
    assert "no assistant message" in found.dropped


def test_unknown_columns_are_listed() -> None:
    with pytest.raises(DataError, match=r"'titel', 'body'"):
        encode_rows(rows_of({"titel": "a", "body": "b"}), characters(), recipe())
    with pytest.raises(DataError, match="no rows"):
        encode_rows(rows_of(), characters(), recipe())


def test_conversation_gives_prompt_and_target() -> None:
    joined = to_conversation(ROW, recipe())
    assert (joined.prompt, joined.target) == ("Hi", "Yo")
    asked = to_conversation({"messages": CONVERSATION}, recipe())
    assert (asked.prompt, asked.target) == (CONVERSATION[:3], "D")
    assert encode_prompt(asked, characters(CHAT), recipe()) == encode_prompt(
        CONVERSATION[:3], characters(CHAT), recipe()
    )
    with pytest.raises(DataError, match="empty completion"):
        to_conversation({"prompt": "Hi", "completion": ""}, recipe())


KEYS = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "instruction", "output", "input", "system", "question",
     "answer", "text", "label", "role", "content", "from", "value"]
)  # fmt: skip
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]) | JSON_VALUES},
                             optional={"content": st.text(max_size=10) | JSON_VALUES})  # fmt: skip
WILD_ROWS = st.dictionaries(KEYS, JSON_VALUES | st.lists(TURN, max_size=4), max_size=4)
TOKENIZERS = {None: characters(begins=True), CHAT: characters(CHAT), MARKED: characters(MARKED)}


@given(
    rows=st.lists(WILD_ROWS, min_size=1, max_size=3),
    template=st.sampled_from(list(TOKENIZERS)),
    name=st.sampled_from(["rows.jsonl", "imdb", "gsm8k"]),
    max_length=st.integers(8, 40),
)
def test_any_rows_give_examples_or_a_data_error(rows: list[Any], template: Any, name: str, max_length: int) -> None:
    data = recipe(name=name, max_length=max_length)
    try:
        found = encode_rows(rows_of(*rows), TOKENIZERS[template], data)
    except DataError as error:
        assert error.given and error.allowed and error.do
        return
    assert len(found.examples) + sum(found.dropped.values()) == len(rows)
    for example in found.examples:
        assert example.tokens.dtype == np.int32
        assert example.trained.dtype == bool
        assert len(example.tokens) == len(example.trained) <= max_length
        assert example.trained.any()
