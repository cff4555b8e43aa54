"""The pocket model's corpus: rows of just under 1,024 tokens, each a series of documents closed by `<|end|>`.

    python benchmarks/pocket/make_corpus.py --shared ../shared --tokenizer /tmp/pocket/init --out /tmp/pocket

Writes corpus.jsonl and heldout.jsonl, one {"text": ...} a line. Held-out prose is from books that the corpus lacks. The
same arguments give the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from dialogue_texts import END
from documents import assert_clean, books, documents
from tokenizers import Tokenizer

# Characters of each kind; about 35 million tokens together. Prose ends earlier when the books do.
CHARACTERS = {"prose": 34e6, "numbers": 24e6, "opinions": 24e6, "dialogues": 30e6}
HELDOUT_SHARE = 0.01
CHECKED_DOCUMENTS = 30_000
ENCODED_AT_ONCE = 4096


def draw_documents(library: list[list[str]], draw: random.Random, share: float) -> list[str]:
    """Documents of all kinds, shuffled, `share` of the characters of each kind."""
    chosen: list[str] = []
    for kind, texts in documents(library, draw).items():
        characters = share * CHARACTERS[kind]
        for text in texts:
            characters -= len(text)
            if characters < 0:
                break
            chosen.append(text if text.endswith(END) else text + END)
    draw.shuffle(chosen)
    return chosen


def rows(texts: list[str], tokenizer: Tokenizer, row_tokens: int) -> Iterator[tuple[str, int]]:
    """Whole documents put together as long as they fit, with the row's number of tokens."""
    gathered, tokens = [], 0
    pending = iter(texts)
    while batch := list(islice(pending, ENCODED_AT_ONCE)):
        for text, encoded in zip(batch, tokenizer.encode_batch(batch), strict=True):
            length = len(encoded.ids)
            if tokens + length > row_tokens and gathered:
                yield "".join(gathered), tokens
                gathered, tokens = [], 0
            gathered.append(text)
            tokens += length
    if gathered:
        yield "".join(gathered), tokens


def write(path: Path, texts: list[str], tokenizer: Tokenizer, row_tokens: int) -> None:
    total, count = 0, 0
    with path.open("w", encoding="utf-8") as file:
        for text, tokens in rows(texts, tokenizer, row_tokens):
            file.write(json.dumps({"text": text}) + "\n")
            total, count = total + tokens, count + 1
    print(f"{path}: {count:,} rows, {total / 1e6:.1f} M tokens, {path.stat().st_size / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--tokenizer", type=Path, required=True, help="the folder that make_tokenizer.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=1.0, help="of the whole corpus, for trials")
    # Four tokens are left to a trainer that adds marks of its own to a row.
    parser.add_argument("--row-tokens", type=int, default=1020)
    arguments = parser.parse_args()
    assert_clean(CHECKED_DOCUMENTS)
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    library = books(arguments.shared)
    random.Random("held-out books").shuffle(library)
    cut = max(1, round(HELDOUT_SHARE * 2 * len(library)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, shelf, share in (
        ("corpus", library[cut:], arguments.share),
        ("heldout", library[:cut], arguments.share * HELDOUT_SHARE),
    ):
        texts = draw_documents(shelf, random.Random(name), share)
        write(arguments.out / f"{name}.jsonl", texts, tokenizer, arguments.row_tokens)


if __name__ == "__main__":
    main()
