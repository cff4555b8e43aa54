"""A site's end: a SuperNode, started again when it ends, and the tasks that come through it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from thriftune.errors import InputError
from thriftune.federated.flower.tasks import (
    POLL_S,
    Heartbeat,
    TransportError,
    acquire,
    acquiring_client,
    bytes_of,
    client,
    content,
    new_secret,
    prepare,
    program,
)
from thriftune.federated.keys import SiteKeys
from thriftune.federated.leash import Leashed

SITE_TASK = "flwr-clientapp"
LET_IN = "SuperNode ID:"  # what a SuperNode writes when the coordinator has let it in
NOT_LET_IN = "Exit Code: 305"  # and when it refuses
TRIES = 5
FIRST_TOLD_S = 10.0  # without having been let in, after which that is said
TOLD_AGAIN_S = 60.0


class SiteLink:
    """The SuperNode of a site, and the tasks that come through it. It is started again when it ends."""

    def __init__(self, keys: SiteKeys, server: str, folder: Path, say: Callable[[str], None]) -> None:
        self._say = say
        self._environment = prepare(folder)
        self._keys, self._server, self._folder = keys, server, folder
        self._secret = new_secret(folder)
        self._refusals = 0
        self._was_in = False
        self._tells_at = time.monotonic() + FIRST_TOLD_S
        self._start()

    def wait(self) -> Task:
        """The next message for this site. Raises InputError when the coordinator does not let it in."""
        import httpx

        while True:
            self._keep_alive()
            self._tell_when_not_in()
            try:
                token = acquire(self._client, SITE_TASK, None)
                if token is not None:
                    return Task(self._address, token)
            except httpx.TransportError:
                pass  # the SuperNode is starting
            except TransportError as error:
                self._say(f"{error.given}; {error.do}")
            time.sleep(POLL_S)

    def close(self) -> None:
        self._client.close()
        self._process.stop()

    def __enter__(self) -> SiteLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        self._address = f"127.0.0.1:{free_port()}"
        command = [
            *(program("flower-supernode"), "--isolation", "process", "--superlink", self._server),
            *("--root-certificates", str(self._keys.authority), "--auth-supernode-private-key", str(self._keys.key)),
            *("--host", "127.0.0.1", "--port", self._address.rpartition(":")[2]),
            *("--superexec-auth-secret-file", str(self._secret)),
        ]
        self._process = Leashed(command, self._environment, self._folder / "supernode.log")
        self._client = acquiring_client(self._address, None, self._secret)

    def _keep_alive(self) -> None:
        if self._process.exit_code is None:
            return
        said = self._process.said()
        self._was_in = self._was_in or LET_IN in said
        self._refusals += NOT_LET_IN in said
        if self._refusals >= TRIES and not self._was_in:
            raise InputError(
                given=f"the coordinator at {self._server} does not let site {self._keys.site} in: "
                f"{said.partition(NOT_LET_IN)[2].strip().partition('For more')[0].strip()}",
                allowed="a site whose public key the coordinator has, and a coordinator with a certificate of the same "
                "authority",
                do="take the folder that federate keys made for this site together with the coordinator's",
            )
        self._client.close()
        time.sleep(POLL_S * 2)
        self._start()

    def _tell_when_not_in(self) -> None:
        """Say now and then that the coordinator has not let this site in yet; a SuperNode tries on in silence."""
        self._was_in = self._was_in or LET_IN in self._process.said()
        if self._was_in or time.monotonic() < self._tells_at:
            return
        self._say(f"no connection yet to the coordinator at {self._server}; trying on ({self._process.log} says more)")
        self._tells_at = time.monotonic() + TOLD_AGAIN_S


class Task:
    """One message for this site. Exactly one of `reply` and `fail` ends it; the heart beats until then."""

    def __init__(self, address: str, token: str) -> None:
        """Raises TransportError when the message cannot be had."""
        import httpx
        from flwr.supernode.runtime.run_clientapp import pull_task_input

        self._client = client(address, None, "flwr-clientapp", token)
        try:
            self._message, self._context, _, _ = pull_task_input(self._client)
            self.data: bytes = bytes_of(self._message)
        except (httpx.HTTPError, RuntimeError, KeyError, ValueError) as error:
            self._client.close()
            raise TransportError(
                given=f"a message that cannot be had: {error}",
                allowed="a connection that lasts as long as a message",
                do="nothing: the coordinator goes on without it, and asks again in the next round",
            ) from None
        self._beat = Heartbeat(self._client)

    def reply(self, data: bytes) -> None:
        self._end(content(data))

    def fail(self, text: str) -> None:
        from flwr.app import ConfigRecord, RecordDict

        self._end(RecordDict({"error": ConfigRecord({"text": text})}))

    def _end(self, content: Any) -> None:
        """Raises TransportError when the SuperNode that the message came through is gone."""
        import httpx
        from flwr.app import Message
        from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

        try:
            push_message(self._client, Message(content, reply_to=self._message), self._context)
            push_task_output(self._client, self._context, "completed", "")
        except (httpx.HTTPError, RuntimeError) as error:
            raise TransportError(
                given=f"the answer could not be handed over: {error}",
                allowed="a connection that lasts as long as a round",
                do="nothing: the coordinator goes on without it, and asks again in the next round",
            ) from None
        finally:
            self._beat.stop()
            self._client.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
