"""Out of memory: what counts as it, what is tried next and in which order, and how it ends."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from thriftune.errors import DoesNotFitError
from thriftune.train.recover import Recovery, fits_or_ends, is_out_of_memory, until_it_fits


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Recovering collects garbage. What the libraries' import left need not be searched every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def recovery(rows: int = 8, checkpointing: bool = False, allowed: bool = True) -> tuple[Recovery, list[str]]:
    switched: list[str] = []
    return Recovery(rows, checkpointing, (lambda: switched.append("on")) if allowed else None), switched


def fits(plan: Recovery, rows_that_fit: int, asked: list[int]):
    def attempt() -> str:
        rows_at_once = plan.rows_at_once
        asked.append(rows_at_once)
        if rows_at_once > rows_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return f"{rows_at_once} rows"

    return attempt


def test_rows_are_halved_until_it_fits_and_each_time_it_is_cleaned_and_said():
    asked: list[int] = []
    said: list[str] = []
    cleaned: list[int] = []
    plan, switched = recovery(9)
    result = until_it_fits(fits(plan, 2, asked), plan, lambda: cleaned.append(len(asked)), said.append)
    assert (result, plan.rows_at_once, plan.checkpointing, switched) == ("2 rows", 2, False, [])
    assert (asked, cleaned) == ([9, 4, 2], [1, 2])
    assert said == [
        "out of memory: 9 -> 4 rows at once, same step, same examples",
        "out of memory: 4 -> 2 rows at once, same step, same examples",
    ]


def test_at_one_row_checkpointing_is_switched_on_once_and_then_it_ends():
    said: list[str] = []
    asked: list[int] = []
    plan, switched = recovery(2)
    with pytest.raises(DoesNotFitError, match="checkpointing on runs out of memory: CUDA out of memory") as caught:
        until_it_fits(fits(plan, 0, asked), plan, lambda: None, said.append)
    assert caught.value.exit_code == 3
    assert "more" not in caught.value.given, "one line of the reason is enough"
    assert (asked, switched, plan.checkpointing) == ([2, 1, 1], ["on"], True)
    assert [text.split(":")[0] for text in said] == ["out of memory", "out of memory at one row at once"]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpointing_that_is_on_or_refused_is_not_switched_on(checkpointing):
    plan, _ = recovery(1, checkpointing, allowed=False)
    word = "on" if checkpointing else "off"
    with pytest.raises(DoesNotFitError, match=f"checkpointing {word} runs out"):
        until_it_fits(fits(plan, 0, []), plan, lambda: None, print)


def test_what_the_failed_attempt_held_is_free_before_the_next():
    class Activations:
        pass

    held: list[weakref.ref] = []
    alive: list[bool] = []

    plan = recovery(4)[0]

    def attempt() -> None:
        alive.extend(reference() is not None for reference in held)
        activations = Activations()
        held.append(weakref.ref(activations))
        if plan.rows_at_once > 1:
            raise torch.OutOfMemoryError("full")

    gc.disable()
    try:
        until_it_fits(attempt, plan, lambda: None, lambda text: None)
    finally:
        gc.enable()
    assert alive == [False, False, False]


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, counts):
    assert is_out_of_memory(error) is counts


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), KeyboardInterrupt()])
def test_other_errors_come_through_at_once(error):
    asked: list[int] = []

    plan = recovery()[0]

    def attempt() -> None:
        asked.append(plan.rows_at_once)
        raise error

    with pytest.raises(type(error)):
        until_it_fits(attempt, plan, lambda: None, print)
    assert asked == [8]


def test_what_no_smaller_batch_helps_ends_and_says_what_did_not_fit():
    with (
        pytest.raises(DoesNotFitError, match="no memory is left for the optimizer's state: full") as caught,
        fits_or_ends("the optimizer's state"),
    ):
        raise torch.OutOfMemoryError("full")
    assert caught.value.exit_code == 3
    with pytest.raises(RuntimeError, match="a bug"), fits_or_ends("the optimizer's state"):
        raise RuntimeError("a bug")
