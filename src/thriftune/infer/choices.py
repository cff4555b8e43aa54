"""How likely a model finds each of several answers to a prompt: classification without generating anything.

The score of a choice is log p(choice | prompt), the sum over its tokens, in float32. It is not divided by the number of
tokens: that would be another quantity, and which one was meant would have to be said with every score.

Shape suffixes: B sequences of a batch, C choices, K last positions, R rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from thriftune.errors import InputError, ModelError
from thriftune.infer.batching import (
    Forward,
    ProgressCallback,
    answering,
    check_lengths,
    run_longest_first,
)


def score_choices(
    model: Any,
    prompts: list[list[int]],
    choices: list[list[int]],
    batch_size: int,
    pad_token_id: int,
    on_progress: ProgressCallback,
) -> torch.Tensor:
    """Log-likelihood of every choice after every prompt.

    Choices of one token each cost one forward pass of the prompt and logits at its last position only; longer choices
    cost one forward pass each, of prompt and choice together, with logits at the choice's positions only.

    Args:
        model: a causal language model of transformers, or a PEFT model around one; its mode is restored afterwards.
        prompts: token ids of each prompt, none empty.
        choices: token ids of each choice, the same for all prompts. Leave the end token off, unless a choice is the
            beginning of another one.
        batch_size: sequences that go through the model at once.
        pad_token_id: fills short sequences on the left, hidden from the model by the attention mask.
        on_progress: told after every batch, and when memory ran out and the batch was halved.

    Returns:
        float32 tensor [rows, choices] on the CPU, in nats, in the prompts' order.

    Raises:
        InputError: a prompt or choice is empty, or prompt and choice have more tokens than the model has positions.
        ModelError: the model gives a value that is not a number.
        DoesNotFitError: a single row does not fit into memory.
    """
    check_choices(choices)
    longest = max(len(choice) for choice in choices)
    check_lengths(model, [len(prompt) for prompt in prompts], extra_tokens=longest, extra_name="the longest choice")
    if not prompts:
        return torch.zeros(0, len(choices))
    forward = Forward(model, pad_token_id)
    with answering(model):
        if longest == 1:
            scores_RC = _by_last_token(forward, prompts, choices, batch_size, on_progress)
        else:
            scores_RC = _by_sequence(forward, prompts, choices, batch_size, on_progress)
    check_scores(scores_RC)
    return scores_RC


def check_choices(choices: list[list[int]]) -> None:
    """Raises InputError when there is no choice, or one without a token."""
    if not choices or not all(choices):
        raise InputError(
            given=f"choices of {[len(choice) for choice in choices]} tokens",
            allowed="at least one choice, each of at least one token",
            do="check the choices' texts with the model's tokenizer",
        )


def check_scores(scores_RC: torch.Tensor) -> None:
    """Raises ModelError when a score is not a number."""
    if scores_RC.isnan().any():
        row = int(scores_RC.isnan().any(-1).nonzero()[0])
        raise ModelError(
            given=f"the model's output for prompt {row + 1} is not a number (NaN)",
            allowed="finite outputs",
            do="look for NaN in the model's and the adapter's weights, or load the model in bfloat16 or float32",
        )


def _by_last_token(
    forward: Forward,
    prompts: list[list[int]],
    choices: list[list[int]],
    batch_size: int,
    on_progress: ProgressCallback,
) -> torch.Tensor:
    first_ids = [choice[0] for choice in choices]

    def score(batch: list[int]) -> list[torch.Tensor]:
        logits_BV = forward([prompts[row] for row in batch], 1)[:, -1].float()
        log_chances_BC = logits_BV[:, first_ids] - logits_BV.logsumexp(-1, keepdim=True)
        return list(log_chances_BC.cpu())

    lengths = [len(prompt) for prompt in prompts]
    return torch.stack(run_longest_first(score, lengths, batch_size=batch_size, on_progress=on_progress))


def _by_sequence(
    forward: Forward,
    prompts: list[list[int]],
    choices: list[list[int]],
    batch_size: int,
    on_progress: ProgressCallback,
) -> torch.Tensor:
    """A batch is whole prompts with all their choices, so progress counts prompts and memory depends on both."""
    width = max(len(choice) for choice in choices)
    batch_rows = max(1, batch_size // len(choices))

    def score(batch: list[int]) -> list[torch.Tensor]:
        sequences = [prompts[row] + choice for row in batch for choice in choices]
        logits_BKV = forward(sequences, width + 1).float()
        totals = [
            _sum_of_log_chances(logits_KV, choice)
            for logits_KV, choice in zip(logits_BKV, choices * len(batch), strict=True)
        ]
        return list(torch.stack(totals).reshape(len(batch), len(choices)).cpu())

    lengths = [len(prompt) for prompt in prompts]
    return torch.stack(run_longest_first(score, lengths, batch_size=batch_rows, on_progress=on_progress))


def _sum_of_log_chances(logits_KV: torch.Tensor, choice: Sequence[int]) -> torch.Tensor:
    """The sequence ends with the choice, so the logits that predict it end one position before the last."""
    logits_KV = logits_KV[-1 - len(choice) : -1]
    targets_K = torch.tensor(list(choice), device=logits_KV.device)
    chosen_K = logits_KV.gather(-1, targets_K.unsqueeze(-1)).squeeze(-1)
    return (chosen_K - logits_KV.logsumexp(-1)).sum()
