"""The documents of the pocket model's corpus, by kind: prose from books, numbers, opinions, dialogues.

Prose is public-domain English from `../shared/data/books.txt.xz` (Project Gutenberg texts, headers removed); the rest
is made by seeded code. No generated document uses a sentence of the built-in `sums` and `reviews`: `assert_clean`
compares a large sample of each kind with the fixed parts of their templates.
"""

from __future__ import annotations

import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path

from dialogue_texts import dialogue_document
from number_texts import number_document
from opinion_texts import opinion_document

from thriftune.data import builtin

PLAIN_MARKS = str.maketrans(
    {
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{EM DASH}": " - ",
        "\N{EN DASH}": "-",
        "\N{HORIZONTAL ELLIPSIS}": "...",
    }
)
PASSAGE_CHARACTERS = (300, 1600)
# Parts of a template with fewer words than this are common English ("{name} has {a}"), and prove nothing.
TELLING_WORDS = 5


def paragraphs(book: str) -> Iterator[str]:
    """The running text of a book in plain quotes and dashes, without headings, rules and tables."""
    for block in re.split(r"\n\s*\n", book):
        text = re.sub(r"\s+", " ", block.translate(PLAIN_MARKS).replace("_", "").replace("--", " - ")).strip()
        letters = sum(letter.islower() for letter in text)
        if len(text) >= 40 and letters > 0.6 * len(text) and "|" not in text and text[-1] in ".!?\"':;,-":
            yield text


def books(shared: Path) -> list[list[str]]:
    """Every book as its list of paragraphs."""
    with lzma.open(shared / "data" / "books.txt.xz", "rt", encoding="utf-8") as file:
        return [found for book in file.read().split("<|endoftext|>") if (found := list(paragraphs(book)))]


def passages(library: list[list[str]], draw: random.Random) -> Iterator[str]:
    """Neighbouring paragraphs of one book, each passage of a length of its own; every paragraph comes once."""
    for number in draw.sample(range(len(library)), len(library)):
        gathered, wanted = "", draw.randint(*PASSAGE_CHARACTERS)
        for paragraph in library[number]:
            if gathered and len(gathered) + len(paragraph) > wanted:
                yield gathered
                gathered, wanted = "", draw.randint(*PASSAGE_CHARACTERS)
            gathered = f"{gathered}\n{paragraph}" if gathered else paragraph[: 2 * PASSAGE_CHARACTERS[1]]
        yield gathered


def sentences(library: list[list[str]], draw: random.Random) -> Iterator[str]:
    """Single sentences of six to twenty words, without end."""
    while True:
        book = draw.choice(library)
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", draw.choice(book)):
            if 6 <= len(sentence.split()) <= 20 and sentence[0].isalpha() and '"' not in sentence:
                yield sentence
                break


def documents(library: list[list[str]], draw: random.Random) -> dict[str, Iterator[str]]:
    """One stream a kind, each with its own seed; all but prose are without end."""
    seeds = {kind: random.Random(draw.random()) for kind in ("prose", "numbers", "opinions", "dialogues")}
    lines = sentences(library, random.Random(draw.random()))
    return {
        "prose": passages(library, seeds["prose"]),
        "numbers": (number_document(seeds["numbers"]) for _ in iter(int, 1)),
        "opinions": (opinion_document(seeds["opinions"]) for _ in iter(int, 1)),
        "dialogues": (dialogue_document(seeds["dialogues"], line) for line in lines),
    }


def telling_parts() -> list[str]:
    """What stands between the slots of the built-in templates, where it is five words or more; lower case."""
    templates: list[str] = [story.question for side in builtin.STORIES.values() for story in side]
    for table in (builtin.OPENINGS, builtin.CLOSINGS):
        templates += [sentence for side in table.values() for sentence in side]
    for table in (builtin.BODIES, builtin.VERDICTS):
        templates += [sentence for side in table.values() for kind in side.values() for sentence in kind]
    parts = {part.strip(" .,?!:").lower() for template in templates for part in re.split(r"\{\w+\}", template)}
    return sorted(part for part in parts if len(part.split()) >= TELLING_WORDS)


def assert_clean(documents_each: int) -> None:
    """No document holds a telling part of a demo template, its answers' marks or its labels.

    Prose is left out, and with it the sentences that dialogues quote: those are books, which may say what they like.
    """
    draw = random.Random("check")
    makers = (
        number_document,
        opinion_document,
        lambda source: dialogue_document(source, "A horse ran over a wide hill."),
    )
    forbidden = re.compile("|".join(map(re.escape, [*telling_parts(), "<<", "####", "positive", "negative"])))
    for maker in makers:
        for _ in range(documents_each):
            text = maker(draw)
            if found := forbidden.search(text.lower()):
                raise AssertionError(f"the corpus holds {found.group()!r} of the demo's data: {text!r}")
