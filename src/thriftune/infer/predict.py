"""Answers to a file of rows, in its order, a window at a time, so that a large file neither waits nor fills memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from thriftune.data import Rows, encode_prompt, stop_token_ids
from thriftune.errors import DataError
from thriftune.infer.batching import Progress, ProgressCallback
from thriftune.infer.generate import decode, generate_rows
from thriftune.infer.prompts import pad_token_id_of, prompt_of, room_for_answer
from thriftune.recipe import DataRecipe, GenerationRecipe

# Rows are sorted by length inside a window; beyond some batches' worth more rows no longer save padding.
WINDOW_ROWS = 512


def predict_rows(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    data: DataRecipe,
    settings: GenerationRecipe,
    *,
    seed: int,
    on_progress: ProgressCallback,
) -> Iterator[dict[str, Any]]:
    """Yield every row with the model's answer under `prediction`, in the rows' order.

    Rows are of any shape that training takes, and their answers may be missing; where they are there the model does not
    see them. Prompts too long for `data.max_length` or the model's positions are cut as in training. An answer does not
    depend on the window: with a seed, rows are numbered through.

    Raises:
        DataError: a row that cannot be asked, with its place.
        InputError: the model has too few positions for `settings.max_new_tokens`.
        DoesNotFitError: a single row does not fit into memory.
    """
    room = room_for_answer(data, model, settings.max_new_tokens)
    stops = stop_token_ids(tokenizer, getattr(model, "generation_config", None), data)
    total = len(rows)
    for start in range(0, total, WINDOW_ROWS):
        window = range(start, min(start + WINDOW_ROWS, total))
        prompts = [encode_row(rows, index, tokenizer, room) for index in window]

        def report(progress: Progress, start: int = start) -> None:
            on_progress(Progress(start + progress.done, total, progress.event))

        answers = generate_rows(
            model,
            prompts,
            settings,
            stops,
            pad_token_id_of(tokenizer),
            seed=seed,
            first_row=start,
            on_progress=report,
        )
        for index, answer in zip(window, answers, strict=True):
            yield {**rows.rows[index], "prediction": decode(tokenizer, answer)}


def encode_row(rows: Rows, index: int, tokenizer: Any, data: DataRecipe) -> list[int]:
    """The ids of what row `index` asks, its answer left out if it has one. Raises DataError with the row's place."""
    try:
        return encode_prompt(prompt_of(rows.rows[index], data), tokenizer, data)
    except DataError as problem:
        raise DataError(
            given=f"{rows.places[index]}: {problem.given}", allowed=problem.allowed, do=problem.do
        ) from problem
