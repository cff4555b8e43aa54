"""Several processes do what one does: the same losses, the same weights in each of them, one record.

One test goes through torchrun and the command line. The others fork this process, which has everything imported, and
let accelerate set up gloo between the children.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from thriftune.errors import InputError, NonFiniteLossError, RecipeError, StoppedBySignal
from thriftune.recipe import dump_yaml
from thriftune.train import TrainJob, train
from thriftune.train import distributed as distributed_module
from thriftune.train.distributed import Processes
from tiny import losses_of, metrics_of, record_of, tiny_model, tiny_recipe, tiny_rows, train_tiny

CPU = torch.device("cpu")
WAIT_S = 120
# AdamW divides a gradient by its own size; an epsilon well above rounding keeps noise from becoming a step.
SMOOTH = {"adam_epsilon": 1e-3}
ALONE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **SMOOTH}  # four rows a step
IN_TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, **SMOOTH}  # the same in two processes


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Nine rows: at four a step every third step has one row, and one process of two has none."""
    return tiny_rows(tmp_path_factory.mktemp("tiny") / "rows.jsonl", 9)


@pytest.fixture(scope="module")
def eval_rows(tmp_path_factory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("tiny") / "eval.jsonl", 5, seed=3)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def in_processes(world: int, work: Callable[[int], object]) -> None:
    """Run `work(rank)` in so many forked processes with torchrun's variables; all must come to its end."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    variables = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                AcceleratorState._reset_state(True)
                GradientState._reset_state()
                PartialState._reset_state()
                work(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    deadline, codes = time.monotonic() + WAIT_S, {}
    while len(codes) < world:
        for child in set(children) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline or any(codes.values()):
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[child] = "killed"
        time.sleep(0.01)
    assert set(codes.values()) == {0}, f"exit codes of the processes: {[codes[child] for child in children]}"


def train_and_keep_weights(recipe, folder: Path, rank: int) -> None:
    """The run as rank `rank`; what it ends with is written to `folder`/rank-N.safetensors."""
    import thriftune.run

    jobs: list[TrainJob] = []

    def watched(job, observers, stop):
        jobs.append(job)
        return train(job, observers, stop)

    thriftune.run.train = watched
    train_tiny(recipe)
    (job,) = jobs
    tensors = {name: value.detach() for name, value in job.model.named_parameters() if value.requires_grad}
    save_file({name: value.clone() for name, value in tensors.items()}, folder / f"rank-{rank}.safetensors")


def largest_difference(one: list[float], two: list[float]) -> float:
    assert len(one) == len(two) > 0
    return max(abs(first - second) for first, second in zip(one, two, strict=True))


def assert_same_numbers(one: Path, two: Path, tolerance: float = 1e-6) -> None:
    """Losses to the tolerance, counts exactly."""
    assert largest_difference(losses_of(one), losses_of(two)) < tolerance
    counts = [[(s.step, s.epoch, s.targets, s.tokens, s.tokens_seen) for s in metrics_of(run)] for run in (one, two)]
    assert counts[0] == counts[1]


def result_of(output: Path, method: str = "lora") -> dict[str, torch.Tensor]:
    return load_file(output / ("model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"))


# -- the command line under torchrun ----------------------------------------------------------------------------------


def test_torchrun_with_two_processes_equals_one(model, rows, eval_rows, tmp_path):
    """Steps of 4, 4 and 1 rows, evaluation and checkpoints in between; each number as one process finds it."""
    output = tmp_path / "two"
    recipe = tiny_recipe(
        model,
        rows,
        tmp_path / "one",
        data={"eval_path": str(eval_rows)},
        train={**ALONE, "max_steps": 7, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "epoch"},
    )
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe.replace(output=str(output), train=IN_TWO)))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *torchrun, "-m", "thriftune", "train", "--config", str(tmp_path / "recipe.yaml")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    train_tiny(recipe)
    assert_same_numbers(tmp_path / "one", output)
    one, two = (
        [step.eval_loss for step in metrics_of(run) if step.eval_loss is not None] for run in (tmp_path / "one", output)
    )
    assert largest_difference(one, two) < 1e-6
    # One record, printed once; one line of progress a step.
    printed = [line for line in done.stdout.splitlines() if line.strip()]
    assert len(printed) == 1 and json.loads(printed[0])["steps"] == 7
    assert json.loads(printed[0]) == json.loads(record_of(output).model_dump_json())
    assert done.stderr.count("step 7/7") == 1 and "Traceback" not in done.stderr
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 7
    folders = [sorted(path.name for path in run.glob("checkpoint-*")) for run in (tmp_path / "one", output)]
    assert folders[0] == folders[1] == ["checkpoint-6", "checkpoint-7"]
    for name, tensor in result_of(tmp_path / "one").items():
        torch.testing.assert_close(result_of(output)[name], tensor, rtol=0, atol=1e-6)


# -- runs in forked processes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_every_process_ends_with_the_same_weights(model, rows, tmp_path, method):
    rate = {"learning_rate": 2e-4} if method == "full" else {}
    train_tiny(tiny_recipe(model, rows, tmp_path / "one", method=method, train={**ALONE, **rate}))
    recipe = tiny_recipe(model, rows, tmp_path / "two", method=method, train={**IN_TWO, **rate})
    in_processes(2, lambda rank: train_and_keep_weights(recipe, tmp_path, rank))
    assert_same_numbers(tmp_path / "one", tmp_path / "two")
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = result_of(tmp_path / "one", method), result_of(tmp_path / "two", method)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ["off", "auto"])
def test_three_processes_share_steps_that_do_not_divide(model, rows, tmp_path, engine):
    """Six rows a step of nine: steps of six and of three; then two a step, of which one process has none."""
    for name, settings, world in (
        ("one", {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}, 1),
        ("three", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}, 3),
    ):
        recipe = tiny_recipe(model, rows, tmp_path / name, engine=engine, train=settings, data={"max_samples": 8})
        in_processes(world, lambda rank, recipe=recipe: train_and_keep_weights(recipe, tmp_path, rank))
    assert {step.tokens for step in metrics_of(tmp_path / "three")} != {metrics_of(tmp_path / "three")[0].tokens}
    assert_same_numbers(tmp_path / "one", tmp_path / "three")


def test_a_resumed_run_of_two_processes_equals_the_uninterrupted_one(model, rows, tmp_path):
    """One of the processes gets the signal; both stop after the same step and save once."""

    def stopped(rank: int) -> None:
        import thriftune.run

        def signalled(job, observers, stop):
            calls: list[int] = []

            def check(module, inputs) -> None:
                calls.append(1)
                if rank == 1 and len(calls) == 3:
                    os.kill(os.getpid(), signal.SIGTERM)

            job.model.get_input_embeddings().register_forward_pre_hook(check)
            return train(job, observers, stop)

        original = thriftune.run.train
        thriftune.run.train = signalled
        with pytest.raises(StoppedBySignal, match="SIGTERM after step") as caught:
            train_tiny(recipe)
        thriftune.run.train = original
        assert caught.value.exit_code == 143
        (tmp_path / f"stopped-{rank}").write_text(caught.value.given)

    dropout = {"dropout": 0.1}
    train_settings = {**IN_TWO, "max_steps": 8}
    whole = tiny_recipe(model, rows, tmp_path / "whole", train=train_settings, lora=dropout)
    recipe = whole.replace(output=str(tmp_path / "parts"))
    in_processes(2, lambda rank: train_tiny(whole))
    in_processes(2, stopped)
    assert (tmp_path / "stopped-0").read_text() == (tmp_path / "stopped-1").read_text()
    assert len(list((tmp_path / "parts").glob("checkpoint-*"))) == 1
    in_processes(2, lambda rank: train_tiny(recipe.replace(train={"resume_from_checkpoint": "auto"})))
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    assert record_of(tmp_path / "parts").status == "done"
    one, two = result_of(tmp_path / "parts"), result_of(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_goes_wrong_in_one_process_is_settled_in_all(model, rows, tmp_path):
    """Rank 1 runs out of memory at two rows and goes on with one; a NaN in rank 1 alone ends both, with one record."""

    def spoilt(rank: int, spoil: Callable[[int, nn.Module], None]) -> Callable:
        def run(job, observers, stop):
            job.model.get_input_embeddings().register_forward_hook(lambda *call: spoil(rank, call))
            return train(job, observers, stop)

        return run

    def full(rank: int, call) -> None:
        if rank == 1 and call[1][0].shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (test)")

    steps: list[int] = []

    def poison(rank: int, call):
        steps.append(1)
        return call[2] * float("nan") if rank == 1 and len(steps) == 2 else None

    def work(rank: int) -> None:
        import thriftune.run

        thriftune.run.train = spoilt(rank, full)
        train_tiny(tiny_recipe(model, rows, tmp_path / "full", train=IN_TWO))
        thriftune.run.train = spoilt(rank, poison)
        with pytest.raises(NonFiniteLossError, match="step 2: loss nan") as caught:
            train_tiny(tiny_recipe(model, rows, tmp_path / "poisoned", train=IN_TWO))
        assert caught.value.exit_code == 4

    train_tiny(tiny_recipe(model, rows, tmp_path / "one", train=ALONE))
    in_processes(2, work)
    assert_same_numbers(tmp_path / "one", tmp_path / "full")
    assert [step.step for step in metrics_of(tmp_path / "poisoned")] == [1]
    assert record_of(tmp_path / "poisoned").status == "failed"


# -- the sums between processes ---------------------------------------------------------------------------------------


def test_processes_that_planned_other_settings_are_refused(model, rows, tmp_path):
    """Machines of one run may have other memory free; all processes hear of it, and none trains."""

    def work(rank: int) -> None:
        switch = "on" if rank else "off"
        train = {**IN_TWO, "gradient_checkpointing": switch}
        with pytest.raises(InputError, match="1 of 2 processes planned other settings"):
            train_tiny(tiny_recipe(model, rows, tmp_path / "out", train=train))

    in_processes(2, work)
    assert not (tmp_path / "out").exists()


def test_sums_and_the_same_start(tmp_path, monkeypatch):
    """Buckets of ten elements: tensors of several sizes and both types fall into several, and come back in place."""
    monkeypatch.setattr(distributed_module, "BUCKET_ELEMENTS", 10)

    def parameters_of(rank: int) -> list[nn.Parameter]:
        shapes = [(3, 2), (4,), (1,), (5, 5), (2, 1), ()]
        kinds = [torch.float32, torch.float32, torch.float64, torch.float32, torch.float32, torch.float32]
        torch.manual_seed(rank)
        return [nn.Parameter(torch.randn(shape, dtype=kind)) for shape, kind in zip(shapes, kinds, strict=True)]

    def work(rank: int) -> None:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        processes = Processes(rank, 2, CPU)
        assert processes.is_main is (rank == 0)
        assert processes.total([rank + 1, 0.5, 2.0**40 + rank]) == [3.0, 1.0, 2.0**41 + 1]
        parameters = parameters_of(rank)
        processes.same_start(parameters)
        for mine, main in zip(parameters, parameters_of(0), strict=True):
            assert torch.equal(mine, main)
        for number, parameter in enumerate(parameters):
            if number != 3 or rank == 0:  # the fourth has a gradient in one process only
                parameter.grad = torch.full_like(parameter, 10.0 * number + rank + 1)
        parameters[1].grad = torch.arange(8.0)[::2] * (rank + 1)  # not contiguous
        processes.sum_gradients(parameters)
        for number, parameter in enumerate(parameters):
            wanted = {1: torch.arange(8.0)[::2] * 3, 3: torch.full((5, 5), 31.0)}
            expected = wanted.get(number, torch.full_like(parameter, 20.0 * number + 3))
            assert torch.equal(parameter.grad, expected), number
        processes.barrier()

    in_processes(2, work)


def test_one_process_needs_no_group():
    processes = Processes(0, 1, CPU)
    parameter = nn.Parameter(torch.zeros(2))
    processes.sum_gradients([parameter])
    processes.same_start([parameter])
    processes.barrier()
    assert parameter.grad is None and processes.total([1.5, 2]) == [1.5, 2]


def test_ranks_that_change_are_refused_in_every_process(model, rows, tmp_path):
    def refused(rank: int) -> None:
        with pytest.raises(RecipeError, match="method dynamic runs in one process"):
            train_tiny(tiny_recipe(model, rows, tmp_path / "run", method="dynamic", train=IN_TWO))

    in_processes(2, refused)
    assert not (tmp_path / "run" / "record.json").exists()
