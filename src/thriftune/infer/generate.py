"""Answers to prompts: `generate` for many at once, `stream` for one, piece by piece.

Both go through transformers' `generate` with a configuration that is written out whole: a model's own
`generation_config` (sampling, lengths, penalties, forced tokens) has no say, so two models are asked in the same way.

Sampling is by inversion (Devroye 1986, "Non-Uniform Random Variate Generation", III.2): one uniform number a row and
token, drawn from a stream of its own for each row. An answer therefore depends on the seed and on the row's number, not
on which rows it shares a batch with, and a batch repeated after running out of memory gives the same answers.

Shape suffixes: B rows of a batch, T positions so far, N new tokens, V vocabulary.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from thriftune.infer.batching import (
    ProgressCallback,
    answering,
    check_lengths,
    device_of,
    pad_left,
    run_longest_first,
)
from thriftune.recipe import GenerationRecipe


def generate(
    model: Any,
    prompts: list[list[int]],
    settings: GenerationRecipe,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    *,
    seed: int,
    on_progress: ProgressCallback,
) -> list[list[int]]:
    """Generate an answer to every prompt, in batches of `settings.batch_size`, the longest prompts first.

    Args:
        model: a causal language model of transformers, or a PEFT model around one; its mode is restored afterwards.
        prompts: token ids of each prompt, none empty.
        settings: temperature 0 takes the likeliest token, above 0 samples among the likeliest tokens that together
            have probability `top_p`.
        stop_token_ids: each of them ends an answer.
        pad_token_id: fills short prompts on the left, hidden from the model by the attention mask.
        seed: of the sampling; without effect at temperature 0.
        on_progress: told after every batch, and when memory ran out and the batch was halved.

    Returns:
        token ids of each answer in the prompts' order, without prompt, stop token and padding. An answer of
        `max_new_tokens` ids was cut, unless its last token happened to be the one before the stop.

    Raises:
        InputError: a prompt is empty, or has more tokens than the model's positions less `max_new_tokens`.
        DoesNotFitError: a single prompt does not fit into memory.
    """
    return generate_rows(
        model, prompts, settings, stop_token_ids, pad_token_id, seed=seed, first_row=0, on_progress=on_progress
    )


def generate_rows(
    model: Any,
    prompts: list[list[int]],
    settings: GenerationRecipe,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    *,
    seed: int,
    first_row: int,
    on_progress: ProgressCallback,
) -> list[list[int]]:
    """`generate` for prompts that are a window of more rows, of which the first is number `first_row`."""
    check_lengths(
        model, [len(prompt) for prompt in prompts], extra_tokens=settings.max_new_tokens, extra_name="the answer"
    )

    def answer(batch: list[int]) -> list[list[int]]:
        ids_BT, mask_BT = pad_left([prompts[row] for row in batch], pad_token_id, device_of(model))
        ids_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            generation_config=_written_out(settings, stop_token_ids, pad_token_id),
            logits_processor=_pickers(settings, seed, [first_row + row for row in batch], ids_BT.shape[1]),
        )
        return [until_stop(row, stop_token_ids) for row in ids_BT[:, mask_BT.shape[1] :].tolist()]

    with answering(model), _without_own_configuration(model):
        return run_longest_first(
            answer, [len(prompt) for prompt in prompts], batch_size=settings.batch_size, on_progress=on_progress
        )


def stream(
    model: Any,
    prompt: list[int],
    settings: GenerationRecipe,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    tokenizer: Any,
    *,
    seed: int,
) -> Iterator[str]:
    """Generate one answer and yield its text as it comes; the pieces joined are the text of `generate`'s answer.

    The model works in a thread of its own. Closing the iterator, or an exception in the caller (Ctrl-C), stops it after
    the token it is at, and the model's mode is restored.

    Raises:
        InputError: as in `generate`.
    """
    check_lengths(model, [len(prompt)], extra_tokens=settings.max_new_tokens, extra_name="the answer")
    relay = _Relay()

    def answer() -> None:
        try:
            with answering(model), _without_own_configuration(model):
                ids_BT, mask_BT = pad_left([prompt], pad_token_id, device_of(model))
                model.generate(
                    input_ids=ids_BT,
                    attention_mask=mask_BT,
                    generation_config=_written_out(settings, stop_token_ids, pad_token_id),
                    logits_processor=_pickers(settings, seed, [0], len(prompt)),
                    stopping_criteria=StoppingCriteriaList([relay.stopping]),
                    streamer=relay,
                )
            relay.end()
        except BaseException as error:
            relay.fail(error)

    worker = threading.Thread(target=answer, name="answer", daemon=True)
    worker.start()
    try:
        yield from _pieces(relay.tokens(), stop_token_ids, tokenizer)
    finally:
        relay.stopped.set()
        worker.join()


def _pieces(tokens: Iterator[int], stop_token_ids: Sequence[int], tokenizer: Any) -> Iterator[str]:
    """Text that is sure: a character whose bytes are not all there (shown as U+FFFD) waits for the next token."""
    ids: list[int] = []
    said = ""
    for token in tokens:
        if token in stop_token_ids:
            break
        ids.append(token)
        text = decode(tokenizer, ids)
        if not text.endswith("\ufffd") and len(text) > len(said):
            yield text[len(said) :]
            said = text
    rest = decode(tokenizer, ids)[len(said) :] if ids else ""
    if rest:
        yield rest


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """An answer's text, without special tokens and without tidying its spaces."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Relay:
    """Carries tokens from the thread that generates to the one that reads. It is a streamer in transformers' sense."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._queue: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """transformers hands over the prompt first and then each new token."""
        if self._prompt_seen:
            for token in value.flatten().tolist():
                self._queue.put(token)
        self._prompt_seen = True

    def end(self) -> None:
        self._queue.put(None)

    def fail(self, error: BaseException) -> None:
        self._queue.put(error)

    def stopping(self, ids_BT: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((ids_BT.shape[0],), self.stopped.is_set(), dtype=torch.bool, device=ids_BT.device)

    def tokens(self) -> Iterator[int]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


def _written_out(settings: GenerationRecipe, stop_token_ids: Sequence[int], pad_token_id: int) -> GenerationConfig:
    """Greedy for transformers also when sampling: the picker then leaves one token to choose."""
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        repetition_penalty=1.0,
        eos_token_id=list(stop_token_ids) or None,
        pad_token_id=pad_token_id,
    )


@contextmanager
def _without_own_configuration(model: Any) -> Iterator[None]:
    """transformers fills what a configuration leaves open from `model.generation_config`; here that one is empty."""
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    kept = [module.generation_config for module in owners]
    for module in owners:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, configuration in zip(owners, kept, strict=True):
            module.generation_config = configuration


def _pickers(settings: GenerationRecipe, seed: int, rows: list[int], prompt_width: int) -> LogitsProcessorList:
    if settings.temperature == 0:
        return LogitsProcessorList()
    uniforms_BN = draw_uniforms(settings, seed, rows)
    return LogitsProcessorList([_Picker(uniforms_BN, prompt_width, settings.temperature, settings.top_p)])


def draw_uniforms(settings: GenerationRecipe, seed: int, rows: list[int]) -> torch.Tensor:
    """float64 in [0, 1), [rows, max_new_tokens]: what each row's tokens are sampled with, whatever its batch."""
    draws = [numpy.random.default_rng([seed, row]).random(settings.max_new_tokens) for row in rows]
    return torch.from_numpy(numpy.stack(draws))


class _Picker:
    """Samples a token for each row and leaves it as the only possible one."""

    def __init__(self, uniforms_BN: torch.Tensor, prompt_width: int, temperature: float, top_p: float) -> None:
        self.uniforms_BN = uniforms_BN
        self.prompt_width = prompt_width
        self.temperature = temperature
        self.top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform_B1 = self.uniforms_BN[:, input_ids.shape[1] - self.prompt_width].to(scores.device).unsqueeze(1)
        chosen_B1 = pick(scores, uniform_B1, self.temperature, self.top_p)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen_B1, 0.0)


def pick(logits_BV: torch.Tensor, uniform_B1: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Sample ids_B1 from softmax(logits / temperature) cut to its nucleus, by inverting the distribution function.

    The nucleus is the smallest set of likeliest tokens whose probability reaches `top_p` (Holtzman et al. 2020, "The
    Curious Case of Neural Text Degeneration", 3.1). `uniform_B1` is float64 in [0, 1).
    """
    chances_BV, ids_BV = (logits_BV.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before_BV = chances_BV.cumsum(-1) - chances_BV
    chances_BV = chances_BV.masked_fill((before_BV >= top_p) & (before_BV > 0), 0.0)
    sums_BV = chances_BV.cumsum(-1)
    total_B1 = sums_BV[:, -1:]
    places_B1 = torch.searchsorted(sums_BV, uniform_B1 * total_B1, right=True)
    last_B1 = (sums_BV < total_B1).sum(-1, keepdim=True)
    return ids_BV.gather(1, torch.minimum(places_B1, last_B1))


def until_stop(ids: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    """What stands before the first stop token."""
    for place, token in enumerate(ids):
        if token in stop_token_ids:
            return ids[:place]
    return ids
