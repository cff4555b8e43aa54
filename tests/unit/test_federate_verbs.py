"""`federate simulate` and `federate keys`; `serve` and `join` run in tests/parity/test_deployment.py."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from command_line import Outcome, runner
from small_models import make_model
from thriftune.federated.coordinator import Coordinator
from thriftune.federated.records import FederatedRecord
from thriftune.records import read_record
from tiny import tiny_rows

ROUNDS = ["lora_r=4", "rounds=2", "local_steps=1", "per_device_train_batch_size=2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def simulate(monkeypatch, capsys, tmp_path, base):
    monkeypatch.chdir(tmp_path)
    tiny_rows(tmp_path / "rows.jsonl", 40)
    run = runner(monkeypatch, capsys)

    def of(*words: object) -> Outcome:
        return run(
            "federate", "simulate", base, "--data", "rows.jsonl", "--method", "lora", *ROUNDS, "-o", "fed", *words
        )

    return of


def test_a_simulation_prints_its_rounds_and_leaves_a_folder_that_opens_like_a_runs(simulate, monkeypatch, capsys):
    done = simulate("--clients", 3, "--ranks", "2,4", "--json").ok()
    assert done.json["transport"] == "simulated" and list(done.json["sites"].values()) == [2, 4, 2]
    assert done.json["recipe"]["federated"]["rounds"] == 2
    assert "site-1: 14 rows, rank 2" in done.err
    up, down = (sum(site[key] for site in done.json["rounds"][1]["sites"]) for key in ("bytes_up", "bytes_down"))
    told = r"^round 2/2: 3 of 3 sites, loss [\d.]+ to [\d.]+, "
    assert re.search(rf"{told}{up:,} bytes up, {down:,} down", done.err, re.MULTILINE)
    assert read_record(Path("fed/record.json"), FederatedRecord).bytes_up == done.json["bytes_up"] > 0
    evaluate = ["eval", "fed", "--task", "exact:completion", "--data", "rows.jsonl", "--limit", 2, "max_new_tokens=4"]
    runner(monkeypatch, capsys)(*evaluate).ok()


def test_given_again_a_finished_simulation_has_nothing_to_do(simulate):
    first = simulate("--clients", 2, "--json").ok().json
    again = simulate("--clients", 2, "--json").ok()
    assert "round 1/2" not in again.err and "all 2 rounds are done already" in again.err
    assert again.json == first, "with the time it took then"
    assert first["split"] == "even"
    simulate("--clients", 3).refused("fed holds rounds of other sites or ranks")
    simulate("--clients", 2, "--ranks", "2,4").refused("fed holds rounds of other sites or ranks")
    simulate("--clients", 2, "lora_alpha=3").refused("fed holds rounds of another recipe")
    simulate("--clients", 2, "--split", "by:prompt").refused("another --split (even, not by:prompt)")
    tiny_rows(Path("rows.jsonl"), 40, seed=1)
    simulate("--clients", 2).refused("fed holds rounds of other rows")


@pytest.mark.parametrize("named", [[], ["-o", "mine"]])
def test_a_simulation_that_was_stopped_says_how_to_go_on(simulate, monkeypatch, capsys, base, named):
    """Without --output the same command would begin in a folder of its own."""
    run, close = runner(monkeypatch, capsys), Coordinator.close
    words = ["federate", "simulate", base, "--data", "rows.jsonl", "--method", "lora", *ROUNDS, "--clients", 2]

    def close_and_stop(*arguments):
        close(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as once:
        once.setattr(Coordinator, "close", close_and_stop)
        told = run(*words, *named).refused("rounds that are done are kept", code=143)
    assert ("give the same command again: it goes on" in told) == bool(named)
    folder = named or ["--output", re.search(r"with --output (runs/\S+): it goes on", told)[1]]
    assert "going on after round 1" in run(*words, *folder).ok().err


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["--split", "odd"], "--split odd"),
        (["--split", "dirichlet:0.3"], "column 'label'"),
        (["--clients", "9"], "40 rows for 9 sites"),
        (["--ranks", "4,x"], "--ranks 4,x"),
        (["--ranks", "8"], "a site of rank 8, and lora.r 4"),
        (["--ranks", "2,4", "aggregation=ffa"], "aggregation ffa"),
        (["max_steps=6"], "train.max_steps=6: a site makes federated.rounds x federated.local_steps = 2 steps"),
        (["epochs=3"], "train.num_train_epochs=3: a site makes"),
        (["clip_norm=1.0"], "use federated.aggregation rolora or ffa"),
        *(
            ([f"lora.init_lora_weights={start}"], "use true, gaussian or orthogonal")
            for start in ("pissa", "mica", "olora", "eva", "false")
        ),
        (["lora.use_dora=true"], "an adapter that sites cannot share"),
        (["lora.modules_to_save=lm_head"], "an adapter that sites cannot share"),
    ],
)
def test_what_cannot_be_simulated(simulate, words, given):
    simulate(*words).refused(given)
    assert not Path("fed/adapter").exists()


def test_keys_are_made_and_named(monkeypatch, capsys, tmp_path):
    pytest.importorskip("cryptography", reason="cryptography (the extra federated) is not installed")
    run = runner(monkeypatch, capsys)
    done = run("federate", "keys", "--sites", "a,b", "--hosts", "hub.example.org", "-o", tmp_path / "certs").ok()
    assert done.out.count("private: ") == 4
    run("federate", "keys", "--sites", "a,b", "-o", tmp_path / "certs").refused("holds keys already")


def test_ends_without_their_keys_are_refused(monkeypatch, capsys, tmp_path, base):
    run = runner(monkeypatch, capsys)
    run("federate", "serve", base, "--certificates", tmp_path).refused("lacks the coordinator's certificate")
    run("federate", "join", base, "--certificates", tmp_path, "--server", "localhost:1").refused("has no key")
    run("federate", "serve", base, "--certificates", tmp_path, "--ranks", "a=0").refused("--ranks a=0")
    run("federate", "keys", "--sites", "a,b", "-o", tmp_path / "certs").ok()
    for others in ("certs", "certs/coordinator"):
        of_others = ["--certificates", tmp_path / others, "--server", "localhost:1"]
        run("federate", "join", base, *of_others).refused("not of a site", "CERTS/sites/NAME")
    for server in ("localhost", ":8000", "localhost:x", "localhost:99999"):
        of_a = ["--certificates", tmp_path / "certs" / "sites" / "a", "--server", server]
        run("federate", "join", base, *of_a).refused(f"--server {server}", "HOST:PORT")
    words = ["--certificates", tmp_path / "certs", "--ranks", "a=4,c=4", "-o", tmp_path / "fed"]
    run("federate", "serve", base, *words).refused("--ranks names c", "the sites a, b")


def test_the_steps_of_all_rounds_may_be_written_out(simulate):
    """So the recipe that a federation leaves can be given again, with the epochs and steps that it has."""
    first = simulate("--clients", 2, "max_steps=2", "epochs=3", "--json").ok().json
    again = simulate("--clients", 2, "--config", "fed/recipe.yaml", "--json").ok()
    assert "are done already" in again.err and again.json == first


@pytest.mark.parametrize("place", ["/dev/null/x", "rows.jsonl"])
def test_places_that_cannot_be_written_to(simulate, monkeypatch, capsys, base, place):
    pytest.importorskip("cryptography", reason="cryptography (the extra federated) is not installed")
    simulate("-o", place).refused(f"{place} cannot be written to", "a folder you may write to")
    run = runner(monkeypatch, capsys)
    run("federate", "keys", "--sites", "a", "-o", place).refused(f"{place} cannot be written to")
    run("federate", "keys", "--sites", "a", "-o", "certs").ok()
    run("federate", "serve", base, "--certificates", "certs", "-o", place).refused(f"{place} cannot be written to")
    joining = ["--data", "rows.jsonl", "--server", "localhost:1", "--certificates", "certs/sites/a", "-o", place]
    run("federate", "join", base, *joining).refused(f"{place} cannot be written to")


def test_with_noise_the_privacy_loss_is_told(simulate):
    pytest.importorskip("dp_accounting", reason="dp-accounting (the extra federated) is not installed")
    words = ["--clients", 3, "aggregation=ffa", "clip_norm=0.1", "noise_multiplier=4"]
    told = simulate(*words, "--json").ok().json
    assert 0.0 < told["epsilon"] < 2.0
    assert [site["loss"] for site in told["rounds"][0]["sites"]] == [None] * 3


def test_noise_whose_privacy_loss_cannot_be_told_is_refused_before_a_round(simulate, monkeypatch, capsys, base):
    pytest.importorskip("cryptography", reason="cryptography (the extra federated) is not installed")
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    words = ["aggregation=ffa", "clip_norm=0.1", "noise_multiplier=4"]
    simulate("--clients", 2, *words).refused("dp-accounting is not installed")
    run = runner(monkeypatch, capsys)
    run("federate", "keys", "--sites", "a", "-o", "certs").ok()
    serving = ["federate", "serve", base, "--certificates", "certs", "-o", "fed", *words]
    run(*serving).refused("dp-accounting is not installed")
    assert not Path("fed").exists()
