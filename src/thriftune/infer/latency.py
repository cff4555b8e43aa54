"""How long a person waits for the first token."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from thriftune.errors import InputError
from thriftune.infer.batching import Forward, answering, check_lengths


def first_token_s(model: Any, prompts: list[list[int]], *, device: torch.device | str, repeats: int) -> float:
    """Median seconds from a prompt's token ids to its first generated token, one prompt at a time.

    The ids start on the host and the token ends there; the pass keeps its key-value cache, as generation does, and its
    time is part of what is measured. Every prompt is read once before the clock runs, because a shape's first pass
    compiles and allocates.

    Args:
        model: a causal language model of transformers, or a PEFT model around one; its mode is restored afterwards.
        prompts: token ids of each prompt.
        device: where the model is; a GPU is waited for before and after each pass.
        repeats: passes over all prompts; the median is over len(prompts) x repeats times.

    Raises:
        InputError: no prompts, an empty one, one longer than the model's positions less one, or repeats below 1.
    """
    if not prompts or repeats < 1:
        raise InputError(
            given=f"{len(prompts)} prompts, {repeats} times each",
            allowed="at least one prompt, at least once",
            do="give prompts, and repeats of 1 or more",
        )
    check_lengths(model, [len(prompt) for prompt in prompts], extra_tokens=1, extra_name="the first token")
    device = torch.device(device)
    forward = Forward(model, 0)
    with answering(model):
        for prompt in prompts:
            _timed(forward, prompt, device)
        times_s = [_timed(forward, prompt, device) for _ in range(repeats) for prompt in prompts]
    return statistics.median(times_s)


def _timed(forward: Forward, prompt: list[int], device: torch.device) -> float:
    _wait_for(device)
    start_s = time.perf_counter()
    logits_BV, _ = forward.read([prompt])
    int(logits_BV.argmax(-1))
    _wait_for(device)
    return time.perf_counter() - start_s


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
