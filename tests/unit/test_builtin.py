"""The built-in data sets: always the same, balanced, right, and with nothing in common between train and test."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from thriftune.data import builtin
from thriftune.errors import DataError

# The rows are part of what a published number means. A new hash here makes every earlier demo number incomparable.
GOLDEN = {
    ("sums", "train"): "28dd33c7f50403ca",
    ("sums", "validation"): "0925f1b87c7a6553",
    ("sums", "test"): "14fb57cc1b7db06d",
    ("reviews", "train"): "5ee22b5a6edc87c1",
    ("reviews", "validation"): "d24149a15e9862ba",
    ("reviews", "test"): "be689b0510f3106a",
}
SETS = sorted(GOLDEN)


def first_values(name: str, split: str) -> list[str]:
    return [next(iter(row.values())) for row in builtin.rows(name, split)]


def digest(name: str, split: str) -> str:
    return hashlib.sha256(json.dumps(builtin.rows(name, split)).encode()).hexdigest()[:16]


@pytest.mark.parametrize(("name", "split"), SETS)
def test_rows_are_the_published_ones(name: str, split: str) -> None:
    assert len(builtin.rows(name, split)) == builtin.ROWS_BY_SPLIT[name][split]
    assert digest(name, split) == GOLDEN[name, split]


@pytest.mark.parametrize("name", ["sums", "reviews"])
def test_no_text_occurs_twice(name: str) -> None:
    texts = [text for split in builtin.ROWS_BY_SPLIT[name] for text in first_values(name, split)]
    assert len(texts) == len(set(texts))


def test_answers_of_sums_are_right() -> None:
    for split in builtin.ROWS_BY_SPLIT["sums"]:
        for row in builtin.rows("sums", split):
            steps, final = row["answer"].split("\n#### ")
            results = []
            for shown, inside, result in re.findall(r"(\d+ [-+*] \d+) = <<(\d+[-+*]\d+)=(\d+)>>", steps):
                assert shown.replace(" ", "") == inside
                left, sign, right = re.fullmatch(r"(\d+)([-+*])(\d+)", inside).groups()
                assert builtin.OPERATIONS[sign](int(left), int(right)) == int(result) >= 2
                results.append(result)
            assert 1 <= len(results) <= 2
            assert results[-1] == final
            assert len(results) == len(steps.split("\n"))


def test_reviews_are_balanced_and_short() -> None:
    for split in builtin.ROWS_BY_SPLIT["reviews"]:
        rows = builtin.rows("reviews", split)
        assert sum(row["label"] == "positive" for row in rows) * 2 == len(rows)
        assert {row["label"] for row in rows} == {"positive", "negative"}
        for row in rows:
            assert 25 <= len(row["text"].split()) <= 50
            assert "{" not in row["text"]


def test_train_and_test_share_neither_people_nor_titles_nor_sentences() -> None:
    for table in (builtin.PEOPLE, builtin.TITLES, builtin.OPENINGS):
        assert not set(table["train"]) & set(table["test"])
    for table in (builtin.BODIES, builtin.VERDICTS):
        for kind in table["train"]:
            assert not set(table["train"][kind]) & set(table["test"][kind])
    assert not {story.question for story in builtin.STORIES["train"]} & {
        story.question for story in builtin.STORIES["test"]
    }
    for name in ("sums", "reviews"):
        for split, strangers in (("train", "test"), ("validation", "test"), ("test", "train")):
            words = set(re.findall(r"\w+", " ".join(first_values(name, split))))
            assert not words & set(builtin.PEOPLE[strangers])


def test_no_sentence_of_a_test_review_occurs_in_train() -> None:
    """Even with titles and people aside: sentences that decide a label are new in the test split."""

    def sentences(split: str) -> set[str]:
        return {part for text in first_values("reviews", split) for part in re.split(r"(?<=\.) ", text)}

    assert not sentences("train") & sentences("test")


def test_counting_kind_words_is_not_enough() -> None:
    """In a fifth of the rows the words of the other sign are at least as many as those of the verdict's."""
    praise = set(builtin.PRAISE).union(*(subject.praise for subject in builtin.SUBJECTS))
    blame = set(builtin.BLAME).union(*(subject.blame for subject in builtin.SUBJECTS))
    rows = builtin.rows("reviews", "test")
    right = 0
    for row in rows:
        words = re.findall(r"\w+", row["text"].lower())
        balance = sum(word in praise for word in words) - sum(word in blame for word in words)
        right += (balance > 0) if row["label"] == "positive" else (balance < 0)
    assert 0.5 < right / len(rows) < 0.85


@pytest.mark.parametrize(("name", "split"), [("sum", "train"), ("sums", "dev"), ("reviews", "")])
def test_unknown_names_are_refused(name: str, split: str) -> None:
    with pytest.raises(DataError, match="reviews with train, validation, test"):
        builtin.rows(name, split)
