"""From rows to prompts the model has room for; predict, chat and evaluate share it."""

from __future__ import annotations

from typing import Any

from thriftune.data import to_conversation
from thriftune.errors import InputError
from thriftune.infer.batching import model_positions
from thriftune.recipe import DataRecipe

Prompt = str | list[dict[str, str]]

# Stands where the answer will be while a row is brought into its shape; it never reaches the model.
_ANSWER_TO_COME = "?"
_ANSWER_KEYS = {"prompt": "completion", "instruction": "output", "question": "answer"}
_FEWEST_PROMPT_TOKENS = 8


def prompt_of(row: dict[str, Any], data: DataRecipe) -> Prompt:
    """What a row asks: everything before its last answer, which it may or may not have.

    A row that ends with the user's message is asked whole. Raises DataError as `to_conversation` does.
    """
    completed, data = _with_some_answer(row, data)
    prompt: Prompt = to_conversation(completed, data).prompt
    return prompt


def _with_some_answer(row: dict[str, Any], data: DataRecipe) -> tuple[dict[str, Any], DataRecipe]:
    """The row with an answer where its shape wants one, and a recipe that maps that column too."""
    names = data.columns or {ours: ours for ours in row}
    for ours, role in (("messages", ("role", "content")), ("conversations", ("from", "value"))):
        turns = row.get(names.get(ours, ""))
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            speaker, content = role if role[0] in turns[-1] else ("role", "content")
            if turns[-1].get(speaker) not in ("assistant", "gpt", "chatgpt", "model"):
                turns = [*turns, {speaker: "assistant", content: _ANSWER_TO_COME}]
            return {**row, names[ours]: turns}, data
    for ours, answer in _ANSWER_KEYS.items():
        if names.get(ours) in row:
            theirs = names.get(answer, answer)
            some: Any = _ANSWER_TO_COME
            if isinstance(row[names[ours]], list):
                some = [{"role": "assistant", "content": _ANSWER_TO_COME}]
            if data.columns:
                data = data.model_copy(update={"columns": {**data.columns, answer: theirs}})
            return {**row, theirs: some}, data
    return ({**row, "label": 0} if "text" in row and not data.columns else row), data


def room_for_answer(data: DataRecipe, model: Any, max_new_tokens: int) -> DataRecipe:
    """The recipe whose `max_length` is a prompt's limit: the one given, or what the model's positions leave.

    The answer does not count against `data.max_length`, so prompts are cut as in training and not more, unless the
    model's positions ask for it. Raises InputError when the answer alone takes the positions up.
    """
    positions = model_positions(model)
    if positions is None:
        return data
    room = positions - max_new_tokens
    if room < _FEWEST_PROMPT_TOKENS:
        raise InputError(
            given=f"answers of up to {max_new_tokens:,} tokens (generation.max_new_tokens) by a model with "
            f"{positions:,} positions",
            allowed=f"at most {max(positions - _FEWEST_PROMPT_TOKENS, 0):,}, so that a prompt fits before the answer",
            do="lower generation.max_new_tokens",
        )
    return data.model_copy(update={"max_length": min(data.max_length, room)})


def pad_token_id_of(tokenizer: Any) -> int:
    """The pad token, else the end token, else 0: padding is masked, so any id of the vocabulary serves."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0
