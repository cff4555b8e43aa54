"""What every kind of inference shares: rows by length, padding on the left, memory that runs out, the model's mode.

Shape suffixes: B rows of a batch, K last positions, T positions, V vocabulary.
"""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from thriftune.errors import DoesNotFitError, InputError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """Rows done of all rows, and, when something happened that a person should know, what it was."""

    done: int
    total: int
    event: str | None


ProgressCallback = Callable[[Progress], None]


def run_longest_first(
    work: Callable[[list[int]], list[Result]],
    lengths: Sequence[int],
    *,
    batch_size: int,
    on_progress: ProgressCallback,
) -> list[Result]:
    """Do `work` on batches of row numbers, the longest rows first, and give the results in the rows' own order.

    The first batch needs the most memory, so what fits is known at once, and rows of one batch have similar lengths,
    so little is padding. When the device runs out of memory the batch size is halved for the rest of the call and the
    batch repeated; `on_progress` is told.

    Args:
        work: is given the numbers of a batch's rows, returns one result for each, in the same order.
        lengths: tokens of each row.

    Raises:
        DoesNotFitError: a single row does not fit.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    results: dict[int, Result] = {}
    while len(results) < len(order):
        batch = order[len(results) : len(results) + batch_size]
        done = _unless_out_of_memory(work, batch)
        if done is not None:
            results.update(zip(batch, done, strict=True))
            on_progress(Progress(len(results), len(order), None))
            continue
        _release_memory()
        if len(batch) == 1:
            raise DoesNotFitError(
                given=f"out of memory with a single row of {lengths[batch[0]]:,} tokens",
                allowed="rows that fit beside the model on the device",
                do="shorten the rows (data.max_length, generation.max_new_tokens), load the model in fewer bits, "
                "or use a device with more memory",
            )
        batch_size = len(batch) // 2
        event = f"out of memory with {len(batch)} rows at once; went on with {batch_size}"
        on_progress(Progress(len(results), len(order), event))
    return [results[row] for row in range(len(order))]


def _unless_out_of_memory(work: Callable[[list[int]], list[Result]], batch: list[int]) -> list[Result] | None:
    """None when the device's memory ran out. Leaving the handler first lets go of the failed batch's tensors."""
    try:
        return work(batch)
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        if "CUBLAS_STATUS_ALLOC_FAILED" not in str(error):
            raise
        return None


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """Evaluation mode and no autograd inside; afterwards every module has the mode it had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def device_of(model: Any) -> torch.device:
    """Where token ids go: the device of the input embedding."""
    return model.get_input_embeddings().weight.device


def pad_left(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids -> ids_BT and mask_BT (1 for a token, 0 for padding), both int64; every row ends at T."""
    width = max(len(row) for row in rows)
    ids_BT = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows])
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids_BT.to(device), mask_BT.to(device)


def model_positions(model: Any) -> int | None:
    """How many positions the model has; None when its configuration sets no limit (as in state space models)."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def check_lengths(model: Any, lengths: Sequence[int], *, extra_tokens: int, extra_name: str) -> None:
    """Refuse rows that are empty, or that with `extra_tokens` more tokens exceed the model's positions.

    Raises:
        InputError: names the first such row, counted from 1, and how many there are.
    """
    positions = model_positions(model)
    empty = [row for row, length in enumerate(lengths) if length == 0]
    if empty:
        raise InputError(
            given=f"prompt {empty[0] + 1} has no token ({len(empty)} of {len(lengths)} prompts are empty)",
            allowed="prompts of at least one token",
            do="remove the empty rows, or give them a text",
        )
    if positions is None:
        return
    room = positions - extra_tokens
    long = [row for row, length in enumerate(lengths) if length > room]
    if long:
        raise InputError(
            given=f"prompt {long[0] + 1} has {lengths[long[0]]:,} tokens and the model {positions:,} positions, "
            f"of which {extra_tokens:,} are for {extra_name} ({len(long)} of {len(lengths)} prompts are too long)",
            allowed=f"prompts of at most {max(room, 0):,} tokens",
            do="lower data.max_length so that prompts are cut, or lower generation.max_new_tokens",
        )


@dataclass
class Reading:
    """What a model has read so far: its cache, and `mask` [B, T], 1 for positions that are tokens and 0 for padding."""

    cache: Any
    mask: torch.Tensor

    def copy(self) -> Reading:
        """The same place in the text, to go on from without moving the original."""
        return Reading(copy.deepcopy(self.cache), self.mask)


class Forward:
    """Passes over sequences padded on the left: whole ones, or prompts that are read once and then gone on with.

    `forward` of a transformers model does not count positions from the attention mask as its `generate` does, so they
    are given where the model knows them. Logits at the last positions only are asked for where the model can do that;
    the values are the same without.
    """

    def __init__(self, model: Any, pad_token_id: int) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        known = inspect.signature(base.forward).parameters
        self.model = model
        self.pad_token_id = pad_token_id
        self.takes_positions = "position_ids" in known
        self.takes_logits_to_keep = "logits_to_keep" in known
        self.can_go_on = "past_key_values" in known

    def __call__(self, sequences: Sequence[Sequence[int]], last_positions: int) -> torch.Tensor:
        """Token ids of each sequence -> logits_BKV in the model's own type, K being `last_positions`."""
        ids_BT, mask_BT = pad_left(sequences, self.pad_token_id, device_of(self.model))
        output = self._pass(ids_BT, mask_BT, last_positions, use_cache=False)
        logits_BKV: torch.Tensor = output.logits[:, -last_positions:]
        return logits_BKV

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Reading]:
        """Token ids of each prompt -> logits_BV at its last token, and the place to go on from."""
        ids_BT, mask_BT = pad_left(prompts, self.pad_token_id, device_of(self.model))
        output = self._pass(ids_BT, mask_BT, 1, use_cache=True)
        return output.logits[:, -1], Reading(getattr(output, "past_key_values", None), mask_BT)

    def read_on(self, reading: Reading, ids_BK: torch.Tensor) -> torch.Tensor:
        """K more tokens of every row -> logits_BKV at each of them; `reading` moves on behind them."""
        reading.mask = torch.cat([reading.mask, torch.ones_like(ids_BK)], dim=1)
        output = self._pass(ids_BK, reading.mask, ids_BK.shape[1], use_cache=True, past_key_values=reading.cache)
        reading.cache = output.past_key_values
        logits_BKV: torch.Tensor = output.logits
        return logits_BKV

    def _pass(self, ids_BK: torch.Tensor, mask_BT: torch.Tensor, last_positions: int, **options: Any) -> Any:
        if self.takes_positions:
            options["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BK.shape[1] :]
        if self.takes_logits_to_keep:
            options["logits_to_keep"] = last_positions
        return self.model(input_ids=ids_BK, attention_mask=mask_BT, **options)
