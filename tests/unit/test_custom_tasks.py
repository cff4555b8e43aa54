"""A user's own tasks: exact match with a column, and a function in a file; what they accept and what they refuse."""

from __future__ import annotations

import json

import pytest

from chain_model import byte_tokenizer, chain_model, says
from command_line import runner
from thriftune.errors import DataError, InputError
from thriftune.evaluate import check_task, evaluate, file_label, is_own
from thriftune.evaluate.intervals import Z_95, wilson
from thriftune.evaluate.own import normalise
from thriftune.evaluate.score import mean_of_marks
from thriftune.recipe import DataRecipe, GenerationRecipe
from thriftune.serving import task_data

ROWS = [
    {"question": "One?", "answer": "no matter", "right": " BLUE  sky\n", "points": 1},
    {"question": "Two?", "answer": "no matter", "right": "red", "points": 0.25},
    {"question": "Three?", "answer": "no matter", "right": "blue sky", "points": 0},
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(words=("Blue Sky", "4"))


@pytest.fixture
def rows_file(tmp_path):
    return written(tmp_path, ROWS)


def written(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(task, model, tokenizer, path, **changes):
    options = {
        "data": DataRecipe(name=str(path)),
        "settings": GenerationRecipe(max_new_tokens=8, batch_size=2),
        "limit": None,
        "split": "test",
        "answers_path": None,
        "model_name": "m",
        "adapter_name": None,
        "on_progress": lambda progress: None,
    }
    return evaluate(task, model, tokenizer, **{**options, **changes})


# -------------------------------------------------------------------------------------------------------------- exact


def test_an_exact_match_is_counted_row_by_row_with_wilsons_interval(tokenizer, rows_file, tmp_path):
    model = chain_model(tokenizer, says(tokenizer, "Blue Sky"))
    path = tmp_path / "answers.jsonl"
    seen = []
    result = ask("exact:right", model, tokenizer, rows_file, answers_path=path, on_progress=seen.append)
    assert (result.metric, result.value, result.rows) == ("exact_match", 2 / 3, 3)
    assert (result.low, result.high) == wilson(2, 3, Z_95)
    assert "NFKC" in result.details["marked_by"] and "'right'" in result.details["marked_by"]
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert [answer["row"] for answer in answers] == [0, 1, 2]
    assert [answer["correct"] for answer in answers] == [True, False, True]
    assert [answer["target"] for answer in answers] == ["blue sky", "red", "blue sky"]
    assert {answer["answer"] for answer in answers} == {"Blue Sky"}
    assert answers[1]["prompt"] == "<|user|>Two?<|assistant|>", "asked as in training, without the answer"
    assert answers[1]["place"].endswith("rows.jsonl row 2")
    assert [(step.done, step.total) for step in seen] == [(1, 3), (3, 3)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (" Yes\n", "yes", True),
        ("a \t b", "A B", True),
        ("\uff14\uff12", "42", True),
        ("stra\u00dfe", "STRASSE", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("yes.", "yes", False),
        ("4", "4.0", False),
    ],
)
def test_what_counts_as_the_same_text(one, other, same):
    assert (normalise(one) == normalise(other)) is same


@pytest.mark.parametrize(("value", "right"), [(4, True), ("4", True), (5, False), (4.0, False), (True, False)])
def test_numbers_and_switches_are_compared_as_they_are_written(tokenizer, tmp_path, value, right):
    path = written(tmp_path, [{"prompt": "a", "right": value}])
    result = ask("exact:right", chain_model(tokenizer, says(tokenizer, "4")), tokenizer, path)
    assert result.value == right


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q"}, "row 2: exact:right finds no column 'right'"),
        ({"question": "q", "rihgt": "x"}, r"did you mean rihgt\?"),
        ({"question": "q", "right": None}, "row 2: exact:right finds None"),
        ({"question": "q", "right": " "}, "row 2: exact:right finds ' '"),
        ({"question": "q", "right": ["a"]}, r"row 2: exact:right finds \['a'\]"),
        ({"question": "", "right": "a"}, "row 2: .*empty question"),
        ({"frage": "q", "right": "a"}, "row 2: .*no known shape"),
    ],
)
def test_a_row_that_cannot_be_marked_is_named_before_anything_is_asked(tokenizer, tmp_path, row, words):
    model = chain_model(tokenizer, {})
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(DataError, match=words):
        ask("exact:right", model, tokenizer, written(tmp_path, [ROWS[0], row]))


# ----------------------------------------------------------------------------------------------------------- function

FILE = """
import math
from beside import FACTOR

def points(answer: str, row: dict) -> float:
    assert answer == "Blue Sky"
    return row["points"] * FACTOR

def is_blue(answer, row):
    row["question"] = "changed"
    return "Blue" in answer and "blue" in row["right"].lower()

def fails(answer, row):
    return row["no such column"]

def fails_late(answer, row):
    return 1 if row["points"] == 1 else 1 / 0

def nothing(answer, row):
    pass

def words(answer, row):
    return "yes"

def too_much(answer, row):
    return 1.5

def nan(answer, row):
    return math.nan
"""


@pytest.fixture
def marks(tmp_path):
    (tmp_path / "beside.py").write_text("FACTOR = 1\n")
    path = tmp_path / "my_marks.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def blue(tokenizer):
    return chain_model(tokenizer, says(tokenizer, "Blue Sky"))


def test_marks_between_0_and_1_are_averaged_with_a_normal_interval(tokenizer, blue, rows_file, marks, tmp_path):
    path = tmp_path / "answers.jsonl"
    result = ask(f"{marks}:points", blue, tokenizer, rows_file, answers_path=path)
    assert (result.metric, result.value, result.rows) == ("mean_mark", pytest.approx(1.25 / 3), 3)
    assert result.details["interval"].startswith("normal")
    assert 0 == result.low < result.value < result.high <= 1
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(answer["score"], answer["correct"]) for answer in answers] == [(1, True), (0.25, False), (0, False)]


def test_marks_of_true_and_false_are_a_share_and_the_row_is_not_changed(tokenizer, blue, rows_file, marks):
    result = ask(f"{marks}:is_blue", blue, tokenizer, rows_file)
    assert result.value == 2 / 3 and (result.low, result.high) == wilson(2, 3, Z_95)
    assert result.details["interval"].startswith("Wilson")


def test_the_interval_of_marks():
    assert mean_of_marks([1, 0, 0, 1])[0] == {"value": 0.5, "low": wilson(2, 4, Z_95)[0], "high": wilson(2, 4, Z_95)[1]}
    marks = [0.2, 0.4, 0.9] * 30
    value, _ = mean_of_marks(marks)
    spread = (sum((mark - 0.5) ** 2 for mark in marks) / (len(marks) - 1) / len(marks)) ** 0.5
    assert value["value"] == pytest.approx(0.5)
    assert (value["low"], value["high"]) == pytest.approx((0.5 - Z_95 * spread, 0.5 + Z_95 * spread))
    for alike in ([0.5], [0.5, 0.5, 0.5]):
        value, words = mean_of_marks(alike)
        assert (value["low"], value["high"]) == (0, 1) and "no spread" in words


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("fails", r"row 1: fails in .*my_marks.py line 14 raised KeyError: 'no such column' on the answer 'Blue Sky'"),
        ("fails_late", r"row 2: fails_late in .*my_marks.py line 17 raised ZeroDivisionError"),
        ("nothing", r"row 1: nothing in .* returned None(.|\n)*may lack a return"),
        ("words", "row 1: words in .* returned 'yes'"),
        ("too_much", r"row 1: too_much in .* returned 1\.5"),
        ("nan", "row 1: nan in .* returned nan"),
    ],
)
def test_a_function_that_does_not_mark_is_an_error_that_names_the_row(
    tokenizer, blue, rows_file, marks, function, words
):
    with pytest.raises(DataError, match=words):
        ask(f"{marks}:{function}", blue, tokenizer, rows_file)


def test_a_broken_function_shows_after_one_row(tokenizer, blue, rows_file, marks):
    passes = []
    blue.register_forward_hook(lambda module, args, output: passes.append(output.logits.shape[0]))
    with pytest.raises(DataError):
        ask(f"{marks}:fails", blue, tokenizer, rows_file)
    assert set(passes) == {1}


@pytest.mark.parametrize(
    ("content", "task", "words"),
    [
        (FILE, "point", r"has no function 'point' \(did you mean points\?\)(.|\n)*name one of its functions: points"),
        ("mark = 3", "mark", "has no function 'mark'(.|\n)*there is none"),
        ("def mark(:", "mark", r"my_marks.py line 1 does not run: SyntaxError"),
        ("import nothing_of_the_kind", "mark", r"line 1 does not run: ModuleNotFoundError"),
        ("\nexit()", "mark", r"line 2 does not run: SystemExit"),
    ],
)
def test_a_file_that_is_no_task_is_refused_before_a_model_is_loaded(marks, content, task, words):
    marks.write_text(content)
    with pytest.raises(InputError, match=words):
        check_task(f"{marks}:{task}", DataRecipe())


def test_names_that_are_refused_and_what_files_are_called():
    for task, words in [
        ("exact:", "without a column"),
        ("nothing.py:mark", "does not exist"),
        ("marks.py", "the task"),
    ]:
        with pytest.raises(InputError, match=words):
            check_task(task, DataRecipe())
    check_task("exact:answer", DataRecipe())
    assert [is_own(task) for task in ("exact:a", "a/b.py:c", "imdb", "lm_eval:x", "b.py:")] == [True, True] + 3 * [
        False
    ]
    labels = {task: file_label(task) for task in ("imdb", "exact:my answer", "../a/b.py:c", "lm_eval:a/b.yaml")}
    assert list(labels.values()) == ["imdb", "exact-my-answer", "b.py-c", "lm_eval-b.yaml"]


# ------------------------------------------------------------------------------------------------------ where rows are


def test_where_the_rows_of_a_task_are(tmp_path):
    trained_on = DataRecipe(name="imdb", path="/data/imdb", max_length=99, columns={"text": "body"})

    def place(task, path=None):
        data = task_data(trained_on, task, path)
        assert data.max_length == 99
        return data.name, data.path, data.columns

    assert place("exact:label") == ("imdb", "/data/imdb", {"text": "body"})
    assert place("exact:label", str(tmp_path)) == ("imdb", str(tmp_path), {"text": "body"})
    assert place("m.py:f", "org/rows") == ("org/rows", None, {"text": "body"})
    assert place("general")[1] is None and place("general", "own.txt")[1] == "own.txt"
    assert place("lm_eval:arc_easy")[1] is None
    assert place("gsm8k_5shot") == ("gsm8k", None, {})
    assert place("imdb") == ("imdb", "/data/imdb", {"text": "body"})


def test_the_command_line_scores_own_tasks(monkeypatch, capsys, tmp_path, marks):
    run = runner(monkeypatch, capsys)
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, ROWS)
    result = run("eval", "pocket", "--task", "exact:right", "--data", path, "--json", "max_new_tokens=4").ok().json
    assert result["task"] == "exact:right" and result["rows"] == 3
    assert (tmp_path / "evals" / "pocket-exact-right.json").is_file()
    text = run("eval", "pocket", "--task", "my_marks.py:is_blue", "--data", path, "max_new_tokens=4").ok().out
    assert "mean_mark 0.0000" in text and "marked_by: is_blue in my_marks.py" in text
    run("eval", "pocket", "--task", "my_marks.py:is_bleu", "--data", path).refused("did you mean is_blue?")
    run("eval", "pocket", "--task", "exact:wrong", "--data", path).refused("no column 'wrong'")
