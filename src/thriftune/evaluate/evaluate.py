"""`evaluate`: a task, a model -> an EvalResult, and every answer in a file."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thriftune.data import Rows, encode_answer, encode_prompt, load_rows, stop_token_ids
from thriftune.errors import InputError
from thriftune.evaluate.intervals import Z_95, wilson
from thriftune.evaluate.perplexity import cut_windows, measure_perplexity, read_text, window_length
from thriftune.evaluate.tasks import TASKS, Task
from thriftune.infer.batching import Progress, ProgressCallback
from thriftune.infer.choices import score_choices
from thriftune.infer.generate import decode, generate
from thriftune.infer.prompts import pad_token_id_of, room_for_answer
from thriftune.recipe import DataRecipe, GenerationRecipe, did_you_mean
from thriftune.records import EvalResult, write_text_atomically

PERPLEXITY = "perplexity"

# Which rows `limit` draws, and what sampled answers are drawn with: the same for every model, or scores would differ
# for reasons that are not the model's.
SUBSET_SEED = 0
ANSWER_SEED = 0


@dataclass
class _Asked:
    """What an evaluation is done with. `events` collects what happened on the way (memory that ran out)."""

    model: Any
    tokenizer: Any
    data: DataRecipe
    settings: GenerationRecipe
    on_progress: ProgressCallback
    events: list[str] = field(default_factory=list)

    def progress(self, phase: int, phases: int) -> ProgressCallback:
        """A task that asks every row twice counts its rows twice."""

        def report(progress: Progress) -> None:
            if progress.event:
                self.events.append(progress.event)
            done = phase * progress.total + progress.done
            self.on_progress(Progress(done, phases * progress.total, progress.event))

        return report


@dataclass(frozen=True)
class _Score:
    """What a task found, before it becomes a record."""

    metric: str
    value: float
    low: float
    high: float
    answers: list[dict[str, Any]]
    details: dict[str, Any]


def evaluate(
    task: str,
    model: Any,
    tokenizer: Any,
    *,
    data: DataRecipe,
    settings: GenerationRecipe,
    limit: int | None,
    split: str | None,
    answers_path: Path | None,
    model_name: str,
    adapter_name: str | None,
    on_progress: ProgressCallback,
) -> EvalResult:
    """Ask the model every row of a task and score the answers.

    Args:
        task: a name in `TASKS`, or 'perplexity', which takes `data.path` (or `data.name`) as a text file.
        model, tokenizer: a causal language model of transformers or PEFT, and its tokenizer.
        data: where the rows are, how they are rendered, and the prompts' limit `max_length` (for perplexity: the
            window). The name of another task's data set is refused; files and hub ids are the caller's choice.
        settings: `max_new_tokens` is lowered to what the task can need.
        limit: ask only so many rows (windows), drawn with a fixed seed: the same rows for every model. None: all.
        split: None for the task's own, mostly 'test'. Perplexity has no splits.
        answers_path: where a jsonl with one object a row goes; None keeps no answers.
        model_name, adapter_name: go into the record.
        on_progress: told after every batch.

    Returns:
        the main score with its 95 % interval (Wilson's; for perplexity the normal one over windows). `details` has the
        other scores, the settings and what happened on the way.

    Raises:
        InputError: an unknown task, or data that do not belong to it.
        DataError: rows that cannot be read or marked.
        DoesNotFitError: a single row does not fit into memory.
    """
    start_s = time.perf_counter()
    if limit is not None and limit < 1:
        raise InputError(given=f"a limit of {limit} rows", allowed="1 or more, or no limit", do="correct the limit")
    asked = _Asked(model, tokenizer, data, settings, on_progress)
    if task == PERPLEXITY:
        score = _score_perplexity(asked, limit)
    else:
        score = _score_task(_task_called(task, data), asked, limit, split)
    if answers_path is not None:
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in score.answers]
        write_text_atomically(answers_path, "".join(lines))
    return EvalResult(
        task=task,
        metric=score.metric,
        value=score.value,
        low=score.low,
        high=score.high,
        rows=len(score.answers),
        model=model_name,
        adapter=adapter_name,
        answers=None if answers_path is None else str(answers_path),
        details={**score.details, "events": asked.events},
        wall_s=time.perf_counter() - start_s,
    )


def draw_subset(total: int, limit: int | None) -> list[int]:
    """Which of `total` rows are asked, in their order: all, or `limit` of them by a fixed seed."""
    if limit is None or limit >= total:
        return list(range(total))
    return sorted(random.Random(SUBSET_SEED).sample(range(total), limit))


def _task_called(name: str, data: DataRecipe) -> Task:
    known = [*TASKS, PERPLEXITY]
    if name not in TASKS:
        raise InputError(
            given=f"the task {name!r}{did_you_mean(name, known)}", allowed=", ".join(known), do="choose one of these"
        )
    task = TASKS[name]
    if data.name != task.data and data.name in {other.data for other in TASKS.values()}:
        raise InputError(
            given=f"task {name} on the data set {data.name}",
            allowed=f"data.name={task.data}, or a file or hub id with rows of its kind",
            do=f"give data.name={task.data}, or --task {data.name}",
        )
    return task


def _score_task(task: Task, asked: _Asked, limit: int | None, split: str | None) -> _Score:
    rows = load_rows(asked.data, split or task.split)
    indices = draw_subset(len(rows), limit)
    settings = asked.settings.model_copy(
        update={"max_new_tokens": min(asked.settings.max_new_tokens, task.max_new_tokens)}
    )
    stops = stop_token_ids(asked.tokenizer, getattr(asked.model, "generation_config", None), asked.data)
    room = room_for_answer(asked.data, asked.model, settings.max_new_tokens)
    prompts = [encode_prompt(task.prompt(rows.rows[index], room), asked.tokenizer, room) for index in indices]
    targets = [task.target(rows.rows[index], room) for index in indices]
    phases = 2 if task.choices else 1
    chances = _likelihoods(task.choices, asked, stops, prompts) if task.choices else None
    generated = generate(
        asked.model,
        prompts,
        settings,
        stops,
        pad_token_id_of(asked.tokenizer),
        seed=ANSWER_SEED,
        on_progress=asked.progress(phases - 1, phases),
    )
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
        details["generated_accuracy"] = _share(answers)
        answers = [_with_likeliest(answer, chance) for answer, chance in zip(answers, chances, strict=True)]
    return _Score(task.metric, **_share(answers), answers=answers, details=details)


def _marked(
    task: Task,
    tokenizer: Any,
    rows: Rows,
    indices: Sequence[int],
    prompts: list[list[int]],
    targets: list[str],
    generated: list[list[int]],
) -> list[dict[str, Any]]:
    """One object a row: its number from 0 in the split, its place in words, what was asked, answered and wanted."""
    answers = []
    for index, prompt, target, ids in zip(indices, prompts, targets, generated, strict=True):
        text = decode(tokenizer, ids)
        prediction = task.parse(text)
        answers.append(
            {
                "row": index,
                "place": rows.places[index],
                "prompt": tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False),
                "answer": text,
                "prediction": prediction,
                "target": target,
                "correct": prediction == target,
            }
        )
    return answers


def _likelihoods(
    choices: tuple[str, ...], asked: _Asked, stops: list[int], prompts: list[list[int]]
) -> list[dict[str, float]]:
    """The log-likelihood of each choice, by its name, for every prompt.

    A choice's ids are those of training without the end token: after 'positive' it is as good as certain.
    """
    scores_RC = score_choices(
        asked.model,
        prompts,
        [_until_stop(encode_answer(choice, asked.tokenizer, asked.data), stops) for choice in choices],
        asked.settings.batch_size,
        pad_token_id_of(asked.tokenizer),
        asked.progress(0, 2),
    )
    return [dict(zip(choices, scores_C, strict=True)) for scores_C in scores_RC.tolist()]


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


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    ends = [place for place, token in enumerate(ids) if token in stops]
    return ids[: ends[0]] if ends else ids


def _share(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Share of right answers with Wilson's 95 % interval."""
    right = sum(answer["correct"] for answer in answers)
    low, high = wilson(right, len(answers), Z_95)
    return {"value": right / len(answers), "low": low, "high": high}


def _score_perplexity(asked: _Asked, limit: int | None) -> _Score:
    path = Path(asked.data.path or asked.data.name).expanduser()
    length = window_length(asked.model, asked.data.max_length)
    windows = cut_windows(read_text(path), asked.tokenizer, length)
    indices = draw_subset(len(windows), limit)
    chosen = [windows[index] for index in indices]
    found = measure_perplexity(
        asked.model,
        chosen,
        batch_size=asked.settings.batch_size,
        pad_token_id=pad_token_id_of(asked.tokenizer),
        on_progress=asked.progress(0, 1),
    )
    answers = [
        {"row": index, "tokens": window.scored, "loss": loss / window.scored}
        for index, window, loss in zip(indices, chosen, found.losses, strict=True)
    ]
    details = {
        "data": str(path),
        "windows_of_text": len(windows),
        "max_length": length,
        "tokens": found.tokens,
        "loss": found.loss,
        "bits_per_byte": found.bits_per_byte,
    }
    return _Score(PERPLEXITY, found.value, found.low, found.high, answers, details)
