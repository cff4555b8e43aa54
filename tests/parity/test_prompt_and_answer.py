"""What is trained is what is asked: encode_rows gives encode_prompt followed by encode_answer, on every tokenizer."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from thriftune.data import encode_answer, encode_prompt, encode_prompts, encode_rows, to_conversation
from thriftune.data.sources import Places, Rows
from thriftune.recipe import DataRecipe

TEXTS = ["the film was good and the plot was bad \n\n 12 + 30 = 42", "what is it? it is a very long day.", "  A: x"] * 9
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 2+2? A: ", "completion": "4"},
    {"prompt": "What is 2+2?\n", "completion": "\n\n4\n"},
    {"prompt": "The film was", "completion": " very good"},
    {"prompt": "goo", "completion": "d"},
    {"prompt": "\n", "completion": " x"},
    {"prompt": "Zo\u00eb \U0001f600", "completion": "\U0001f600 \u00eb"},
    {"prompt": "x" * 50, "completion": "y" * 50},
]
QUESTIONS = [{"question": row["prompt"], "answer": row["completion"]} for row in ROWS if row["prompt"].strip()]


def trained_bpe(kind: str) -> Any:
    """A small BPE tokenizer of one of three makes: GPT-2's (bytes), Llama 2's (a space before every text), byte-level
    that writes <s> by itself."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if kind == "sentencepiece" else None))
    special = [*SPECIAL, "<unk>"] if kind == "sentencepiece" else SPECIAL
    alphabet: list[str] = []
    if kind == "sentencepiece":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        alphabet = ["\n", "▁"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if kind != "bytes":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


KINDS = ("bytes", "sentencepiece", "bytes that begin")
SMALL = {kind: trained_bpe(kind) for kind in KINDS}


def llama3(folder: Path) -> Any:
    """Llama 3's tokenizer from the ranked pieces of its tokenizer.model: where merging in rank order needs no list."""
    vocabulary = json.loads((folder / "vocab.derived.json").read_text(encoding="utf-8"))
    merges = [
        tuple(line.split(" "))
        for line in (folder / "merges.derived.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#version")
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in LLAMA3_SPECIAL])
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


def assert_trained_is_asked(rows: list[dict[str, Any]], tokenizer: Any, data: DataRecipe) -> None:
    source = Rows(rows, Places("rows", range(1, len(rows) + 1)), "rows")
    examples = encode_rows(source, tokenizer, data).examples
    for example in examples:
        conversation = to_conversation(rows[example.row], data)
        prompt = encode_prompt(conversation.prompt, tokenizer, data)
        answer = encode_answer(conversation.target, tokenizer, data)
        assert example.tokens.tolist() == prompt + answer
        assert example.trained.tolist() == [False] * len(prompt) + [True] * len(answer)
        assert not (tokenizer.bos_token_id != tokenizer.eos_token_id and prompt[:2] == [tokenizer.bos_token_id] * 2)


def recipe(**options: Any) -> DataRecipe:
    return DataRecipe(**{"name": "rows.jsonl", **options})


def with_template(tokenizer: Any, template: str | None) -> Any:
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [None, CHAT])
@pytest.mark.parametrize("rows", [ROWS, QUESTIONS])
def test_small_tokenizers(kind: str, template: str | None, rows: list[dict[str, Any]]) -> None:
    usable = [row for row in rows if all(value.strip() for value in row.values())]
    assert_trained_is_asked(usable, with_template(SMALL[kind], template), recipe())


@given(
    prompt=st.text(alphabet="ab .4\n", min_size=1, max_size=12).filter(str.strip),
    completion=st.text(alphabet="ab .4\n", min_size=1, max_size=8).filter(str.strip),
    kind=st.sampled_from(KINDS),
    template=st.sampled_from([None, CHAT]),
)
def test_any_border(prompt: str, completion: str, kind: str, template: str | None) -> None:
    tokenizer = with_template(SMALL[kind], template)
    assert_trained_is_asked([{"prompt": prompt, "completion": completion}], tokenizer, recipe())


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_survives(kind: str) -> None:
    """Encoding by segments loses and adds nothing: decoded, the row reads as it was written."""
    tokenizer = with_template(SMALL[kind], None)
    rows = Rows([{"prompt": "the film", "completion": " was good"}], Places("rows", [1]), "rows")
    (example,) = encode_rows(rows, tokenizer, recipe()).examples
    text = tokenizer.decode(example.tokens.tolist()).replace("▁", " ").replace(" ", "")
    assert text.removeprefix("<s>") == "thefilmwasgood</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_goes_on_as_it_was_trained(kind: str) -> None:
    """The second question of a conversation is asked with the first answer encoded as it was trained."""
    messages = [
        {"role": "user", "content": "what is it? "},
        {"role": "assistant", "content": " it is good"},
        {"role": "user", "content": "and the plot?"},
        {"role": "assistant", "content": "bad"},
    ]
    for template in (None, CHAT):
        tokenizer = with_template(SMALL[kind], template)
        (example,) = encode_rows(
            Rows([{"messages": messages}], Places("rows", [1]), "rows"), tokenizer, recipe()
        ).examples
        asked = encode_prompt(messages[:3], tokenizer, recipe()) + encode_answer("bad", tokenizer, recipe())
        assert example.tokens.tolist() == asked


@pytest.mark.shared
@pytest.mark.parametrize("model", ["reader-16m", "stories260K"])
@pytest.mark.parametrize("template", ["auto", "none"])
def test_real_tokenizers(shared: Path, model: str, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    usable = [row for row in ROWS if row["prompt"].strip()]
    assert_trained_is_asked(usable, tokenizer, recipe(chat_template=template))
    assert_trained_is_asked(QUESTIONS, tokenizer, recipe(chat_template=template))


@pytest.mark.shared
def test_llama3_is_encoded_as_the_whole_text_would_be(shared: Path) -> None:
    """With a template whose border never merges, segments give what every other tool gets from the whole text."""
    tokenizer = with_template(llama3(shared / "tokenizers" / "llama3"), LLAMA3_CHAT)
    assert tokenizer("Hello world")["input_ids"][1:] == [9906, 1917]  # as Llama 3's own tokenizer does
    rows = [json.loads(line) for line in (shared / "data/gsm8k/test.jsonl").read_text().splitlines()[:100]]
    data = recipe(name="gsm8k")
    assert_trained_is_asked(rows, tokenizer, data)
    for example in encode_rows(Rows(rows, Places("rows", range(100)), "rows"), tokenizer, data).examples:
        messages = list(to_conversation(rows[example.row], data).messages)
        whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert example.tokens.tolist() == whole
    ranked = (shared / "tokenizers/llama3/tokenizer.model").read_bytes().split(b"\n")[9906].split()
    assert base64.b64decode(ranked[0]) == b"Hello"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [CHAT, None])
def test_prompts_encoded_together_are_those_encoded_one_by_one(kind, template, monkeypatch, tmp_path):
    monkeypatch.setattr("thriftune.data.encoding.ROWS_A_CHUNK", 3)
    if template:
        (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
        template = str(tmp_path / "chat.jinja")
    data = DataRecipe(name="rows.jsonl", max_length=60, cut_prompt="start", chat_template=template or "none")
    prompts = [to_conversation(row, data).prompt for row in [*QUESTIONS, *QUESTIONS[::-1]]]
    prompts += ["as it is", "a text that is much too long for the room " * 40]
    together = encode_prompts(prompts, SMALL[kind], data, reserve=2)
    assert together == [encode_prompt(prompt, SMALL[kind], data, reserve=2) for prompt in prompts]
    assert max(map(len, together)) <= 58 and len({tuple(ids) for ids in together}) > 6
