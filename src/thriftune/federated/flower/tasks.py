"""Taking tasks from Flower and carrying bytes in its messages: what both ends share, and a machine's secret."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
from pathlib import Path
from typing import Any

from thriftune.errors import InputError, ThriftuneError
from thriftune.federated.folders import writing_to

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
POLL_S = 0.5
HEARTBEAT_S = 10.0


class TransportError(ThriftuneError):
    """Flower's processes, or the connection, ended or never came up."""


class Heartbeat:
    """Tells Flower that a task is being worked on. One that is missed is no error: the next may come through."""

    def __init__(self, client: Any) -> None:
        self._client, self._stopped = client, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        import httpx
        from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

        while not self._stopped.wait(HEARTBEAT_S):
            try:
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            except (httpx.HTTPError, RuntimeError):
                continue


def prepare(folder: Path) -> dict[str, str]:
    """Flower's settings for this process and those it starts. Raises InputError when Flower is not installed, and
    OutputError when `folder` cannot be written to."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    os.environ.update(
        FLWR_HOME=str(folder.absolute()),
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    )
    try:
        import flwr  # noqa: F401
    except ImportError:
        raise InputError(
            given="the package flwr is not installed",
            allowed="the extra federated, which brings Flower",
            do="pip install 'thriftune[federated]'",
        ) from None
    logging.getLogger("flwr").setLevel(logging.ERROR)
    return dict(os.environ)


def program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def new_secret(folder: Path) -> Path:
    path = folder / "secret"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(32))
    return path


def acquiring_client(address: str, authority: bytes | None, secret: Path) -> Any:
    """A client that may take tasks: Flower's SuperExec, which knows the machine's secret."""
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    guard = SuperExecAuthHttpInterceptor(master_secret=secret.read_bytes(), protected_methods=frozenset({ACQUIRE}))
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=authority is None,
        root_certificates=authority,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), guard],
    )


def client(address: str, authority: bytes | None, name: str, token: str) -> Any:
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=authority is None,
        root_certificates=authority,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=name), RuntimeTokenHttpInterceptor(token)],
    )


def acquire(client: Any, kind: str, run_id: int | None) -> str | None:
    """The token of a waiting task, or None. A task of a run that is not ours is left to expire."""
    from flwr.proto.runtime_pb2 import AcquireTaskRequest

    found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
    if not found.HasField("task") or not found.token or run_id not in (None, found.task.run_id):
        return None
    return str(found.token)


def content(data: bytes) -> Any:
    """Bytes as an array, which Flower sends in pieces however large it is."""
    import numpy as np
    from flwr.app import Array, ArrayRecord, RecordDict

    return RecordDict({"message": ArrayRecord({"bytes": Array(np.frombuffer(data, dtype=np.uint8))})})


def bytes_of(message: Any) -> bytes:
    data: bytes = message.content["message"]["bytes"].numpy().tobytes()
    return data
