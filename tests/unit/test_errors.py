"""The error tree: exit codes, three parts, and that an error survives the way between processes."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from multiprocessing import get_context

import pytest

from thriftune import errors
from thriftune.errors import (
    CheckpointError,
    DataError,
    DiskFullError,
    DoesNotFitError,
    InputError,
    ModelError,
    NonFiniteLossError,
    OutputError,
    RecipeError,
    StoppedBySignal,
    ThriftuneError,
    first_line,
)

PARTS = {"given": "rows.jsonl row 3 has no answer", "allowed": "rows with an answer", "do": "add one"}
EXAMPLES: list[tuple[ThriftuneError, int]] = [
    (ThriftuneError(**PARTS), 1),
    (InputError(**PARTS), 2),
    (RecipeError(["seed: too large", "r: too small"], "recipe.yaml"), 2),
    (DataError(**PARTS), 2),
    (ModelError(**PARTS), 2),
    (CheckpointError(**PARTS), 2),
    (OutputError(**PARTS), 2),
    (DoesNotFitError(**PARTS), 3),
    (DiskFullError(**PARTS), 3),
    (NonFiniteLossError(**PARTS), 4),
    (StoppedBySignal(signal_number=2, **PARTS), 130),
    (StoppedBySignal(signal_number=15, **PARTS), 143),
]
every = pytest.mark.parametrize(("error", "code"), EXAMPLES, ids=lambda value: type(value).__name__)


def test_every_error_has_an_example() -> None:
    tree = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)}
    assert {type(error) for error, _ in EXAMPLES} == tree


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"^[ |]*(?:\+-- )?(\w+(?:Error|Signal))\s", errors.__doc__ or "", re.MULTILINE)
    assert {type(error).__name__ for error, _ in EXAMPLES} == set(drawn)


@every
def test_exit_codes(error: ThriftuneError, code: int) -> None:
    assert error.exit_code == code
    assert str(code) in (errors.__doc__ or "")


@every
def test_three_parts_one_a_line(error: ThriftuneError, code: int) -> None:
    text = str(error)
    assert text == f"{error.given}\n  allowed: {error.allowed}\n  do: {error.do}"
    assert all((error.given, error.allowed, error.do))


@every
def test_errors_pickle_whole(error: ThriftuneError, code: int) -> None:
    error.add_note("seen on worker 3")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert (str(twin), twin.args, twin.__dict__) == (str(error), error.args, error.__dict__)
        assert twin.exit_code == code


def _fail(_: int) -> None:
    raise RecipeError(["seed: too large"], "recipe.yaml")


def test_an_error_comes_back_from_another_process() -> None:
    with get_context("fork").Pool(1) as pool, pytest.raises(RecipeError, match="seed: too large") as caught:
        pool.map(_fail, [0])
    assert caught.value.problems == ["seed: too large"]


def test_recipe_errors_count() -> None:
    assert "has 1 problem:\n    - a" in str(RecipeError(["a"], "x"))
    assert "x has 2 problems:\n    - a\n    - b" in str(RecipeError(("a", "b"), "x"))
    assert RecipeError(("a", "b"), "x").problems == ["a", "b"]


def test_the_parts_are_named() -> None:
    with pytest.raises(TypeError):
        InputError("given", "allowed", "do")  # type: ignore[call-arg, misc]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("  one\ntwo"), "one"),
        (KeyError("a"), "'a'"),
        (MemoryError(), "MemoryError"),
        (OSError("\n"), "OSError"),
    ],
    ids=repr,
)
def test_the_first_line_of_an_error_is_never_empty(error: Exception, line: str) -> None:
    assert first_line(error) == line and first_line(error, 2) == line[:2]
