"""Perplexity of a text: how surprised a model is by it. Measured before and after, it shows what was forgotten.

The text is cut into windows of `max_length` tokens that do not overlap, and each is read by itself: a token sees what
comes before it in its window and nothing else. (Overlapping windows give lower values at a multiple of the cost; values
are comparable only between runs with the same tokenizer and window.) If the model's tokenizer starts texts with a BOS
token, every window starts with exactly one, which is context and never scored; without one, the first token of a window
has no context and is not scored.

Shape suffixes: B windows of a batch, T positions, V vocabulary.
"""

from __future__ import annotations

import gzip
import lzma
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thriftune.errors import DataError, ModelError
from thriftune.evaluate.intervals import Z_95, ratio_interval
from thriftune.evaluate.score import Asked, Score, draw_subset
from thriftune.infer.batching import Forward, ProgressCallback, answering, model_positions, run_longest_first
from thriftune.infer.prompts import pad_token_id_of

PERPLEXITY = "perplexity"

# Positions whose logits are turned into float32 at once; bounds that copy at 512 times the vocabulary.
POSITIONS_AT_ONCE = 512


@dataclass(frozen=True)
class Window:
    """A piece of the text: ids the model reads, how many of the last ones are scored, and the bytes those stand for."""

    ids: list[int]
    scored: int
    scored_bytes: int | None


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(loss), with `low` and `high` a 95 % interval over windows; `loss`, in nats a scored token, with its
    own interval."""

    value: float
    low: float
    high: float
    loss: float
    loss_low: float
    loss_high: float
    bits_per_byte: float | None
    tokens: int
    losses: list[float]


def score_perplexity(asked: Asked) -> Score:
    path = Path(asked.data.path or asked.data.name).expanduser()
    length = window_length(asked.model, asked.data.max_length)
    found, answers, details = measure_text(read_text(path), length, asked)
    details = {"data": str(path), **details, "loss": found.loss}
    return Score(PERPLEXITY, found.value, found.low, found.high, answers, details)


def measure_text(text: str, length: int, asked: Asked) -> tuple[Perplexity, list[dict[str, Any]], dict[str, Any]]:
    """A text in windows of `length` tokens -> (what was measured, one object a window, details for the record)."""
    windows = cut_windows(text, asked.tokenizer, length)
    indices = draw_subset(len(windows), asked.limit)
    chosen = [windows[index] for index in indices]
    found = measure_perplexity(
        asked.model,
        chosen,
        batch_size=asked.settings.batch_size,
        pad_token_id=pad_token_id_of(asked.tokenizer),
        on_progress=asked.progress,
    )
    answers = [
        {"row": index, "tokens": window.scored, "loss": loss / window.scored}
        for index, window, loss in zip(indices, chosen, found.losses, strict=True)
    ]
    details = {
        "windows_of_text": len(windows),
        "max_length": length,
        "tokens": found.tokens,
        "bits_per_byte": found.bits_per_byte,
    }
    return found, answers, details


def read_text(path: Path) -> str:
    """A UTF-8 text file, also compressed as .gz or .xz. Raises DataError."""
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            return str(file.read())
    except (OSError, UnicodeDecodeError, EOFError, lzma.LZMAError) as problem:
        raise DataError(
            given=f"the text {path} cannot be read: {problem}",
            allowed="a UTF-8 text file, plain or compressed as .gz or .xz",
            do="give the file with --data",
        ) from problem


def cut_windows(text: str, tokenizer: Any, max_length: int) -> list[Window]:
    """The text's tokens in windows of `max_length`, BOS included; the last one is shorter.

    `scored_bytes` are UTF-8 bytes, by the tokens' places in the text; None with a tokenizer that does not know places.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    ids = list(encoded["input_ids"])
    places = list(encoded["offset_mapping"]) if fast else None
    bos = _bos_of(tokenizer)
    if bos and ids[:1] == bos:
        ids, places = ids[1:], places[1:] if places else None
    room = max_length - len(bos)
    windows = []
    for start in range(0, len(ids), room):
        part = ids[start : start + room]
        skipped = 0 if bos else 1
        if len(part) <= skipped:
            continue
        size = None
        if places is not None:
            first, last = places[start + skipped][0], places[start + len(part) - 1][1]
            size = len(text[first:last].encode())
        windows.append(Window(bos + part, len(part) - skipped, size))
    return windows


def measure_perplexity(
    model: Any,
    windows: list[Window],
    *,
    batch_size: int,
    pad_token_id: int,
    on_progress: ProgressCallback,
) -> Perplexity:
    """exp of the mean negative log-likelihood over all scored tokens; log-probabilities in float32.

    The interval is that of the mean loss over windows (`intervals.ratio_interval`), its ends through exp.

    Raises:
        InputError: fewer than two windows.
        ModelError: the loss is not finite.
        DoesNotFitError: a single window does not fit into memory.
    """
    forward = Forward(model, pad_token_id)

    def losses_of(batch: list[int]) -> list[float]:
        chosen = [windows[index] for index in batch]
        logits_BTV = forward([window.ids for window in chosen], max(len(window.ids) for window in chosen))
        return [_loss(logits_TV, window) for logits_TV, window in zip(logits_BTV, chosen, strict=True)]

    with answering(model):
        lengths = [len(window.ids) for window in windows]
        losses = run_longest_first(losses_of, lengths, batch_size=batch_size, on_progress=on_progress)
    wrong = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    if wrong:
        raise ModelError(
            given=f"the loss of window {wrong[0] + 1} of the text is {losses[wrong[0]]}",
            allowed="finite losses",
            do="look for NaN in the model's and the adapter's weights, or load the model in bfloat16 or float32",
        )
    counts = [window.scored for window in windows]
    loss, low, high = ratio_interval(losses, counts, Z_95)
    sizes = [window.scored_bytes for window in windows if window.scored_bytes]
    bits = math.fsum(losses) / math.log(2) / sum(sizes) if len(sizes) == len(windows) else None
    return Perplexity(_exp(loss), _exp(low), _exp(high), loss, low, high, bits, sum(counts), losses)


def window_length(model: Any, max_length: int) -> int:
    """`max_length`, or the model's positions where those are fewer."""
    return min(max_length, model_positions(model) or max_length)


def _loss(logits_TV: torch.Tensor, window: Window) -> float:
    """Sum of -log p over the scored tokens, which are the window's last."""
    targets_T = torch.tensor(window.ids[-window.scored :], device=logits_TV.device)
    logits_TV = logits_TV[-1 - window.scored : -1]
    total = 0.0
    for start in range(0, window.scored, POSITIONS_AT_ONCE):
        piece = slice(start, start + POSITIONS_AT_ONCE)
        total += float(torch.nn.functional.cross_entropy(logits_TV[piece].float(), targets_T[piece], reduction="sum"))
    return total


def _bos_of(tokenizer: Any) -> list[int]:
    """[BOS] if the tokenizer puts it before a text by itself, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []


def _exp(loss: float) -> float:
    """exp without overflow: above 700 nats a token the largest float stands for 'no idea at all'."""
    return math.exp(min(loss, 700.0))
