"""GSM8K as lm-evaluation-harness asks and marks it (its task `gsm8k`, version 3): five solved problems of the training
split before each question, as plain text without a chat template, and two ways to read the answer.

A model gets the same number here as there. For a model tuned by thriftune the task `gsm8k` is the one that asks as
training did; this one is for numbers beside other people's.
"""

from __future__ import annotations

import random
import re
from typing import Any

from thriftune.data import Rows, load_rows, stop_token_ids
from thriftune.errors import DataError
from thriftune.evaluate.rows import asked_row
from thriftune.evaluate.score import ANSWER_SEED, Asked, Score, draw_subset, share
from thriftune.infer.batching import model_positions
from thriftune.infer.generate import generate
from thriftune.infer.prompts import pad_token_id_of, room_for_answer

GSM8K_FEW_SHOT = "gsm8k_5shot"

SHOTS = 5
SHOTS_SEED = 1234
MAX_NEW_TOKENS = 256
# What the harness takes for a model that sets no limit of positions.
POSITIONS_WITHOUT_LIMIT = 2048
STOP_TEXTS = ("Question:", "</s>", "<|im_end|>")

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_LEFT_OUT = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))


def strict_match(answer: str) -> str | None:
    """The number after the first '#### ', as it is written there."""
    found = _STRICT.search(answer)
    return found[1].strip() if found else None


def flexible_extract(answer: str) -> str | None:
    """The last thing in the answer that looks like a number, signs and points with it."""
    found = _FLEXIBLE.findall(answer)
    return next(part for part in found[-1] if part).strip() if found else None


def bare(text: str) -> str:
    """What two answers are compared by: no commas, no dollar signs, nothing up to '#### ', no point at the end."""
    for pattern in _LEFT_OUT:
        text = pattern.sub("", text)
    return text.lower()


def is_right(prediction: str | None, answer: str) -> bool:
    return prediction is not None and bare(prediction) == bare(answer)


def score_few_shot(asked: Asked) -> Score:
    """The share of rows that are right by `strict_match`; the details have the one by `flexible_extract`."""
    data, tokenizer = asked.data, asked.tokenizer
    rows = load_rows(data, asked.split or "test")
    shown = load_rows(data, "train")
    indices = draw_subset(len(rows), asked.limit)
    settings = asked.settings.model_copy(update={"max_new_tokens": min(asked.settings.max_new_tokens, MAX_NEW_TOKENS)})
    positions = model_positions(asked.model) or POSITIONS_WITHOUT_LIMIT
    plain = data.model_copy(update={"max_length": positions, "chat_template": "none"})
    room = min(room_for_answer(plain, asked.model, settings.max_new_tokens).max_length, positions - MAX_NEW_TOKENS)
    texts = few_shot_texts(rows, shown)
    whole = [list(tokenizer(texts[index], verbose=False)["input_ids"]) for index in indices]
    prompts = [ids[-room:] for ids in whole]
    stops = stop_token_ids(tokenizer, getattr(asked.model, "generation_config", None), plain)
    generated = generate(
        asked.model,
        prompts,
        settings,
        stops,
        pad_token_id_of(tokenizer),
        seed=ANSWER_SEED,
        on_progress=asked.progress,
    )
    answers = [
        {**asked_row(rows, index, tokenizer, prompt), **_marked(_text(tokenizer, ids), _field(rows, index, "answer"))}
        for index, prompt, ids in zip(indices, prompts, generated, strict=True)
    ]
    details = {
        "data": rows.description,
        "form": f"lm-evaluation-harness's gsm8k: {SHOTS} shots, plain text, exact match",
        "rows_of_split": len(rows),
        "max_length": room,
        "prompts_cut": sum(len(ids) > room for ids in whole),
        "settings": settings.model_dump(),
        "flexible_extract": share([answer["flexible_correct"] for answer in answers]),
        "unparsed": sum(answer["prediction"] is None for answer in answers),
    }
    return Score("strict_match", **share([answer["correct"] for answer in answers]), answers=answers, details=details)


def few_shot_texts(rows: Rows, shown: Rows) -> list[str]:
    """Every row's prompt. The shots are drawn anew for each row, in the rows' order, from one stream: a row's shots are
    the same whether all rows are asked or some."""
    if len(shown) < SHOTS:
        raise DataError(
            given=f"{shown.description}, of which {SHOTS} are shown before each question",
            allowed=f"a training split of at least {SHOTS} rows",
            do="give the folder that holds both splits, train and test",
        )
    solved = [f"{_question(shown, index)} {_field(shown, index, 'answer')}\n\n" for index in range(len(shown))]
    draw = random.Random(SHOTS_SEED)
    return ["".join(draw.sample(solved, SHOTS)) + _question(rows, index) for index in range(len(rows))]


def _question(rows: Rows, index: int) -> str:
    return f"Question: {_field(rows, index, 'question')}\nAnswer:"


def _field(rows: Rows, index: int, key: str) -> str:
    value = rows.rows[index].get(key)
    if not isinstance(value, str):
        raise DataError(
            given=f"{rows.places[index]} has no text under {key!r}",
            allowed="rows with the texts question and answer",
            do="give data.name=gsm8k, or rows of its kind",
        )
    return value


def _text(tokenizer: Any, ids: list[int]) -> str:
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    for stop in STOP_TEXTS:
        text = text.split(stop)[0]
    return text


def _marked(answer: str, target: str) -> dict[str, Any]:
    strict, flexible = strict_match(answer), flexible_extract(answer)
    return {
        "answer": answer,
        "prediction": strict,
        "target": bare(target),
        "correct": is_right(strict, target),
        "flexible_prediction": flexible,
        "flexible_correct": is_right(flexible, target),
    }
