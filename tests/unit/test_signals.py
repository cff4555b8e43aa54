"""SIGINT and SIGTERM to a real process: it ends the step, saves, tells how to go on, and exits as the shell expects."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from thriftune.cli import main
from thriftune.train.checkpoint import find_checkpoint
from tiny import losses_of, metrics_of, numbers_of, record_of, tiny_model, tiny_recipe, tiny_rows, train_tiny

# Steps of 22 micro-batches, so that a signal arrives within one and long before the last.
LONG_STEPS = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 22, "max_steps": 15}
OPTIONS = [*(f"{key}={value}" for key, value in LONG_STEPS.items()), "lora_dropout=0.1", "save_strategy=no", "seed=7"]
WAIT_S = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny_rows(tmp_path_factory.mktemp("tiny") / "rows.jsonl", 22)


def started(model: Path, rows: Path, output: Path) -> subprocess.Popen:
    words = ["train", str(model), "--data", str(rows), "--method", "lora", "--output", str(output), *OPTIONS]
    return subprocess.Popen(
        [sys.executable, "-m", "thriftune", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def signal_when_training(processes: dict[signal.Signals, subprocess.Popen], folder: Path) -> None:
    """Each process gets its signal as soon as it has done two steps."""
    deadline = time.monotonic() + WAIT_S
    waiting = dict(processes)
    while waiting:
        for number, process in list(waiting.items()):
            assert process.poll() is None, process.communicate()
            if len(metrics_of(folder / number.name)) >= 2:
                process.send_signal(number)
                del waiting[number]
        assert time.monotonic() < deadline, "the runs have not come to their steps"
        time.sleep(0.02)


def test_a_signal_saves_tells_how_to_go_on_and_that_command_ends_as_if_nothing_had_been(
    model, rows, tmp_path, monkeypatch, capsys
):
    processes = {number: started(model, rows, tmp_path / number.name) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal_when_training(processes, tmp_path)
        told = {number: process.communicate(timeout=WAIT_S) for number, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    for number, process in processes.items():
        output, (standard_output, standard_error) = tmp_path / number.name, told[number]
        assert process.returncode == 128 + number
        found = find_checkpoint(output, "auto", pytest.fail)
        assert found is not None
        folder, state = found
        assert 2 < state.step < 15
        assert f"stopped: {number.name} after step {state.step}; saved {folder}" in standard_error
        assert "Traceback" not in standard_error and standard_output == ""
        record = record_of(output)
        assert (record.status, record.steps, record.adapter) == ("interrupted", state.step, None)
        assert [step.step for step in metrics_of(output)] == list(range(1, state.step + 1))
    # The command that was printed, word for word, against the run that nothing interrupted.
    (command,) = [line for line in told[signal.SIGTERM][1].splitlines() if "go on with: " in line]
    monkeypatch.setattr("sys.argv", shlex.split(command.partition("go on with: ")[2]))
    main_in_this_process()
    assert "done: lora, 15 steps" in capsys.readouterr().out
    train = {**LONG_STEPS, "learning_rate": None, "warmup_ratio": 0.03}
    lora = {"r": 16, "alpha": 32.0, "dropout": 0.1}
    more = {"lora": lora, "data": {"max_length": 1024}, "engine": "auto"}
    train_tiny(tiny_recipe(model, rows, tmp_path / "whole", train=train, **more))
    assert numbers_of(tmp_path / "SIGTERM") == numbers_of(tmp_path / "whole")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "SIGTERM" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def main_in_this_process() -> None:
    """The command line ends by SystemExit, with code 0 or None when all went well."""
    try:
        main()
    except SystemExit as end:
        assert not end.code


def test_outside_the_main_thread_a_run_leaves_signals_alone(model, rows, tmp_path):
    """Python delivers signals to the main thread only, and lets no other one set handlers."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            train_tiny(tiny_recipe(model, rows, tmp_path, train={"max_steps": 1}))
        except BaseException as error:
            errors.append(error)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == [] and len(losses_of(tmp_path)) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_signals_end_the_command_at_once_with_code_130(model, rows, tmp_path, monkeypatch, capsys):
    from thriftune.train import observe

    step = observe.MetricsFile.step

    def step_and_signals(self, metrics) -> None:
        step(self, metrics)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(observe.MetricsFile, "step", step_and_signals)
    command = f"thriftune train {model} --data {rows} --method lora --output {tmp_path / 'run'}"
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    told = capsys.readouterr().err
    assert "Traceback" not in told and "step 1/" in told and "step 2/" not in told
    assert find_checkpoint(tmp_path / "run", "auto", print) is None


def test_a_simulated_federation_keeps_its_rounds_and_goes_on(model, rows, tmp_path):
    words = ["simulate", str(model), "--data", str(rows), "--method", "lora", "--clients", "2", "--rounds", "40"]
    options = ["local_steps=1", "per_device_train_batch_size=1", "gradient_accumulation_steps=2", "--output", "fed"]
    command = [sys.executable, "-m", "thriftune", "federate", *words, *options]
    said = tmp_path / "said"
    with said.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=tmp_path)
    deadline = time.monotonic() + WAIT_S
    while "round 2/40" not in said.read_text(encoding="utf-8"):
        assert process.poll() is None and time.monotonic() < deadline, said.read_text(encoding="utf-8")
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 128 + signal.SIGTERM
    assert "stopped: SIGTERM; rounds that are done are kept" in said.read_text(encoding="utf-8")
    done = len(list((tmp_path / "fed" / "rounds").iterdir())) - 1
    assert 2 <= done < 40 and not (tmp_path / "fed" / "record.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=WAIT_S, check=True)
    assert f"going on after round {done}; the sites' optimizers start anew" in again.stderr
    assert "round 40/40: 2 of 2 sites" in again.stderr and f"round {done}/40" not in again.stderr
