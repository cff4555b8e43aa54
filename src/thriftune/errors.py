"""Every error a user can meet, in one tree. Each says three things: what was given, what is allowed, what to do.

    ThriftuneError                     exit code
    +-- InputError                     2   the input is wrong
    |   +-- RecipeError                    a recipe's keys or values, all problems at once
    |   +-- DataError                      a data file or a row in it
    |   +-- ModelError                     a model, tokenizer or adapter that cannot be loaded as asked
    |   +-- CheckpointError                a checkpoint that is incomplete, changed or of another run
    |   +-- OutputError                    a place that cannot be written to
    +-- DoesNotFitError                3   not enough memory for what was asked
    |   +-- DiskFullError                  not enough room on the disk
    +-- NonFiniteLossError             4   the loss or a gradient became NaN or infinite
    +-- StoppedBySignal            130/143 interrupted by SIGINT or SIGTERM, after saving

Anything else that escapes is a bug of ours and is never swallowed. A caller who wants all of them catches
`ThriftuneError`.
"""

from __future__ import annotations

from collections.abc import Sequence


def first_line(error: BaseException, most: int = 300) -> str:
    """What a library's error says first, `most` characters of it; the name of its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


class ThriftuneError(Exception):
    """Base of the tree. `given`, `allowed` and `do` are whole sentences or phrases, printed one a line."""

    exit_code = 1

    def __init__(self, *, given: str, allowed: str, do: str) -> None:
        self.given = given
        self.allowed = allowed
        self.do = do
        super().__init__(f"{given}\n  allowed: {allowed}\n  do: {do}")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.__dict__.copy()))


def _rebuild(kind: type[ThriftuneError], state: dict[str, object]) -> ThriftuneError:
    """Errors cross process borders (data workers, federated sites), so they pickle in spite of keyword arguments."""
    error = kind.__new__(kind)
    error.__dict__.update(state)
    Exception.__init__(error, f"{error.given}\n  allowed: {error.allowed}\n  do: {error.do}")
    return error


class InputError(ThriftuneError):
    exit_code = 2


class RecipeError(InputError):
    """All problems of a recipe in one error. `problems` holds one text each."""

    def __init__(self, problems: Sequence[str], source: str) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        listed = "".join(f"\n    - {problem}" for problem in self.problems)
        super().__init__(
            given=f"{source} has {count} problem{'s' if count != 1 else ''}:{listed}",
            allowed="the keys and values that docs/recipe.md lists",
            do="correct each line above and run again",
        )


class DataError(InputError):
    """A data file or row. Messages name the file and, where there is one, the row (counted from 1)."""


class ModelError(InputError):
    pass


class CheckpointError(InputError):
    pass


class OutputError(InputError):
    pass


class DoesNotFitError(ThriftuneError):
    exit_code = 3


class DiskFullError(DoesNotFitError):
    pass


class NonFiniteLossError(ThriftuneError):
    exit_code = 4


class StoppedBySignal(ThriftuneError):  # noqa: N818  (an event, not a fault: the run was saved first)
    """Raised after the interrupted step was finished and saved. `signal_number` is 2 (SIGINT) or 15 (SIGTERM)."""

    def __init__(self, *, signal_number: int, given: str, allowed: str, do: str) -> None:
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        super().__init__(given=given, allowed=allowed, do=do)
