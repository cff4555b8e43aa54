"""`python -m thriftune.federated.leash COMMAND...`: run a command that ends when whoever started it ends, however.

The starter holds the other end of standard input. When that closes, by `stop` or because the starter was killed, the
command is asked to end and, after a few seconds, made to. So no process of Flower outlives the verb that needed it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

ENDS_WITHIN_S = 4.0


class Leashed:
    """A command with its output in a file. `stop` may be called more than once."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        self._start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "thriftune.federated.leash", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C goes to the verb, which ends this
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def said(self) -> str:
        """All that it has written so far."""
        return self.log.read_bytes()[self._start :].decode("utf-8", errors="replace")

    def last_words(self) -> str:
        """Its last lines, for a message."""
        return " | ".join([line.strip() for line in self.said().splitlines() if line.strip()][-6:])


def main() -> None:
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: _end(process))
    threading.Thread(target=_end_with_standard_input, args=(process,), daemon=True).start()
    sys.exit(process.wait() % 256)


def _end_with_standard_input(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()


if __name__ == "__main__":
    main()
