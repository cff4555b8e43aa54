"""What counts as an answer and when it is right, on cases by hand and on the data's own answers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thriftune.data import load_rows, to_conversation
from thriftune.errors import DataError
from thriftune.evaluate.tasks import TASKS
from thriftune.evaluate.tasks.gsm8k import parse_number
from thriftune.evaluate.tasks.imdb import parse_label
from thriftune.recipe import DataRecipe


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so 18\n#### 18", "18"),
        ("####18", "18"),
        ("#### 18.", "18"),
        ("#### 18\n", "18"),
        ("####\n18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### $1,200.50.", "1200.5"),
        ("#### -5", "-5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### \u22125", "-5"),
        ("#### +5", "5"),
        ("#### 5.0", "5"),
        ("#### 5.50", "5.5"),
        ("#### .5", "0.5"),
        ("#### 0.0", "0"),
        ("#### -0", "0"),
        ("#### 007", "7"),
        ("#### 100", "100"),
        ("#### 5 apples", "5"),
        ("#### 5%", "5"),
        ("#### 5,", "5"),
        ("#### 3 #### 4", "4"),
        ("#### 3\n\nQuestion: ...\n#### 4", "4"),
        ("##### 4", "4"),
        ("#### 3 ####", None),
        ("#### ", None),
        ("18", None),
        ("The answer is 18.", None),
        ("### 18", None),
        ("", None),
        ("#### eighteen", None),
        ("#### The answer is 18", None),
        ("#### 1/2", None),
        ("#### 12:30", None),
        ("#### 1e3", None),
        ("#### 2^10", None),
        ("#### \u0663", None),
        ("#### -", None),
        ("#### $", None),
        ("#### ,5", None),
    ],
)
def test_the_number_after_the_last_marks_counts_and_nothing_else(answer, number):
    assert parse_number(answer) == number


@given(st.integers(-(10**12), 10**12))
def test_every_way_to_write_a_whole_number_is_the_same(number):
    assert parse_number(f"text\n#### {number}") == str(number)
    assert parse_number(f"#### {number:,}.00 dollars") == str(number)


@given(st.text(max_size=60))
def test_no_text_breaks_the_parsers(text):
    parsed = parse_number("#### " + text)
    assert parsed is None or float(parsed) == float(parsed)
    assert parse_label(text) in (None, "positive", "negative")


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("positive", "positive"),
        ("Positive.", "positive"),
        (" NEGATIVE\nbecause", "negative"),
        ('"negative"', "negative"),
        ("**Positive**", "positive"),
        ("negative, not positive", "negative"),
        ("positively", None),
        ("It is positive", None),
        ("non-negative", None),
        ("", None),
        ("pos", None),
    ],
)
def test_a_label_counts_at_the_start_of_an_answer(answer, label):
    assert parse_label(answer) == label


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_is_called_as_in_the_table_and_its_choices_are_their_own_prediction(name):
    task = TASKS[name]
    assert task.name == name
    assert all(task.parse(choice) == choice for choice in task.choices or ())


def score_of(name: str, data: DataRecipe, answers=None) -> tuple[int, int]:
    """Right answers and rows when the model says the rows' own answers, or those given."""
    task = TASKS[name]
    rows = load_rows(data, task.split).rows
    said = answers or [to_conversation(row, data).target for row in rows]
    right = sum(task.correct(task.parse(text), row, data) for text, row in zip(said, rows, strict=True))
    return right, len(rows)


def shuffled_answers(name: str, data: DataRecipe) -> list[str]:
    answers = [to_conversation(row, data).target for row in load_rows(data, TASKS[name].split).rows]
    random.Random(0).shuffle(answers)
    return answers


@pytest.mark.parametrize("name", ["sums", "reviews"])
def test_the_built_in_rows_own_answers_are_all_right(name):
    right, rows = score_of(name, DataRecipe(name=name))
    assert right == rows >= 300


def test_shuffled_labels_are_right_by_half():
    data = DataRecipe(name="reviews")
    right, rows = score_of("reviews", data, shuffled_answers("reviews", data))
    assert 0.4 < right / rows < 0.6


@pytest.mark.shared
def test_gsm8ks_own_answers_are_all_right_and_shuffled_ones_hardly_ever(shared):
    data = DataRecipe(name="gsm8k", path=str(shared / "data" / "gsm8k"))
    assert score_of("gsm8k", data) == (1319, 1319)
    right, rows = score_of("gsm8k", data, shuffled_answers("gsm8k", data))
    assert right / rows < 0.03


@pytest.mark.shared
def test_imdbs_own_labels_are_all_right(shared):
    data = DataRecipe(name="imdb", path=str(shared / "data" / "imdb"))
    assert score_of("imdb", data) == (25_000, 25_000)


def test_the_prompt_is_that_of_training_and_does_not_hold_the_answer():
    data = DataRecipe(name="reviews")
    for row in load_rows(data, "test").rows[:50]:
        prompt = TASKS["reviews"].prompt(row, data)
        conversation = to_conversation(row, data)
        assert prompt == list(conversation.messages[:-1])
        assert TASKS["reviews"].target(row, data) == row["label"] == conversation.messages[-1]["content"]


def test_a_row_that_cannot_be_marked_is_an_error():
    row = {"question": "How many?", "answer": "Many."}
    with pytest.raises(DataError, match=r"Many\."):
        TASKS["gsm8k"].target(row, DataRecipe(name="own.jsonl"))
    assert not TASKS["gsm8k"].correct(None, row, DataRecipe(name="own.jsonl"))
