"""What a task is: which rows, what counts as an answer, when it is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from thriftune.data import to_conversation
from thriftune.errors import DataError
from thriftune.recipe import DataRecipe

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Task:
    """A task asks for a row what training on that row would show: the conversation without its last answer.

    Attributes:
        name: what a person types, `--task gsm8k`.
        data: the data set's name, as in `data.name`.
        split: the split that is asked.
        metric: name of the main score.
        max_new_tokens: no right answer needs more; the recipe may ask for fewer.
        choices: the possible answers, when there is a fixed set; the main score then is by likelihood.
        parse: a generated answer's text -> the prediction in its one normal form, None when there is none in it.
    """

    name: str
    data: str
    split: str
    metric: str
    max_new_tokens: int
    choices: tuple[str, ...] | None
    parse: Callable[[str], str | None]

    def prompt(self, row: dict[str, Any], data: DataRecipe) -> Prompt:
        """What stands before the answer, by the same function that makes training rows; for `encode_prompt`."""
        prompt: Prompt = to_conversation(row, data).prompt
        return prompt

    def target(self, row: dict[str, Any], data: DataRecipe) -> str:
        """The right prediction. Raises DataError when the row's own answer has none."""
        answer = to_conversation(row, data).target
        target = self.parse(answer)
        if target is None:
            raise DataError(
                given=f"a row of {data.name} whose answer is {answer[-60:]!r}",
                allowed=f"answers that task {self.name} can mark"
                + (f": {' or '.join(self.choices)}" if self.choices else ""),
                do="correct the row, or choose the task that belongs to the data",
            )
        return target

    def correct(self, prediction: str | None, row: dict[str, Any], data: DataRecipe) -> bool:
        return prediction is not None and prediction == self.target(row, data)
