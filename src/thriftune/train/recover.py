"""Out of memory: the same step again with fewer rows at once, then with recomputation, then an honest end.

The step's examples and its arithmetic stay as they are: the loss is a sum over target tokens divided by their count
over the whole step, however it is cut, and a step's randomness is a function of its number.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from thriftune.errors import DoesNotFitError, first_line

Result = TypeVar("Result")

# What a full memory says when torch has no type for it: the host's allocator, the driver, cuBLAS's own workspace.
OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

BESIDE_THE_MODEL = "trainable weights whose gradients and optimizer state fit beside the model"
LESS_BESIDE_IT = "use an 8-bit or paged optim, method lora or qlora, a lower lora_r, or a smaller model"


@dataclass
class Recovery:
    """How a step is run at present. `enable_checkpointing` is None when it is on already or the recipe says off."""

    rows_at_once: int
    checkpointing: bool
    enable_checkpointing: Callable[[], None] | None

    def step_down(self, reason: str) -> str:
        """Make the next attempt smaller and say how. Raises DoesNotFitError when nothing smaller is left."""
        if self.rows_at_once > 1:
            before = self.rows_at_once
            self.rows_at_once //= 2
            return f"out of memory: {before} -> {self.rows_at_once} rows at once, same step, same examples"
        if self.enable_checkpointing is not None and not self.checkpointing:
            self.enable_checkpointing()
            self.checkpointing = True
            return "out of memory at one row at once: gradient checkpointing on from here, same step"
        raise DoesNotFitError(
            given=f"one row at once with gradient checkpointing {'on' if self.checkpointing else 'off'} runs out of "
            f"memory: {reason}",
            allowed="a step whose smallest part fits",
            do="lower data.max_length, use method qlora, allow gradient_checkpointing, or take a smaller model",
        )


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)


class StepsDown(Protocol):
    def step_down(self, reason: str) -> str: ...


def until_it_fits(
    attempt: Callable[[], Result], smaller: StepsDown, clean: Callable[[], None], say: Callable[[str], None]
) -> Result:
    """`attempt()`, repeated after each out-of-memory once `smaller` has stepped down; `clean` undoes what a failed one
    left."""
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        # Outside the except block: the traceback no longer holds the failed attempt's tensors.
        clean()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(smaller.step_down(reason))


@contextmanager
def fits_or_ends(what: str, allowed: str = BESIDE_THE_MODEL, do: str = LESS_BESIDE_IT) -> Iterator[None]:
    """Around what no smaller micro-batch helps: out of memory becomes DoesNotFitError, which says what did not fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFitError(
            given=f"no memory is left for {what}: {first_line(error)}",
            allowed=allowed,
            do=do,
        ) from None
