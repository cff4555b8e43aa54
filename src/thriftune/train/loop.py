"""The training loop. One optimizer step is `train_step`; the rest decides when to evaluate, save and stop.

A step's examples are fixed by the seed and the step's number. They are shared out among the processes and cut into
micro-batches; the loss is the mean over the target tokens of the whole step, so neither changes the result.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from thriftune.data import Example, shared_out
from thriftune.errors import CheckpointError, NonFiniteLossError, StoppedBySignal
from thriftune.recipe import TrainRecipe
from thriftune.records import StepMetrics
from thriftune.train.change import change_if_due
from thriftune.train.checkpoint import (
    TrainState,
    check_identity,
    find_checkpoint,
    last_good,
    prune_checkpoints,
    verify_checkpoint,
    write_checkpoint,
)
from thriftune.train.job import StopRequest, TrainJob, TrainOutcome, check_finite, generic_path
from thriftune.train.meter import Meter
from thriftune.train.observe import Observers, read_metrics
from thriftune.train.optim import LearningRate, build_optimizer, load_optimizer, save_optimizer, set_learning_rate
from thriftune.train.path import StepPath
from thriftune.train.recover import fits_or_ends, until_it_fits

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    targets: int
    tokens: int
    stop_signal: int


def train_step(
    job: TrainJob,
    optimizer: torch.optim.Optimizer,
    path: StepPath,
    step: int,
    rate: float,
    stop: StopRequest,
    say: Callable[[str], None],
) -> StepResult:
    """One optimizer step over the examples that belong to it."""
    processes = job.processes

    # -- this process's examples; targets and tokens of the whole step ------------------------------------------
    indices = job.order.indices(step)
    mine = [job.train_examples[index] for index in shared_out(indices, job.lengths, processes.rank, processes.world)]
    counts = [sum(example.num_targets for example in mine), sum(len(example) for example in mine)]
    targets, tokens = processes.total(counts)

    # -- gradient of the mean loss: summed losses / targets, cut into parts as memory allows ---------------------
    def attempt() -> Tensor:
        torch.manual_seed((job.recipe.seed * 1_000_003 + step * 1_009 + processes.rank + job.draws) % 2**63)
        return path.add_gradients(mine, targets)

    def clean() -> None:
        optimizer.zero_grad(set_to_none=True)

    my_loss = until_it_fits(attempt, path, clean, say)
    with fits_or_ends("the optimizer's state"):
        # -- nothing non-finite reaches the weights -------------------------------------------------------------
        processes.sum_gradients(job.trainable)
        limit = job.recipe.train.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(job.trainable, limit)
        signals = [float(stop.signal_number == number) for number in STOP_SIGNALS]
        loss, *signals = processes.total([float(my_loss), *signals])
        grad_norm = float(norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise _non_finite_step(job, step, loss, grad_norm, indices)

        # -- the update -----------------------------------------------------------------------------------------
        set_learning_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    stop_signal = next((int(number) for number, seen in zip(STOP_SIGNALS, signals, strict=True) if seen), 0)
    return StepResult(loss, grad_norm, int(targets), int(tokens), stop_signal)


def train(job: TrainJob, observers: Observers, stop: StopRequest) -> TrainOutcome:
    """Train to the end of the recipe and return what happened; checkpoints and metrics are written on the way.

    Raises NonFiniteLossError, DoesNotFitError, DiskFullError, StoppedBySignal (after saving), CheckpointError.
    """
    learning_rate = LearningRate(job.recipe.train, job.recipe.learning_rate, job.order.steps)
    job.processes.same_start(job.trainable)
    path = job.path or generic_path(job)
    state, found = _start_or_resume(job, path, observers)
    optimizer, optimizer_name, remark = build_optimizer(job.model, job.recipe, job.processes.device)
    if remark:
        observers.event(remark)
    if found is not None:
        load_optimizer(optimizer, found)
    past = [metrics for metrics in read_metrics(job.output / "metrics.jsonl") if metrics.step <= state.step]
    losses = [(metrics.loss, metrics.targets) for metrics in past]
    meter = Meter(job.processes.device)
    before_s, before_j = state.train_s, state.energy_j
    job.model.train()
    observers.start(state.step, job.order.steps)
    try:
        for step in range(state.step, job.order.steps):
            started = time.perf_counter()
            events: list[str] = []

            def say(text: str, events: list[str] = events) -> None:
                events.append(text)
                observers.event(text)

            rate = learning_rate.at(step)
            result = train_step(job, optimizer, path, step, rate, stop, say)
            step_s = time.perf_counter() - started
            state.step, state.tokens_seen = step + 1, state.tokens_seen + result.tokens
            losses.append((result.loss, result.targets))
            change_if_due(job, optimizer, path, state, partial(mean_loss, job, path, say), say)
            state.path = path.state()
            eval_loss = _evaluate_if_due(job, state, path, say)
            state.train_s = before_s + meter.elapsed_s()
            is_last = state.step == job.order.steps or result.stop_signal != 0
            state.energy_j = before_j + (meter.energy_j(now=is_last) or 0.0)
            observers.step(step_metrics(job, state, result, path, meter, rate, step_s, eval_loss, events))
            if _save_due(job, state, eval_loss) or result.stop_signal:
                _save(job, optimizer, state, observers)
            if result.stop_signal and state.step < job.order.steps:
                raise _stopped(job, state.step, result.stop_signal)
        _keep_best(job, state, observers)
    finally:
        observers.end()
    return _outcome(job, state, losses, meter, optimizer_name)


def mean_loss(job: TrainJob, path: StepPath, say: Callable[[str], None], examples: Sequence[Example]) -> float:
    """Mean loss over the target tokens of `examples`, shared out among the processes; no gradient, no dropout."""
    processes = job.processes
    lengths = [len(example) for example in examples]
    numbers = shared_out(range(len(examples)), lengths, processes.rank, processes.world)
    mine = [examples[number] for number in numbers]
    measuring = path.in_evaluation()
    job.model.eval()
    try:
        with torch.no_grad():
            found = until_it_fits(lambda: measuring.losses(mine), measuring, lambda: None, say)
            total, targets = processes.total(found)
    finally:
        job.model.train()
    return total / targets if targets else math.nan


def eval_is_due(settings: TrainRecipe, before: int, step: int, last: int, epoch: int) -> bool:
    """Whether the eval rows' loss is measured after `step`, when the step that could be asked about before is `before`:
    where a multiple of `eval_steps`, or of the steps of an `epoch`, is reached or passed, and after the `last`."""
    every = settings.eval_steps if settings.eval_strategy == "steps" else epoch
    return settings.eval_strategy != "no" and (step // every > before // every or step == last)


def _evaluate_if_due(job: TrainJob, state: TrainState, path: StepPath, say: Callable[[str], None]) -> float | None:
    step, order = state.step, job.order
    due = eval_is_due(job.recipe.train, step - 1, step, order.steps, order.steps_per_epoch)
    if not job.eval_examples or not due:
        return None
    loss = mean_loss(job, path, say, job.eval_examples)
    state.last_eval_loss = loss if math.isfinite(loss) else None
    if state.last_eval_loss is None:
        say(f"the eval loss after step {state.step} is {loss}: it cannot be the best")
    elif state.best_eval_loss is None or loss < state.best_eval_loss:
        state.best_eval_loss, state.best_step = loss, state.step
    return loss


def step_metrics(
    job: TrainJob,
    state: TrainState,
    result: StepResult,
    path: StepPath,
    meter: Meter,
    rate: float,
    step_s: float,
    eval_loss: float | None,
    events: list[str],
) -> StepMetrics:
    return StepMetrics(
        step=state.step,
        epoch=job.order.epoch(state.step),
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=rate,
        targets=result.targets,
        tokens=result.tokens,
        tokens_seen=state.tokens_seen,
        step_s=step_s,
        tokens_per_s=result.tokens / step_s,
        memory_bytes=meter.memory_bytes(),
        peak_bytes=meter.peak_bytes(),
        energy_j=meter.energy_j(),
        eval_loss=eval_loss,
        events=events,
        **path.measured(),
    )


def _save_due(job: TrainJob, state: TrainState, eval_loss: float | None) -> bool:
    settings, step = job.recipe.train, state.step
    if settings.load_best_model_at_end and eval_loss is not None and state.best_step == step:
        return True
    if settings.save_strategy == "no":
        return False
    every = settings.save_steps if settings.save_strategy == "steps" else job.order.steps_per_epoch
    return step % every == 0 or step == job.order.steps


def _save(job: TrainJob, optimizer: torch.optim.Optimizer, state: TrainState, observers: Observers) -> None:
    check_finite(job, state.step)
    state.events = list(observers.events)
    job.processes.barrier()
    if job.processes.is_main:

        def write_parts(folder: Path) -> None:
            job.method.save(job.model, folder)
            save_optimizer(optimizer, folder)

        expected = sum(12 * parameter.numel() for parameter in job.trainable)
        folder = write_checkpoint(job.output, state, write_parts, expected)
        keep_best = state.best_step if job.recipe.train.load_best_model_at_end else None
        prune_checkpoints(job.output, state.step, job.recipe.train.save_total_limit, keep_best)
        observers.saved(folder)
    job.processes.barrier()


def _start_or_resume(job: TrainJob, path: StepPath, observers: Observers) -> tuple[TrainState, Path | None]:
    """Where the run stands, and the checkpoint that model and path now are as, whose optimizer is still to be read: its
    parameters may have other sizes than at the start."""
    fresh = TrainState(identity=job.identity)
    wanted = job.recipe.train.resume_from_checkpoint
    found = find_checkpoint(job.output, wanted, observers.event) if wanted else None
    if found is None:
        if wanted:
            observers.event(f"no checkpoint in {job.output}: starting afresh")
        return fresh, None
    folder, state = found
    check_identity(folder, state, job.identity)
    before = job.trainable
    job.method.load(job.model, folder)
    job.parameters_changed()
    if {*map(id, job.trainable)} != {*map(id, before)}:
        path.parameters_changed()
    path.resume(state.path)
    observers.events[:0] = [text for text in state.events if text not in observers.events]
    observers.event(f"resumed from {folder} at step {state.step}")
    return state, folder


def _keep_best(job: TrainJob, state: TrainState, observers: Observers) -> None:
    """Check the last weights, or with load_best_model_at_end put the best step's in their place."""
    if not job.recipe.train.load_best_model_at_end or state.best_step in (None, state.step):
        check_finite(job, state.step)
        return
    folder = job.output / f"checkpoint-{state.best_step}"
    try:
        verify_checkpoint(folder)
    except CheckpointError as error:
        raise CheckpointError(
            given=f"the best step cannot be kept: {error.given}",
            allowed="a whole checkpoint of the best step",
            do="run again with resume_from_checkpoint=auto load_best_model_at_end=false to keep the last step",
        ) from None
    job.method.load(job.model, folder)
    observers.event(f"kept step {state.best_step}, whose eval loss {state.best_eval_loss:.4f} is the lowest")


def _outcome(
    job: TrainJob, state: TrainState, losses: Sequence[tuple[float, int]], meter: Meter, optimizer_name: str
) -> TrainOutcome:
    tail = losses[-max(1, len(losses) // 10) :]
    counted = sum(targets for _, targets in tail)
    best = job.recipe.train.load_best_model_at_end
    return TrainOutcome(
        steps=state.step,
        epochs=job.order.epoch(state.step),
        loss=sum(loss * targets for loss, targets in tail) / counted if counted else None,
        eval_loss=state.best_eval_loss if best else state.last_eval_loss,
        best_step=state.best_step,
        tokens=state.tokens_seen,
        tokens_per_s=state.tokens_seen / state.train_s if state.train_s else 0.0,
        peak_bytes=meter.peak_bytes(),
        energy_j=state.energy_j or None,
        train_s=state.train_s,
        cuts=state.cuts,
        optimizer=optimizer_name,
        losses=[loss for loss, _ in losses],
    )


def _non_finite_step(
    job: TrainJob, step: int, loss: float, grad_norm: float, indices: Sequence[int]
) -> NonFiniteLossError:
    rows = ", ".join(job.place_of(index) for index in indices[:8])
    return NonFiniteLossError(
        given=f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; rows of this step: {rows}"
        f"{' ...' if len(indices) > 8 else ''}",
        allowed="finite numbers; the weights were not touched by this step and nothing of it was saved",
        do=f"lower learning_rate, look at those rows; {last_good(job.output)}",
    )


def _stopped(job: TrainJob, step: int, signal_number: int) -> StoppedBySignal:
    return StoppedBySignal(
        signal_number=signal_number,
        given=f"{signal.Signals(signal_number).name} after step {step}; saved {job.output / f'checkpoint-{step}'}",
        allowed="stopping at any time",
        do=f"go on with: {job.resume_command}",
    )
