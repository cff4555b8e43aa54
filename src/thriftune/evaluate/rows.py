"""Scoring the tasks of `TASKS`: every row asked as in training, its answer parsed and compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thriftune.data import Rows, encode_answer, encode_prompts, load_rows, stop_token_ids
from thriftune.evaluate.score import ANSWER_SEED, Asked, Score, draw_subset, share
from thriftune.evaluate.tasks import Task
from thriftune.infer.classify import classify, reads_prompts_once
from thriftune.infer.generate import decode, generate, until_stop
from thriftune.infer.prompts import pad_token_id_of, room_for_answer


def score_rows(task: Task, asked: Asked) -> Score:
    """The share of right answers. With choices the likeliest one is the prediction, and what the model writes by itself
    is scored in the details."""
    rows = load_rows(asked.data, asked.split or task.split)
    indices = draw_subset(len(rows), asked.limit)
    settings = asked.settings.model_copy(
        update={"max_new_tokens": min(asked.settings.max_new_tokens, task.max_new_tokens)}
    )
    stops = stop_token_ids(asked.tokenizer, getattr(asked.model, "generation_config", None), asked.data)
    room = room_for_answer(asked.data, asked.model, settings.max_new_tokens)
    prompts = encode_prompts([task.prompt(rows.rows[index], room) for index in indices], asked.tokenizer, room)
    targets = [task.target(rows.rows[index], room) for index in indices]
    pad = pad_token_id_of(asked.tokenizer)
    chances = None
    if task.choices:
        # A choice's ids are those of training without the end token: after 'positive' it is as good as certain.
        choices = [until_stop(encode_answer(choice, asked.tokenizer, asked.data), stops) for choice in task.choices]
        scores_RC, generated = classify(
            asked.model, prompts, choices, settings, stops, pad, seed=ANSWER_SEED, on_progress=asked.progress
        )
        chances = [dict(zip(task.choices, scores_C, strict=True)) for scores_C in scores_RC.tolist()]
    else:
        generated = generate(asked.model, prompts, settings, stops, pad, seed=ANSWER_SEED, on_progress=asked.progress)
    answers = _marked(task, asked.tokenizer, rows, indices, prompts, targets, generated)
    details = {
        "data": rows.description,
        "rows_of_split": len(rows),
        "max_length": room.max_length,
        "settings": settings.model_dump(),
        "unparsed": sum(answer["prediction"] is None for answer in answers),
        "reached_max_new_tokens": sum(len(ids) >= settings.max_new_tokens for ids in generated),
    }
    if chances is not None:
        details["generated_accuracy"] = share([answer["correct"] for answer in answers])
        details["prompts_read_once"] = reads_prompts_once(asked.model)
        answers = [_with_likeliest(answer, chance) for answer, chance in zip(answers, chances, strict=True)]
    return Score(task.metric, **share([answer["correct"] for answer in answers]), answers=answers, details=details)


def _marked(
    task: Task,
    tokenizer: Any,
    rows: Rows,
    indices: Sequence[int],
    prompts: list[list[int]],
    targets: list[str],
    generated: list[list[int]],
) -> list[dict[str, Any]]:
    answers = []
    for index, prompt, target, ids in zip(indices, prompts, targets, generated, strict=True):
        text = decode(tokenizer, ids)
        prediction = task.parse(text)
        answers.append(
            {
                **asked_row(rows, index, tokenizer, prompt),
                "answer": text,
                "prediction": prediction,
                "target": target,
                "correct": prediction == target,
            }
        )
    return answers


def asked_row(rows: Rows, index: int, tokenizer: Any, prompt: list[int]) -> dict[str, Any]:
    """A row's number from 0 in the split, its place in words, and what was asked."""
    return {
        "row": index,
        "place": rows.places[index],
        "prompt": tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False),
    }


def _with_likeliest(answer: dict[str, Any], log_likelihoods: dict[str, float]) -> dict[str, Any]:
    """The likeliest choice becomes the prediction; what was generated moves to keys of its own."""
    prediction = max(log_likelihoods, key=lambda choice: log_likelihoods[choice])
    return {
        **answer,
        "prediction": prediction,
        "correct": prediction == answer["target"],
        "log_likelihoods": log_likelihoods,
        "generated_prediction": answer["prediction"],
        "generated_correct": answer["correct"],
    }
