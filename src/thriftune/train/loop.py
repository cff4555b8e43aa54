"""The training loop. One optimizer step is `train_step`; the rest decides when to evaluate, save and stop.

A step's examples are fixed by the seed and the step's number. They are shared out among the processes and cut into
micro-batches; the loss is the mean over the target tokens of the whole step, so neither changes the result.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thriftune.data import Example, StepOrder, micro_batches, shared_out
from thriftune.errors import NonFiniteLossError, StoppedBySignal
from thriftune.methods.base import Method
from thriftune.recipe import Recipe
from thriftune.records import StepMetrics
from thriftune.train.checkpoint import (
    TrainState,
    check_identity,
    find_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    write_checkpoint,
)
from thriftune.train.distributed import Processes
from thriftune.train.loss import accepts_logits_to_keep, loss_sum
from thriftune.train.meter import Meter
from thriftune.train.observe import Observers, read_metrics
from thriftune.train.optim import LearningRate, build_optimizer, load_optimizer, save_optimizer, set_learning_rate
from thriftune.train.recover import Recovery, until_it_fits


@dataclass
class StopRequest:
    """Set by a signal handler; the loop finishes the step, saves, and raises StoppedBySignal."""

    signal_number: int = 0


@dataclass(frozen=True)
class TrainJob:
    """Everything the loop is handed. `identity` is what a resumed run must share with its checkpoint."""

    model: nn.Module
    method: Method
    recipe: Recipe
    train_examples: Sequence[Example]
    place_of: Callable[[int], str]
    eval_examples: Sequence[Example]
    processes: Processes
    output: Path
    autocast_dtype: torch.dtype | None
    enable_checkpointing: Callable[[], None]
    checkpointing: bool
    identity: dict[str, Any]
    resume_command: str

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @functools.cached_property
    def lengths(self) -> list[int]:
        return [len(example) for example in self.train_examples]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.processes.device.type, dtype=self.autocast_dtype)


@dataclass
class TrainOutcome:
    steps: int
    epochs: float
    loss: float | None
    eval_loss: float | None
    best_step: int | None
    tokens: int
    tokens_per_s: float
    peak_bytes: int
    energy_j: float | None
    train_s: float
    optimizer: str
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    targets: int
    tokens: int
    stop_signal: int


def train_step(
    job: TrainJob, optimizer: torch.optim.Optimizer, recovery: Recovery, indices: list[int], step: int, rate: float,
    stop: StopRequest, say: Callable[[str], None], logits_for_targets_only: bool,
) -> StepResult:
    """One optimizer step over the examples `indices`."""
    processes, device = job.processes, job.processes.device

    # -- this process's examples; targets and tokens of the whole step ------------------------------------------
    mine = [job.train_examples[index] for index in shared_out(indices, job.lengths, processes.rank, processes.world)]
    whole = micro_batches(mine, max(1, len(mine)))
    counts = [sum(batch.num_targets for batch in whole), sum(batch.num_tokens for batch in whole), stop.signal_number]
    targets, tokens, stop_signal = processes.total(counts)

    # -- gradient of the mean loss: summed losses / targets, one micro-batch after another ----------------------
    def attempt(rows_at_once: int) -> Tensor:
        torch.manual_seed((job.recipe.seed * 1_000_003 + step * 1_009 + processes.rank) % 2**63)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in micro_batches(mine, rows_at_once):
            with job.autocast():
                share = loss_sum(job.model, batch.to(device), logits_for_targets_only) / targets
            share.backward()
            total += share.detach()
        return total

    def clean() -> None:
        optimizer.zero_grad(set_to_none=True)

    my_loss = until_it_fits(attempt, recovery, clean, say)
    processes.sum_gradients(job.trainable)
    (loss,) = processes.total([float(my_loss)])

    # -- nothing non-finite reaches the weights -------------------------------------------------------------------
    limit = job.recipe.train.max_grad_norm or math.inf
    grad_norm = float(nn.utils.clip_grad_norm_(job.trainable, limit))
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise _non_finite(job, step, loss, grad_norm, indices)

    # -- the update -------------------------------------------------------------------------------------------------
    set_learning_rate(optimizer, rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, grad_norm, int(targets), int(tokens), _one_signal(stop_signal))


def train(job: TrainJob, observers: Observers, stop: StopRequest) -> TrainOutcome:
    """Train to the end of the recipe and return what happened; checkpoints and metrics are written on the way.

    Raises NonFiniteLossError, DoesNotFitError, DiskFullError, StoppedBySignal (after saving), CheckpointError.
    """
    recipe, processes = job.recipe, job.processes
    settings = recipe.train
    order = StepOrder(
        num_examples=len(job.train_examples),
        examples_per_step=settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        * processes.world,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        seed=recipe.seed,
        shuffle=recipe.data.shuffle,
    )
    learning_rate = LearningRate(settings, recipe.learning_rate, order.steps)
    processes.same_start(job.trainable)
    optimizer, optimizer_name, remark = build_optimizer(job.model, recipe, processes.device)
    if remark:
        observers.event(remark)
    state = _start_or_resume(job, optimizer, observers)
    recovery = Recovery(
        rows_at_once=min(state.rows_at_once, settings.per_device_train_batch_size),
        checkpointing=state.checkpointing,
        enable_checkpointing=job.enable_checkpointing if settings.gradient_checkpointing == "auto" else None,
    )
    if recovery.checkpointing:
        job.enable_checkpointing()
    logits_for_targets_only = accepts_logits_to_keep(job.model)
    losses = [(past.loss, past.targets) for past in read_metrics(job.output / "metrics.jsonl")][: state.step]
    meter = Meter(processes.device)
    before_s, before_j = state.train_s, state.energy_j
    job.model.train()
    observers.start(state.step, order.steps)

    for step in range(state.step, order.steps):
        started = time.perf_counter()
        events: list[str] = []

        def say(text: str, events: list[str] = events) -> None:
            events.append(text)
            observers.event(text)

        rate = learning_rate.at(step)
        result = train_step(
            job, optimizer, recovery, order.indices(step), step, rate, stop, say, logits_for_targets_only
        )
        state.step = step + 1
        state.tokens_seen += result.tokens
        state.rows_at_once, state.checkpointing = recovery.rows_at_once, recovery.checkpointing
        state.events = list(observers.events)
        losses.append((result.loss, result.targets))
        step_s = time.perf_counter() - started

        eval_loss = _evaluate_if_due(job, order, state, recovery, observers, logits_for_targets_only)
        state.train_s = before_s + meter.elapsed_s()
        energy_j = meter.energy_j()
        state.energy_j = before_j + (energy_j or 0.0)
        observers.step(
            StepMetrics(
                step=state.step, epoch=order.epoch(state.step), loss=result.loss, grad_norm=result.grad_norm,
                learning_rate=rate, targets=result.targets, tokens=result.tokens, tokens_seen=state.tokens_seen,
                step_s=step_s, tokens_per_s=result.tokens / step_s, memory_bytes=meter.memory_bytes(),
                peak_bytes=meter.peak_bytes(), energy_j=energy_j, eval_loss=eval_loss, events=events,
            )
        )
        improved = eval_loss is not None and state.best_step == state.step and settings.load_best_model_at_end
        if improved or _save_due(job, order, state.step) or result.stop_signal:
            _save(job, optimizer, state, observers)
        if result.stop_signal and state.step < order.steps:
            observers.end()
            raise _stopped(job, state.step, result.stop_signal)

    if settings.load_best_model_at_end and state.best_step not in (None, state.step):
        job.method.load(job.model, job.output / f"checkpoint-{state.best_step}")
        observers.event(f"kept step {state.best_step}, whose eval loss {state.best_eval_loss:.4f} is the lowest")
    observers.end()
    tail = losses[-max(1, len(losses) // 10) :]
    counted = sum(targets for _, targets in tail)
    return TrainOutcome(
        steps=state.step,
        epochs=order.epoch(state.step),
        loss=sum(loss * targets for loss, targets in tail) / counted if counted else None,
        eval_loss=state.best_eval_loss,
        best_step=state.best_step,
        tokens=state.tokens_seen,
        tokens_per_s=state.tokens_seen / state.train_s if state.train_s else 0.0,
        peak_bytes=meter.peak_bytes(),
        energy_j=state.energy_j or None,
        train_s=state.train_s,
        optimizer=optimizer_name,
        losses=[loss for loss, _ in losses],
    )


def mean_loss(
    job: TrainJob, examples: Sequence[Example], recovery: Recovery, say: Callable[[str], None],
    logits_for_targets_only: bool,
) -> float:
    """Mean loss over the target tokens of `examples`, shared out among the processes; no gradient, no dropout."""
    processes = job.processes
    lengths = [len(example) for example in examples]
    numbers = shared_out(range(len(examples)), lengths, processes.rank, processes.world)
    mine = [examples[number] for number in numbers]

    def attempt(rows_at_once: int) -> tuple[float, int]:
        total, targets = 0.0, 0
        for batch in micro_batches(mine, rows_at_once):
            with job.autocast():
                total += float(loss_sum(job.model, batch.to(processes.device), logits_for_targets_only))
            targets += batch.num_targets
        return total, targets

    in_evaluation = Recovery(job.recipe.train.per_device_eval_batch_size, recovery.checkpointing, None)
    job.model.eval()
    try:
        with torch.no_grad():
            total, targets = processes.total(until_it_fits(attempt, in_evaluation, lambda: None, say))
    finally:
        job.model.train()
    return total / targets if targets else math.nan


def _evaluate_if_due(
    job: TrainJob, order: StepOrder, state: TrainState, recovery: Recovery, observers: Observers,
    logits_for_targets_only: bool,
) -> float | None:
    strategy = job.recipe.train.eval_strategy
    every = job.recipe.train.eval_steps if strategy == "steps" else order.steps_per_epoch
    due = state.step % every == 0 or state.step == order.steps
    if strategy == "no" or not job.eval_examples or not due:
        return None
    loss = mean_loss(job, job.eval_examples, recovery, observers.event, logits_for_targets_only)
    if state.best_eval_loss is None or loss < state.best_eval_loss:
        state.best_eval_loss, state.best_step = loss, state.step
    return loss


def _save_due(job: TrainJob, order: StepOrder, step: int) -> bool:
    strategy = job.recipe.train.save_strategy
    if strategy == "no":
        return False
    every = job.recipe.train.save_steps if strategy == "steps" else order.steps_per_epoch
    return step % every == 0 or step == order.steps


def _save(job: TrainJob, optimizer: torch.optim.Optimizer, state: TrainState, observers: Observers) -> None:
    job.processes.barrier()
    if job.processes.is_main:

        def write_parts(folder: Path) -> None:
            job.method.save(job.model, folder)
            save_optimizer(optimizer, folder)

        expected = sum(12 * parameter.numel() for parameter in job.trainable)
        folder = write_checkpoint(job.output, state, write_parts, expected)
        keep_best = state.best_step if job.recipe.train.load_best_model_at_end else None
        prune_checkpoints(job.output, job.recipe.train.save_total_limit, keep_best)
        observers.saved(folder)
    job.processes.barrier()


def _start_or_resume(job: TrainJob, optimizer: torch.optim.Optimizer, observers: Observers) -> TrainState:
    fresh = TrainState(
        rows_at_once=job.recipe.train.per_device_train_batch_size,
        checkpointing=job.checkpointing,
        identity=job.identity,
    )
    wanted = job.recipe.train.resume_from_checkpoint
    found = find_checkpoint(job.output, wanted, observers.event) if wanted else None
    if found is None:
        if wanted:
            observers.event(f"no checkpoint in {job.output}: starting afresh")
        return fresh
    folder, state = found
    check_identity(folder, state, job.identity)
    job.method.load(job.model, folder)
    load_optimizer(optimizer, folder)
    observers.events[:0] = state.events
    observers.event(f"resumed from {folder} at step {state.step}")
    return state


def _one_signal(summed: float) -> int:
    """Signal numbers summed over the processes back to one of them: 0, SIGTERM (15) or SIGINT (2)."""
    if not summed:
        return 0
    return signal.SIGTERM if summed % signal.SIGTERM == 0 else signal.SIGINT


def _non_finite(
    job: TrainJob, step: int, loss: float, grad_norm: float, indices: Sequence[int]
) -> NonFiniteLossError:
    rows = ", ".join(job.place_of(index) for index in indices[:8])
    good = newest_checkpoint(job.output)
    return NonFiniteLossError(
        given=f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; rows of this step: {rows}"
        f"{' ...' if len(indices) > 8 else ''}",
        allowed="finite numbers; the weights were not touched by this step and nothing of it was saved",
        do=f"lower learning_rate, look at those rows; the last good checkpoint is {good or 'none'}",
    )


def _stopped(job: TrainJob, step: int, signal_number: int) -> StoppedBySignal:
    return StoppedBySignal(
        signal_number=signal_number,
        given=f"{signal.Signals(signal_number).name} after step {step}; saved {job.output / f'checkpoint-{step}'}",
        allowed="stopping at any time",
        do=f"go on with: {job.resume_command}",
    )
