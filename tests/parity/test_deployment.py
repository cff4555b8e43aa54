"""A federation between processes: Flower's SuperLink and SuperNodes over TLS, two sites, two rounds, the pocket model.

What goes wrong between machines (kills, restarts, poison, replays) is in benchmarks/federated/deployment.py.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from thriftune.federated.keys import make_keys
from thriftune.federated.records import FederatedRecord
from thriftune.records import read_record

pytest.importorskip("flwr", reason="Flower (the extra federated) is not installed")

ROUNDS = ["pocket", "method=lora", "lora.r=4", "local_steps=1", "federated.rounds=2", "quorum=1"]


def start(folder: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    """`thriftune federate ...` in the background, what it says in NAME.out."""
    command = [sys.executable, "-m", "thriftune", "federate", *words]
    with (folder / f"{name}.out").open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=dict(os.environ))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def flowers_in(folder: Path) -> list[str]:
    """Processes that were started with something of this folder on their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(folder) in line and "pytest" not in line:
            found.append(line)
    return found


@pytest.mark.timeout(180)
def test_two_sites_and_two_rounds_over_tls(tmp_path: Path) -> None:
    make_keys(tmp_path / "certs", ["a", "b"], ["localhost", "127.0.0.1"])
    server = f"127.0.0.1:{free_port()}"
    certificates = tmp_path / "certs"
    serving = start(
        tmp_path, "serve", "serve", *ROUNDS, "--certificates", str(certificates), "--port", server.rpartition(":")[2],
        "--ranks", "a=2", "--output", str(tmp_path / "fed"),
    )  # fmt: skip
    sites = [
        start(
            tmp_path, name, "join", *ROUNDS, "max_samples=16", "per_device_train_batch_size=2", "--data", "reviews",
            "--server", server,
            "--certificates", str(certificates / "sites" / name), "--output", str(tmp_path / name),
        )
        for name in ("a", "b")
    ]  # fmt: skip
    try:
        codes = [process.wait(150) for process in (serving, *sites)]
    finally:
        for process in (serving, *sites):
            process.terminate()
            process.wait(30)
    said = {name: (tmp_path / f"{name}.out").read_text(encoding="utf-8") for name in ("serve", "a", "b")}
    assert codes == [0, 0, 0], said
    record = read_record(tmp_path / "fed" / "record.json", FederatedRecord)
    assert record.transport == "flower" and [entry.updates for entry in record.rounds] == [2, 2]
    assert [site.rank for site in record.rounds[0].sites] == [2, 4]
    result = (tmp_path / "fed" / "adapter" / "adapter_model.safetensors").read_bytes()
    for name in ("a", "b"):
        assert (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() == result
        assert len((tmp_path / name / "sent.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    messages = sum(site.bytes_up for entry in record.rounds for site in entry.sites)
    assert messages == record.bytes_up <= record.meter["bytes_up"] < messages + 4 * 2000
    for entry in record.rounds:
        for way in ("bytes_up", "bytes_down"):
            counted, own = entry.meter[way], sum(getattr(site, way) for site in entry.sites)
            assert own <= counted < own + 2 * 2000, (entry.round, way)
    assert said["a"].count("path: ") == said["b"].count("path: ") == 1, "the model is loaded once for all rounds"
    assert not flowers_in(tmp_path), "no process outlives its verb"
