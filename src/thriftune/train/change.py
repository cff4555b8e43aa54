"""What a method does to the model between two steps, with what it does to loss and memory measured around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from thriftune.data import Example
from thriftune.records import RankCut
from thriftune.train.checkpoint import TrainState
from thriftune.train.job import TrainJob, check_finite
from thriftune.train.moments import held_bytes, replace_parameters
from thriftune.train.path import StepPath
from thriftune.train.recover import fits_or_ends


def change_if_due(
    job: TrainJob,
    optimizer: torch.optim.Optimizer,
    path: StepPath,
    state: TrainState,
    loss_of: Callable[[Sequence[Example]], float],
    say: Callable[[str], None],
) -> None:
    """Change the model as its method wants it after this step, and have optimizer and path follow.

    The loss before and after is that of the step's own examples. Happens before anything of the step is saved, so a
    checkpoint of this step has the change behind it.
    """
    change = job.method.between_steps(job.recipe, state.step, job.order.steps)
    if change is None:
        return
    check_finite(job, state.step)
    examples = [job.train_examples[index] for index in job.order.indices(state.step - 1)]
    loss_before, before, copies_before = loss_of(examples), _sizes(job, optimizer), path.copies_bytes()
    started = time.perf_counter()
    with fits_or_ends("other parameters beside those that they replace"):
        changed = change(job.model)
        replace_parameters(optimizer, changed.replacements)
        share, ranks = changed.share, changed.ranks
        del change, changed  # they hold the old parameters
        job.parameters_changed()
        path.parameters_changed()
    after = _sizes(job, optimizer)  # waits for the GPU
    cut_s = time.perf_counter() - started
    cut = RankCut(
        step=state.step,
        share=share,
        ranks=ranks,
        loss_before=loss_before,
        loss_after=loss_of(examples),
        parameters_before=before[0],
        parameters_after=after[0],
        held_bytes_before=before[1],
        held_bytes_after=after[1],
        copies_bytes_before=copies_before,
        copies_bytes_after=path.copies_bytes(),
        allocated_bytes_before=before[2],
        allocated_bytes_after=after[2],
        cut_s=cut_s,
    )
    state.cuts.append(cut)
    say(cut.words)


def _sizes(job: TrainJob, optimizer: torch.optim.Optimizer) -> tuple[int, int, int | None]:
    """Trained parameters, bytes held for them, and bytes that the GPU's allocator has handed out in all."""
    device = job.processes.device
    allocated = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        allocated = torch.cuda.memory_allocated(device)
    counted = sum(parameter.numel() for parameter in job.trainable)
    return counted, held_bytes(job.trainable, optimizer), allocated
