"""A resumed run equals the uninterrupted one bit for bit, from whatever checkpoint is still good."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import modules as bnb_modules
from safetensors import SafetensorError
from safetensors.torch import load_file

from thriftune.errors import CheckpointError, DiskFullError, StoppedBySignal
from thriftune.methods.lora import LoraMethod
from thriftune.recipe import Recipe
from thriftune.records import RunRecord
from thriftune.train import TrainJob, train
from thriftune.train.checkpoint import find_checkpoint, verify_checkpoint
from tiny import (
    Watcher,
    losses_of,
    metrics_of,
    numbers_of,
    record_of,
    tiny_model,
    tiny_recipe,
    tiny_rows,
    train_tiny,
)

AUTO = {"resume_from_checkpoint": "auto"}
repacking_cpu = pytest.mark.skipif(
    not bnb_modules.has_avx512bf16(),
    reason="this CPU has no avx512_bf16, so bitsandbytes never repacks 4-bit weights here",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("tiny") / "rows.jsonl", 22)


@pytest.fixture(scope="module")
def eval_rows(tmp_path_factory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("tiny") / "eval.jsonl", 5, seed=3)


@pytest.fixture
def jobs(monkeypatch) -> list[TrainJob]:
    """The jobs of all runs from here on, with the models they trained."""
    found: list[TrainJob] = []

    def watched(job, observers, stop):
        found.append(job)
        return train(job, observers, stop)

    monkeypatch.setattr("thriftune.run.train", watched)
    return found


def signal_after(step: int, number: int = signal.SIGTERM) -> Watcher:
    """Sends this process a signal when the step's numbers are out: the loop ends the step after it and stops."""
    return Watcher(lambda metrics: os.kill(os.getpid(), number) if metrics.step == step else None)


def stopped(recipe: Recipe, step: int) -> None:
    """A run of the recipe that a signal stops after `step` steps."""
    with pytest.raises(StoppedBySignal) as caught:
        train_tiny(recipe, [signal_after(step - 1)])
    assert caught.value.exit_code == 143
    assert f"SIGTERM after step {step}; saved " in caught.value.given


def result_bytes(output: Path, method: str = "lora") -> bytes:
    name = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    return (output / name).read_bytes()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


# -- bit for bit ------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"dropout": 0.1}},
    "lora on bfloat16": {"lora": {"dropout": 0.1}, "dtype": "bfloat16"},
    "qlora": {"lora": {"dropout": 0.1}, "evaluate": True},
    "qlora on bfloat16": {"lora": {"dropout": 0.1}, "dtype": "bfloat16", "evaluate": True},
    "full": {"evaluate": True, "train": {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2}},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(model, rows, eval_rows, tmp_path, jobs, name):
    """Stopped twice, in the first epoch and in the second. `evaluate` puts an evaluation between the steps."""
    method, what = name.split()[0], RUNS[name]

    def recipe(output: str, **resume) -> Recipe:
        train = {"max_steps": 9, **what.get("train", {}), **resume}
        data = {}
        if what.get("evaluate"):
            train |= {"eval_strategy": "steps", "eval_steps": 1}
            data = {"eval_path": str(eval_rows)}
        lora = {"lora": what["lora"]} if "lora" in what else {}
        made = tiny_recipe(model, rows, tmp_path / output, method=method, train=train, data=data, **lora)
        return made.replace(model={"dtype": what.get("dtype", "float32")})

    whole_record = train_tiny(recipe("whole"))
    stopped(recipe("parts"), 3)
    stopped(recipe("parts", **AUTO), 7)
    record = train_tiny(recipe("parts", **AUTO))
    assert numbers_of(tmp_path / "parts") == numbers_of(tmp_path / "whole")
    assert result_bytes(tmp_path / "parts", method) == result_bytes(tmp_path / "whole", method)
    assert (record.loss, record.eval_loss, record.tokens) == (
        whole_record.loss,
        whole_record.eval_loss,
        whole_record.tokens,
    )
    resumed = [text for text in record.events if text.startswith("resumed")]
    assert resumed == [f"resumed from {tmp_path}/parts/checkpoint-{step} at step {step}" for step in (3, 7)]
    # What is trained and its moments are float32 from the start to the end, whatever the base is.
    for job in jobs:
        assert {parameter.dtype for parameter in job.trainable} == {torch.float32}
    for step in (3, 7):
        moments = load_file(tmp_path / "parts" / f"checkpoint-{step}" / "optimizer.safetensors")
        assert {tensor.dtype for tensor in moments.values()} == {torch.float32}
        assert len(moments) == 3 * len(jobs[0].trainable)


@repacking_cpu
def test_evaluation_between_the_steps_does_not_spoil_a_four_bit_base(model, rows, eval_rows, tmp_path, monkeypatch):
    """bitsandbytes reorders 4-bit weights at the first evaluation on such CPUs; gradients then come out wrong."""

    def losses(name: str, **train) -> list[float]:
        recipe = tiny_recipe(
            model, rows, tmp_path / name, method="qlora", train=train, data={"eval_path": str(eval_rows)}
        )
        train_tiny(recipe)
        return losses_of(tmp_path / name)

    without = losses("without", eval_strategy="no")
    assert losses("with", eval_strategy="steps", eval_steps=1) == without
    monkeypatch.setattr("thriftune.models.load.keep_four_bit_weights_as_they_are", lambda network: 0)
    spoilt = losses("spoilt", eval_strategy="steps", eval_steps=1)
    assert spoilt[0] == without[0]
    assert max(abs(one - two) for one, two in zip(spoilt, without, strict=True)) > 1e-3, "the trap is gone: drop this"


def test_other_micro_batches_after_the_resume_change_next_to_nothing(model, rows, tmp_path):
    train_tiny(tiny_recipe(model, rows, tmp_path / "whole"))
    stopped(tiny_recipe(model, rows, tmp_path / "parts"), 3)
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    train_tiny(tiny_recipe(model, rows, tmp_path / "parts", train={**AUTO, **cut}))
    pairs = zip(losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts"), strict=True)
    assert max(abs(one - two) for one, two in pairs) < 1e-6


def test_checkpointing_asked_for_at_the_resume_is_switched_on(model, rows, tmp_path, jobs):
    stopped(tiny_recipe(model, rows, tmp_path), 3)
    train_tiny(tiny_recipe(model, rows, tmp_path, train={**AUTO, "gradient_checkpointing": "on"}))
    assert jobs[1].model.get_base_model().is_gradient_checkpointing
    assert not jobs[0].model.get_base_model().is_gradient_checkpointing


def test_what_recovering_found_out_is_kept_over_a_resume(model, rows, tmp_path, monkeypatch):
    """Stopped after it went down to one row at once: the resumed run starts with one and need not find out again."""
    asked: list[int] = []

    def full_above_one_row(job, observers, stop):
        def check(module, inputs) -> None:
            asked.append(inputs[0].shape[0])
            if inputs[0].shape[0] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory (test)")

        job.model.get_input_embeddings().register_forward_pre_hook(check)
        return train(job, observers, stop)

    monkeypatch.setattr("thriftune.run.train", full_above_one_row)
    recipe = tiny_recipe(model, rows, tmp_path, train={"save_strategy": "steps", "save_steps": 2})
    stopped(recipe, 3)
    assert asked[:3] == [2, 1, 1]
    asked.clear()
    record = train_tiny(recipe.replace(train=AUTO))
    assert set(asked) == {1}
    said = "out of memory: 2 -> 1 rows at once, same step, same examples"
    assert record.events[0] == said and record.events.count(said) == 1
    assert [step.events for step in metrics_of(tmp_path)] == [[said], [], [], [], [], []]


# -- which checkpoint -------------------------------------------------------------------------------------------------

EVERY_TWO = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}


@pytest.fixture(scope="module")
def whole(model, rows, tmp_path_factory) -> Path:
    """A run of six steps with a checkpoint every two."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train_tiny(tiny_recipe(model, rows, output, train=EVERY_TWO))
    return output


@pytest.fixture
def interrupted(whole, tmp_path) -> Path:
    """The same run as it was after step 4: no later checkpoint, no result."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    for name in ("checkpoint-6", "adapter"):
        shutil.rmtree(output / name)
    return output


@pytest.fixture
def resume(model, rows) -> Callable[..., RunRecord]:
    def resume(output: Path, observers=(), **train) -> RunRecord:
        return train_tiny(tiny_recipe(model, rows, output, train={**EVERY_TWO, **AUTO, **train}), observers)

    return resume


WEIGHTS = "adapter_model.safetensors"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped byte": lambda folder: flip(folder / WEIGHTS),
    "truncated": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8]),
    "a missing file": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "not written to its end": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_ends_as_it_would_have(whole, interrupted, resume, name):
    DAMAGES[name](interrupted / "checkpoint-4")
    watcher = Watcher()
    record = resume(interrupted, [watcher])
    assert record.events[0].startswith(f"passed over {interrupted / 'checkpoint-4'}: ")
    assert record.events[1] == f"resumed from {interrupted / 'checkpoint-2'} at step 2"
    assert watcher.events[1:] == record.events and watcher.first_step == 2
    assert numbers_of(interrupted) == numbers_of(whole)
    assert result_bytes(interrupted) == result_bytes(whole)
    assert verify_checkpoint(interrupted / "checkpoint-4").step == 4, "it is replaced by a good one"


def test_with_a_limit_of_one_the_damaged_checkpoint_is_not_what_is_kept(interrupted, resume):
    """After step 3 is saved there are 2, 3 and the damaged 4. Kept must be 3, or a crash here would cost everything."""
    flip(interrupted / "checkpoint-4" / WEIGHTS)
    watcher = Watcher()
    watcher.event = lambda text: os.kill(os.getpid(), signal.SIGTERM) if text.startswith("resumed") else None
    with pytest.raises(StoppedBySignal, match="after step 3"):
        resume(interrupted, [watcher], save_total_limit=1)
    found = find_checkpoint(interrupted, "auto", lambda text: None)
    assert found is not None and found[1].step == 3
    assert not (interrupted / "checkpoint-2").exists()


def test_a_named_checkpoint_is_used_even_when_there_are_later_ones(whole, interrupted, resume):
    record = resume(interrupted, resume_from_checkpoint=str(interrupted / "checkpoint-2"))
    assert record.events == [f"resumed from {interrupted / 'checkpoint-2'} at step 2"]
    assert numbers_of(interrupted) == numbers_of(whole)
    assert result_bytes(interrupted) == result_bytes(whole)


def test_without_a_checkpoint_it_starts_afresh_and_says_so(whole, resume, tmp_path):
    record = resume(tmp_path / "new")
    assert record.events == [f"no checkpoint in {tmp_path / 'new'}: starting afresh"]
    assert numbers_of(tmp_path / "new") == numbers_of(whole)
    shutil.rmtree(tmp_path / "new" / "adapter")
    for folder in (tmp_path / "new").glob("checkpoint-*"):
        flip(folder / WEIGHTS)
    record = resume(tmp_path / "new")
    assert [text.split(":")[0] for text in record.events] == [
        *(f"passed over {tmp_path / 'new'}/checkpoint-{step}" for step in (6, 4, 2)),
        f"no checkpoint in {tmp_path / 'new'}",
    ]
    assert numbers_of(tmp_path / "new") == numbers_of(whole)
    assert result_bytes(tmp_path / "new") == result_bytes(whole)


def test_a_run_that_had_ended_is_only_put_out_again(whole, tmp_path, resume):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    watcher = Watcher()
    record = resume(tmp_path / "run", [watcher])
    assert watcher.steps == [] and (watcher.first_step, watcher.num_steps) == (6, 6)
    assert (record.status, record.steps, record.loss) == ("done", 6, metrics_of(whole)[-1].loss)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert result_bytes(tmp_path / "run") == result_bytes(whole)


def test_numbers_that_were_logged_after_the_checkpoint_are_not_there_twice(interrupted, resume, whole):
    """Step 5 and half a line of step 6 were written before the crash; the run goes on from step 4."""
    path = interrupted / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:40])
    resume(interrupted)
    assert [step.step for step in metrics_of(interrupted)] == [1, 2, 3, 4, 5, 6]
    assert numbers_of(interrupted) == numbers_of(whole)


def snapshot(output: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_a_named_checkpoint_that_is_damaged_is_refused_and_nothing_is_changed(interrupted, resume):
    flip(interrupted / "checkpoint-4" / WEIGHTS)
    before = snapshot(interrupted)
    for named, told in (("checkpoint-4", "size or hash differs"), ("checkpoint-5", "does not exist")):
        with pytest.raises(CheckpointError, match=told) as caught:
            resume(interrupted, resume_from_checkpoint=str(interrupted / named))
        assert caught.value.exit_code == 2
    assert snapshot(interrupted) == before


def test_a_checkpoint_that_points_outside_is_refused(interrupted, resume, tmp_path):
    folder = interrupted / "checkpoint-4"
    shutil.move(folder / WEIGHTS, tmp_path / "elsewhere.safetensors")
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace(WEIGHTS, "../../elsewhere.safetensors"))
    with pytest.raises(CheckpointError, match="not a plain file"):
        resume(interrupted, resume_from_checkpoint=str(folder))
    (folder / "manifest.json").write_text(manifest)
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="not a plain file"):
        resume(interrupted, resume_from_checkpoint=str(folder))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 8}, "seed was 7, is 8"),
    "rate": ({"train": {"learning_rate": 1e-3}}, "learning_rate was 0.01, is 0.001"),
    "schedule": ({"train": {"lr_scheduler_type": "cosine"}}, "lr_scheduler_type was 'linear', is 'cosine'"),
    "length": ({"train": {"max_steps": 12}}, "max_steps was 6, is 12"),
    "rows a step": ({"train": {"gradient_accumulation_steps": 4}}, "examples_per_step was 4, is 8"),
    "order": ({"data": {"shuffle": False}}, "shuffle was True, is False"),
    "rank": ({"lora": {"r": 8}}, "lora was"),
    "rows": ({"data": {"max_samples": 21}}, "data was"),
    "method": ({"method": "qlora"}, "method was 'lora', is 'qlora'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_changed(interrupted, model, rows, name):
    changes, told = OTHERS[name]
    before = snapshot(interrupted)
    recipe = tiny_recipe(model, rows, interrupted, train={**EVERY_TWO, **AUTO}).replace(**changes)
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        train_tiny(recipe)
    assert told in caught.value.given
    assert snapshot(interrupted) == before


def test_the_best_step_is_remembered_over_a_resume(model, rows, eval_rows, tmp_path):
    """The best step comes before the interruption, and the resumed run ends with it."""
    train = {"learning_rate": 0.05, "max_steps": 10, "eval_strategy": "steps", "eval_steps": 1}
    train |= {"load_best_model_at_end": True, "save_strategy": "epoch", "save_total_limit": 1}
    data = {"eval_path": str(eval_rows), "max_samples": 2}
    recipe = tiny_recipe(model, rows, tmp_path / "whole", train=train, data=data)
    whole = train_tiny(recipe)
    assert whole.best_step is not None and 1 < whole.best_step < 9, "the test needs a best step in between"
    parts = recipe.replace(output=str(tmp_path / "parts"))
    stopped(parts, whole.best_step + 1)
    record = train_tiny(parts.replace(train=AUTO))
    assert (record.best_step, record.eval_loss) == (whole.best_step, whole.eval_loss)
    assert result_bytes(tmp_path / "parts") == result_bytes(tmp_path / "whole")


# -- signals in this process ------------------------------------------------------------------------------------------


def test_a_signal_ends_the_step_saves_and_tells_how_to_go_on(model, rows, tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    watcher = signal_after(2, signal.SIGINT)
    with pytest.raises(StoppedBySignal) as caught:
        train_tiny(tiny_recipe(model, rows, tmp_path), [watcher])
    assert caught.value.exit_code == 130
    assert caught.value.given == f"SIGINT after step 3; saved {tmp_path / 'checkpoint-3'}"
    assert caught.value.do == "go on with: GO ON WITH THIS"
    assert verify_checkpoint(tmp_path / "checkpoint-3").step == 3
    assert {number: signal.getsignal(number) for number in before} == before
    record, last = record_of(tmp_path), metrics_of(tmp_path)[-1]
    assert (record.status, record.steps, record.tokens, record.adapter) == ("interrupted", 3, last.tokens_seen, None)
    assert (last.step, watcher.ended, watcher.folders) == (3, 1, [tmp_path / "checkpoint-3"])


def test_a_signal_in_the_middle_of_a_step_is_heard_at_its_end(model, rows, tmp_path, monkeypatch):
    def interrupted_in_forward(job, observers, stop):
        calls: list[int] = []

        def check(module, inputs) -> None:
            calls.append(1)
            if len(calls) == 3:  # the first of the two micro-batches of step 2
                os.kill(os.getpid(), signal.SIGTERM)

        job.model.get_input_embeddings().register_forward_pre_hook(check)
        return train(job, observers, stop)

    monkeypatch.setattr("thriftune.run.train", interrupted_in_forward)
    with pytest.raises(StoppedBySignal, match="SIGTERM after step 2"):
        train_tiny(tiny_recipe(model, rows, tmp_path))


def test_a_second_signal_ends_at_once_and_saves_nothing_more(model, rows, tmp_path):
    def twice(metrics) -> None:
        if metrics.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    watcher = Watcher(twice)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tiny_recipe(model, rows, tmp_path), [watcher])
    assert signal.getsignal(signal.SIGINT) is before
    assert watcher.ended == 1, "the progress line is taken off the terminal"
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_signal_in_the_last_step_lets_the_run_end(model, rows, tmp_path):
    record = train_tiny(tiny_recipe(model, rows, tmp_path), [signal_after(5)])
    assert (record.status, record.steps) == ("done", 6)
    assert (tmp_path / "adapter").is_dir()


# -- the result at the end --------------------------------------------------------------------------------------------


def test_no_room_for_the_result_costs_nothing_but_a_resume(whole, resume, tmp_path, monkeypatch):
    def export(self, network, loaded, folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    with monkeypatch.context() as patched:
        patched.setattr(LoraMethod, "export", export)
        with pytest.raises(DiskFullError, match="the result cannot be written") as caught:
            resume(tmp_path / "run")
    assert caught.value.do.endswith(str(tmp_path / "run" / "checkpoint-6"))
    assert not list((tmp_path / "run").glob("*adapter*"))
    resume(tmp_path / "run")
    assert result_bytes(tmp_path / "run") == result_bytes(whole)
