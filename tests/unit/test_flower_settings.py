"""What Flower does by itself is off where its processes run: reports of use, the check for updates, installing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower (the extra federated) is not installed")

# In a process of its own: Flower reads its settings when it is imported. With `no`, without ours: the control.
SCRIPT = """
import socket, sys, threading
from pathlib import Path

asked = []
def refuse(*address, **_):
    asked.append(address)
    raise OSError("no network here")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
if sys.argv[1] == "ours":
    from thriftune.federated.flower.tasks import prepare
    prepare(Path(sys.argv[2]))
from flwr.supercore import telemetry, update_check
from importlib import import_module
telemetry.create_event(telemetry.EventType.PING, None)
update_check.warn_if_flwr_update_available("flower-superlink")
for thread in threading.enumerate():
    if thread is not threading.current_thread() and not thread.daemon:
        thread.join()
print(len(asked) > 0, import_module("flwr.superlink.cli.flower_superlink")._runtime_dependency_install_default())
"""


@pytest.mark.parametrize(("whose", "told"), [("ours", "False False"), ("Flower's", "True True")])
def test_nothing_is_reported_looked_up_or_installed(tmp_path: Path, whose: str, told: str) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, whose, str(tmp_path / "flower")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
        check=False,
    )
    assert done.stdout.strip().splitlines()[-1:] == [told], done.stderr
