"""Work in a process of its own, so that peaks, out of memory and crashes stay in it. No torch in this process.

On a CPU the processes are forked from a server that has imported the libraries and nothing else, which takes a tenth of
a second; beside a GPU each starts afresh, because CUDA does not survive a fork and some libraries ask it when they are
imported. A child leaves the terminal's session: Ctrl-C reaches the parent, which hands it on once. When the parent is
gone, however it went, the child saves what it can and ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from thriftune.catalog.gpus import local_gpus
from thriftune.errors import InputError, StoppedBySignal, ThriftuneError

PRELOADED = ["thriftune.compare.preloaded"]
ORPHAN_SAVES_WITHIN_S = 60.0
LOCK = ".lock"
CELL_LOCK = ".cell.lock"
KILLED = 9  # the signal that the system sends when memory runs out


@dataclass(frozen=True)
class Ended:
    """How a child ended: with a `value`, with an error of ours, killed by signal number `killed_by`, or with a bug of
    ours, whose last line is `crash`."""

    value: Any = None
    error: ThriftuneError | None = None
    killed_by: int = 0
    crash: str = ""


def value_of(ended: Ended) -> Any:
    """What a child returned. Raises its error; a child that died is an error too."""
    if ended.error is not None:
        raise ended.error
    if ended.killed_by or ended.crash:
        raise ChildError(
            given=f"the process ended: {ended.crash or f'killed by signal {ended.killed_by}'}",
            allowed="a process that comes to its end",
            do="look at what it printed above; signal 9 comes from the system when memory runs out",
        )
    return ended.value


class ChildError(ThriftuneError):
    """A child that planned or searched was killed or met a bug of ours."""


class Children:
    """Runs one child at a time. `stopped_by` is the signal that asked to stop, 0 before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._child: Any = None
        self.stopped_by = 0
        forks = "forkserver" in multiprocessing.get_all_start_methods() and not local_gpus()
        self._context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload(PRELOADED)

    def call(self, function: str, argument: Any) -> Ended:
        """`function(argument)` of thriftune.compare.cell in a child. Raises StoppedBySignal when one was asked for."""
        self.raise_if_stopped()
        reading, writing = self._context.Pipe(duplex=False)
        child = self._context.Process(target=_work, args=(function, argument, writing, str(self._folder)), daemon=False)
        self._child = child
        child.start()
        writing.close()
        if self.stopped_by:  # asked for while the child was started
            self._hand_on(self.stopped_by)
        ended = _received(reading, child)
        child.join()
        self._child = None
        reading.close()
        if ended is None:
            code = child.exitcode or 0
            ended = Ended(killed_by=-code) if code < 0 else Ended(crash=f"the process ended with exit code {code}")
        self.raise_if_stopped()
        return ended

    def raise_if_stopped(self) -> None:
        if self.stopped_by:
            raise StoppedBySignal(
                signal_number=self.stopped_by,
                given=f"{signal.Signals(self.stopped_by).name}; cells that are done are kept, and so are checkpoints",
                allowed="stopping at any time",
                do="give the same command again: it goes on with what is missing",
            )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """SIGINT and SIGTERM go to the child, which saves at the end of its step; a second one stops it at once."""

        def ask(number: int, _frame: Any) -> None:
            self.stopped_by = number
            self._hand_on(number)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hand_on(self, number: int) -> None:
        child = self._child
        if child is not None and child.pid is not None and child.exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(child.pid, number)


def _received(reading: Connection, child: Any) -> Ended | None:
    """What the child sent before it ended; None when it sent nothing."""
    while True:
        ready = wait([reading, child.sentinel])
        if reading in ready:
            try:
                found = reading.recv()
            except (EOFError, OSError):
                return None
            return found if isinstance(found, Ended) else None
        if child.sentinel in ready and not reading.poll():
            return None


def _work(function: str, argument: Any, writing: Connection, folder: str) -> None:
    """The child's main function."""
    with suppress(OSError, AttributeError):
        os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with locked(Path(folder) / CELL_LOCK, waits=True):  # an orphan of a killed comparison may still be saving
            from thriftune.compare import cell

            ended = Ended(value=getattr(cell, function)(argument))
    except ThriftuneError as error:
        ended = Ended(error=error)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        traceback.print_exc()
        last = (str(error).strip().splitlines() or [""])[0][:300]
        ended = Ended(crash=f"{type(error).__name__}: {last}")
    writing.send(ended)
    writing.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_SAVES_WITHIN_S)
    os._exit(1)


@contextmanager
def locked(path: Path, *, waits: bool) -> Iterator[None]:
    """Hold a lock that ends with the process. Raises InputError when another holds it and this one does not wait."""
    try:
        import fcntl
    except ImportError:  # Windows: two comparisons in one folder are not told apart there
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                given=f"another comparison is running in {path.parent}",
                allowed="one at a time in a folder",
                do="wait for it, or name another --output",
            ) from None
        yield
