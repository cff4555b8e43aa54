"""The coordinator's end: a SuperLink, the sites' keys, and one run as whose app this process acts."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from thriftune.federated.flower.tasks import (
    POLL_S,
    Heartbeat,
    TransportError,
    acquire,
    acquiring_client,
    bytes_of,
    content,
    new_secret,
    prepare,
    program,
)
from thriftune.federated.keys import CoordinatorKeys
from thriftune.federated.leash import Leashed

COORDINATOR_TASK = "flwr-serverapp"
ANSWERED_WITHIN_S = 0.2
ANSWERS_WITHIN_S = 60.0
EMPTY_APP = {
    "pyproject.toml": b"""[project]
name = "thriftune-federation"
version = "1.0.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41"]
[tool.flwr.app]
publisher = "thriftune"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "empty:app"
clientapp = "empty:app"
""",
    "LICENSE": b"Apache-2.0\n",
    "empty.py": b"app = None\n",
}


@dataclass(frozen=True)
class Reply:
    """What a site sent back; `error` is a text when it could not."""

    site: str
    data: bytes
    error: str


class Pull:
    """The question whether a message has its reply, in a thread of its own: for one whose sender ended while it sent it
    Flower waits up to two hours, and other sites go on meanwhile."""

    def __init__(self, grid: Any, message: str) -> None:
        self._ended = threading.Event()
        self._found: list[Any] = []
        self._error: Exception | None = None
        threading.Thread(target=self._ask, args=(grid, message), daemon=True).start()

    def _ask(self, grid: Any, message: str) -> None:
        try:
            self._found = list(grid.pull_messages([message]))
        except Exception as error:  # raised where it is asked for
            self._error = error
        self._ended.set()

    def has_ended(self) -> bool:
        """Waits a moment for it: most questions are answered at once."""
        return self._ended.wait(ANSWERED_WITHIN_S)

    def found(self) -> list[Any]:
        """The reply, or nothing; to be asked when it has ended."""
        if self._error is not None:
            raise self._error
        return self._found


class CoordinatorLink:
    """The SuperLink, the sites' keys registered with it, and one run, as whose app this process acts."""

    def __init__(self, keys: CoordinatorKeys, host: str, port: int, folder: Path) -> None:
        environment = prepare(folder)
        self._authority = keys.authority.read_bytes()
        self._address = f"{'127.0.0.1' if host in ('0.0.0.0', '') else host}:{port}"
        self._secret = new_secret(folder)
        self._clients: list[Any] = []
        self._beat: Heartbeat | None = None
        command = [
            *(program("flower-superlink"), "--isolation", "process", "--enable-supernode-auth"),
            *("--ssl-certfile", str(keys.certificate), "--ssl-keyfile", str(keys.key)),
            *("--ssl-ca-certfile", str(keys.authority), "--host", host, "--port", str(port)),
            *("--superexec-auth-secret-file", str(self._secret), "--disable-runtime-dependency-installation"),
        ]
        self._process = Leashed(command, environment, folder / "superlink.log")
        try:
            self._control = self._control_client()
            self._sites = self._register(keys.sites)
            self._run_id = self._start_run()
            self._grid, self._context = self._become_the_app()
        except BaseException:
            self.close()
            raise
        self._waiting: dict[str, tuple[str, str]] = {}  # message -> its site, and since when that was connected then
        self._pulls: dict[str, Pull] = {}  # message -> the question for its reply that is on its way

    def online(self) -> set[str]:
        """The sites that are connected now."""
        self._check()
        return {self._sites[node.node_id] for node in self._grid.get_nodes() if node.node_id in self._sites}

    def send(self, site: str, data: bytes) -> None:
        from flwr.app import Message

        node = next(number for number, name in self._sites.items() if name == site)
        connected = self._connected_since()[site]
        (message,) = self._grid.push_messages([Message(content(data), node, "train")])
        self._waiting[message] = (site, connected)

    def receive(self) -> list[Reply]:
        """The replies that have come since; none is a list without an entry. A site that was gone in between has lost
        its message, which is a failure too."""
        self._check()
        if not self._waiting:
            return []
        for message in self._waiting.keys() - self._pulls.keys():
            self._pulls[message] = Pull(self._grid, message)
        found = []
        for message, pull in [(message, pull) for message, pull in self._pulls.items() if pull.has_ended()]:
            del self._pulls[message]
            for said in pull.found()[:1]:
                site, _ = self._waiting.pop(message)
                found.append(reply(site, said))
        now = self._connected_since()
        for lost in [message for message, (site, connected) in self._waiting.items() if now[site] != connected]:
            site, _ = self._waiting.pop(lost)
            self._pulls.pop(lost, None)
            found.append(Reply(site, b"", f"site {site} was gone before it answered"))
        return found

    def owing(self) -> set[str]:
        """The sites that have been sent something and have not answered."""
        return {site for site, _ in self._waiting.values()}

    def forget(self) -> None:
        """Wait no longer for what was sent."""
        self._waiting.clear()
        self._pulls.clear()

    def traffic(self) -> dict[str, int]:
        """Bytes of messages as Flower counts them: sent by the coordinator, received by it."""
        from flwr.proto.control_pb2 import ListRunsRequest

        run = self._control.ListRuns(ListRunsRequest()).run_dict[self._run_id]
        return {"bytes_down": int(run.bytes_sent), "bytes_up": int(run.bytes_recv)}

    def close(self) -> None:
        if self._beat is not None:
            self._beat.stop()
        for client in self._clients:
            client.close()
        self._process.stop()

    def __enter__(self) -> CoordinatorLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connected_since(self) -> dict[str, str]:
        """When each site was last let in, in Flower's words; they change when it comes again."""
        from flwr.proto.control_pb2 import ListNodesRequest

        nodes = self._control.ListNodes(ListNodesRequest()).nodes_info
        return {self._sites[node.node_id]: node.last_activated_at for node in nodes if node.node_id in self._sites}

    def _check(self) -> None:
        if self._process.exit_code is not None:
            raise TransportError(
                given=f"Flower's SuperLink ended: {self._process.last_words()}",
                allowed="a SuperLink that runs as long as the federation",
                do=f"look at {self._process.log}; is {self._address} taken by another program?",
            )

    def _control_client(self) -> Any:
        """Wait until the SuperLink answers."""
        import httpx
        from flwr.proto.control_pb2 import ListNodesRequest
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        client = ControlHttpClient.from_server_address(
            server_address=self._address,
            insecure=False,
            root_certificates=self._authority,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr")],
        )
        self._clients.append(client)
        ends = time.monotonic() + ANSWERS_WITHIN_S
        while True:
            self._check()
            try:
                client.ListNodes(ListNodesRequest())
                return client
            except httpx.TransportError as error:
                if time.monotonic() > ends:
                    raise TransportError(
                        given=f"Flower's SuperLink does not answer at {self._address}: {error}",
                        allowed=f"an answer within {ANSWERS_WITHIN_S:g} s",
                        do=f"look at {self._process.log}; the certificate must name this host (federate keys --hosts)",
                    ) from None
            time.sleep(POLL_S / 2)

    def _register(self, sites: Mapping[str, Path]) -> dict[int, str]:
        from flwr.cli.supernode.register import try_load_public_key
        from flwr.proto.control_pb2 import RegisterNodeRequest

        found = {}
        for site, path in sites.items():
            request = RegisterNodeRequest(public_key=try_load_public_key(path), name=site)
            found[int(self._control.RegisterNode(request).node_id)] = site
        return found

    def _start_run(self) -> int:
        from flwr.cli.build import build_fab_from_files
        from flwr.common.serde import fab_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        content, _ = build_fab_from_files(EMPTY_APP)
        bundle = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
        return int(self._control.StartRun(StartRunRequest(fab=bundle)).run_id)

    def _become_the_app(self) -> tuple[Any, Any]:
        """Take the run's task, as Flower's own process for it would, and the grid that sends messages for it."""
        from flwr.common.serde import run_from_proto
        from flwr.proto.runtime_pb2 import PullTaskInputRequest
        from flwr.supercore.task_identity import TaskIdentity
        from flwr.superlink.grid.http_grid import HttpGrid

        client = acquiring_client(self._address, self._authority, self._secret)
        self._clients.append(client)
        while (token := acquire(client, COORDINATOR_TASK, self._run_id)) is None:
            self._check()
            time.sleep(POLL_S / 5)
        grid = HttpGrid(
            runtime_api_address=self._address, insecure=False, root_certificates=self._authority, token=token
        )
        self._clients.append(grid)
        task = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        grid.set_run(run_from_proto(task.run))
        self._beat = Heartbeat(grid._runtime_client)
        return grid, task.context


def reply(site: str, message: Any) -> Reply:
    """What a site's message says, or why it says nothing that can be used. Never raises."""
    try:
        if message.has_error():
            return Reply(site, b"", f"site {site}: {message.error.reason}")
        if "error" in message.content:
            return Reply(site, b"", f"site {site}: {message.content['error']['text']}")
        return Reply(site, bytes_of(message), "")
    except Exception as error:  # whatever a site sends, and however Flower fails at it, the others go on
        return Reply(site, b"", f"site {site} sent something that is no message: {type(error).__name__}: {error}")
