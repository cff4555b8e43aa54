"""Classification both ways in one go: the likelihood of each choice, and what the model writes by itself.

The prompt, which is nearly all of the tokens, goes through the model once; the choices and the answer go on from what
the model kept of it (its key-value cache). The values are those of `score_choices` and `generate`, which read the
prompt anew each time.

Shape suffixes: B rows of a batch, C choices, K positions, N new tokens, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from thriftune.infer.batching import (
    Forward,
    Progress,
    ProgressCallback,
    Reading,
    answering,
    check_lengths,
    run_longest_first,
)
from thriftune.infer.choices import check_choices, check_scores, score_choices
from thriftune.infer.generate import draw_uniforms, generate, pick, until_stop
from thriftune.recipe import GenerationRecipe


def reads_prompts_once(model: Any) -> bool:
    """Whether the model can go on from a prompt it has read; models whose state is no key-value cache cannot."""
    return Forward(model, 0).can_go_on


def classify(
    model: Any,
    prompts: list[list[int]],
    choices: list[list[int]],
    settings: GenerationRecipe,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    *,
    seed: int,
    on_progress: ProgressCallback,
) -> tuple[torch.Tensor, list[list[int]]]:
    """Score the choices after every prompt and generate an answer to it.

    A model that cannot go on from a prompt (see `reads_prompts_once`) reads it twice or more; the results are the same.

    Args and Raises: as in `choices.score_choices` and `generate.generate`.

    Returns:
        (float32 log-likelihoods [rows, choices] on the CPU, token ids of each answer), both in the prompts' order.
    """
    check_choices(choices)
    most_tokens = max(settings.max_new_tokens, *(len(choice) for choice in choices))
    check_lengths(model, [len(prompt) for prompt in prompts], extra_tokens=most_tokens, extra_name="the answer")
    if not prompts:
        return torch.zeros(0, len(choices)), []
    forward = Forward(model, pad_token_id)
    if not forward.can_go_on:
        return _one_after_the_other(
            model, prompts, choices, settings, stop_token_ids, pad_token_id, seed=seed, on_progress=on_progress
        )

    def work(batch: list[int]) -> list[tuple[torch.Tensor, list[int]]]:
        logits_BV, reading = forward.read([prompts[row] for row in batch])
        scores_BC = _choice_scores(forward, logits_BV, reading, choices)
        answers = _answers(forward, logits_BV, reading, settings, stop_token_ids, seed, batch)
        return list(zip(scores_BC.cpu(), answers, strict=True))

    with answering(model):
        lengths = [len(prompt) for prompt in prompts]
        found = run_longest_first(work, lengths, batch_size=settings.batch_size, on_progress=on_progress)
    scores_RC = torch.stack([scores_C for scores_C, _ in found])
    check_scores(scores_RC)
    return scores_RC, [answer for _, answer in found]


def _choice_scores(
    forward: Forward, logits_BV: torch.Tensor, reading: Reading, choices: list[list[int]]
) -> torch.Tensor:
    """Log-likelihoods [B, C] in float32. `reading` stays where it is."""
    log_chances_BV = logits_BV.float().log_softmax(-1)
    columns = []
    for choice in choices:
        total_B = log_chances_BV[:, choice[0]]
        if len(choice) > 1:
            ids_BK = torch.tensor([choice[:-1]] * len(logits_BV), device=logits_BV.device)
            later_BKV = forward.read_on(reading.copy(), ids_BK).float().log_softmax(-1)
            targets_K = torch.tensor(choice[1:], device=logits_BV.device)
            places_K = torch.arange(len(targets_K), device=logits_BV.device)
            total_B = total_B + later_BKV[:, places_K, targets_K].sum(-1)
        columns.append(total_B)
    return torch.stack(columns, dim=1)


def _answers(
    forward: Forward,
    logits_BV: torch.Tensor,
    reading: Reading,
    settings: GenerationRecipe,
    stop_token_ids: Sequence[int],
    seed: int,
    rows: list[int],
) -> list[list[int]]:
    """Token by token until every row has stopped; `reading` moves on."""
    uniforms_BN = draw_uniforms(settings, seed, rows).to(logits_BV.device) if settings.temperature > 0 else None
    stops = torch.tensor(list(stop_token_ids), device=logits_BV.device)
    stopped_B = torch.zeros(len(rows), dtype=torch.bool, device=logits_BV.device)
    columns: list[torch.Tensor] = []
    while True:
        if uniforms_BN is None:
            ids_B = logits_BV.argmax(-1)
        else:
            uniform_B1 = uniforms_BN[:, len(columns) : len(columns) + 1]
            ids_B = pick(logits_BV.float(), uniform_B1, settings.temperature, settings.top_p).squeeze(1)
        columns.append(ids_B)
        stopped_B |= torch.isin(ids_B, stops)
        if len(columns) == settings.max_new_tokens or bool(stopped_B.all()):
            return [until_stop(ids, stop_token_ids) for ids in torch.stack(columns, dim=1).tolist()]
        logits_BV = forward.read_on(reading, ids_B.unsqueeze(1))[:, -1]


def _one_after_the_other(
    model: Any,
    prompts: list[list[int]],
    choices: list[list[int]],
    settings: GenerationRecipe,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    *,
    seed: int,
    on_progress: ProgressCallback,
) -> tuple[torch.Tensor, list[list[int]]]:
    """Rows are counted when they are scored and when they are answered, so progress runs to twice the rows."""

    def second_half(progress: Progress) -> None:
        on_progress(Progress(progress.total + progress.done, 2 * progress.total, progress.event))

    def first_half(progress: Progress) -> None:
        on_progress(Progress(progress.done, 2 * progress.total, progress.event))

    scores_RC = score_choices(model, prompts, choices, settings.batch_size, pad_token_id, first_half)
    answers = generate(model, prompts, settings, stop_token_ids, pad_token_id, seed=seed, on_progress=second_half)
    return scores_RC, answers
