"""The pocket model's tokenizer: byte-level BPE of 3,072 tokens with single digits, trained on the corpus's documents.

    python benchmarks/pocket/make_tokenizer.py --shared ../shared --out /tmp/pocket/init

Writes tokenizer.json, tokenizer_config.json and chat_template.jinja. The same documents give the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from dialogue_texts import ASSISTANT, END, SYSTEM, USER
from documents import books, documents
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCABULARY_TOKENS = 3072
PAD = "<|pad|>"
SPECIAL_TOKENS = [END, PAD, USER, ASSISTANT, SYSTEM]  # in the order of their ids, from 0
LONGEST_TOKENS = 1024
SAMPLE_BYTES = {"prose": 12e6, "numbers": 1e6, "opinions": 2e6, "dialogues": 4e6}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
{%- elif message['role'] in ['system', 'user'] -%}
{{- '<|' + message['role'] + '|>' + message['content'] -}}
{%- else -%}
{{- raise_exception('roles are system, user and assistant, got ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Byte-level BPE; digits stand alone, so 12 and 123 share their parts and no number is a word of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_TOKENS,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The marks of a dialogue are no text: without them the merges are learned from what people write.
    marks = normalizers.Replace(Regex(r"<\|[a-z]+\|>"), "\n")
    tokenizer.train_from_iterator((marks.normalize_str(text) for text in texts), trainer)
    return tokenizer


def sample(shared: Path) -> Iterator[str]:
    """Documents of every kind up to a number of bytes each."""
    for kind, texts in documents(books(shared), random.Random("tokenizer")).items():
        left = SAMPLE_BYTES[kind]
        for text in texts:
            left -= len(text)
            if left < 0:
                break
            yield text


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """In the files that `transformers.AutoTokenizer` reads; the class name is one that every 5.x knows."""
    folder.mkdir(parents=True, exist_ok=True)
    # Without indentation: the file ships inside the package and counts towards its 8 MB.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [USER, ASSISTANT, SYSTEM],
        "model_max_length": LONGEST_TOKENS,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(sample(arguments.shared))
    save(tokenizer, arguments.out)
    size = (arguments.out / "tokenizer.json").stat().st_size
    print(f"{arguments.out}: {tokenizer.get_vocab_size():,} tokens, tokenizer.json {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
