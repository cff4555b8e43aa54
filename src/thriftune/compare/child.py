"""Work in a process of its own, so that peaks, out of memory and crashes stay in it. No torch in this process.

On a CPU the processes are forked from a server that has imported the libraries and nothing else, which takes a tenth of
a second; beside a GPU each starts afresh, because CUDA does not survive a fork and some libraries ask it when they are
imported. A child leaves the terminal's session: Ctrl-C reaches the parent, which hands it on once. When the parent is
gone, however it went, the child saves what it can and ends.

Several children run at once in seats: each has a GPU, or a share of one, and its part of the processor's threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from thriftune.catalog.gpus import local_gpus
from thriftune.compare.locks import held_by_children
from thriftune.errors import StoppedBySignal, ThriftuneError, first_line

PRELOADED = ["thriftune.compare.preloaded"]
ORPHAN_SAVES_WITHIN_S = 60.0
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


@dataclass(frozen=True)
class Seat:
    """What a child gets of the machine. `device`: a GPU by the name that CUDA_VISIBLE_DEVICES takes, None for whatever
    this process sees. `threads`: of the processor, None for as many as the libraries take. `sharing`: other children
    that may use the same device at the same time."""

    device: str | None = None
    threads: int | None = None
    sharing: int = 0


@dataclass(frozen=True)
class Work:
    """`function(argument)` of thriftune.compare.cell. `key` tells the one who asked for it which it was."""

    key: Any
    function: str
    argument: Any


@dataclass(frozen=True)
class _Running:
    work: Work
    seat: Seat
    process: Any
    reading: Connection


def seats(at_once: int) -> tuple[Seat, ...]:
    """Places for so many children on this machine: its GPUs in turn, and equal parts of its threads.

    Someone who sets OMP_NUM_THREADS has said how many threads a child takes.
    """
    if at_once == 1:
        return (Seat(),)
    devices = [local.uuid or str(local.index) for local in local_gpus()]
    threads = None if "OMP_NUM_THREADS" in os.environ else max(1, (os.cpu_count() or 1) // at_once)
    if not devices:
        return tuple(Seat(None, threads, at_once - 1) for _ in range(at_once))
    turns = [number % len(devices) for number in range(at_once)]
    return tuple(Seat(devices[turn], threads, turns.count(turn) - 1) for turn in turns)


class Children:
    """Runs children, as many at once as there are seats. `stopped_by` is the signal that asked to stop, 0 before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[_Running] = []
        self.stopped_by = 0
        forks = "forkserver" in multiprocessing.get_all_start_methods() and not local_gpus()
        self._context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload(PRELOADED)

    def call(self, function: str, argument: Any) -> Ended:
        """One child alone. Raises StoppedBySignal when one was asked for."""
        waiting, found = [Work(None, function, argument)], []
        self.work_through(seats(1), lambda _: waiting.pop() if waiting else None, lambda _, ended: found.append(ended))
        return found[0]

    def work_through(
        self,
        places: Sequence[Seat],
        following: Callable[[Seat], Work | None],
        ended: Callable[[Work, Ended], None],
    ) -> None:
        """Keep every seat busy until there is no work and nobody works.

        Args:
            places: the seats.
            following: what to do next in this seat; None when there is nothing to start, now or ever. It is asked again
                after each end.
            ended: told of each end, in the order in which they come.

        Raises StoppedBySignal when one was asked for, and what the two functions raise; then the other children are
        asked to stop, and have ended.
        """
        free = list(places)
        try:
            while True:
                self.raise_if_stopped()
                while free and not self.stopped_by and (work := following(free[0])) is not None:
                    self._start(work, free.pop(0))
                if not self._running:
                    self.raise_if_stopped()
                    return
                one = self._next_to_end()
                how = self._collect(one)
                free.append(one.seat)
                self.raise_if_stopped()
                ended(one.work, how)
        finally:
            if not self.stopped_by:  # else they have been asked already
                self._hand_on(self._running, signal.SIGTERM)
            while self._running:
                self._collect(self._running[0])

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
        """SIGINT and SIGTERM go to the children, which save at the end of their step; a second one stops them at
        once."""

        def ask(number: int, _frame: Any) -> None:
            self.stopped_by = number
            self._hand_on(self._running, number)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(self, work: Work, seat: Seat) -> None:
        reading, writing = self._context.Pipe(duplex=False)
        arguments = (work.function, work.argument, seat, writing, str(self._folder))
        process = self._context.Process(target=_work, args=arguments, daemon=False)
        process.start()
        self._running.append(_Running(work, seat, process, reading))
        writing.close()
        if self.stopped_by:  # asked for while the child was started
            self._hand_on(self._running[-1:], self.stopped_by)

    def _next_to_end(self) -> _Running:
        """Whoever has something to tell, or has died."""
        ready = wait([*(one.reading for one in self._running), *(one.process.sentinel for one in self._running)])
        return next(one for one in self._running if one.reading in ready or one.process.sentinel in ready)

    def _collect(self, one: _Running) -> Ended:
        """Wait for the end of this child."""
        found = _received(one.reading, one.process)
        one.process.join()
        one.reading.close()
        self._running.remove(one)
        if found is not None:
            return found
        code = one.process.exitcode or 0
        return Ended(killed_by=-code) if code < 0 else Ended(crash=f"the process ended with exit code {code}")

    def _hand_on(self, running: Sequence[_Running], number: int) -> None:
        for one in running:
            if one.process.pid is not None and one.process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.kill(one.process.pid, number)


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


def _work(function: str, argument: Any, seat: Seat, writing: Connection, folder: str) -> None:
    """The child's main function."""
    with suppress(OSError, AttributeError):
        os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if seat.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = seat.device
    if seat.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(seat.threads)
    try:
        # Beside others of this comparison, but not beside an orphan of a killed one, which may still be saving.
        with held_by_children(Path(folder)):
            from thriftune.compare import cell

            ended = Ended(value=cell.work(function, argument, seat.threads))
    except ThriftuneError as error:
        ended = Ended(error=error)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        traceback.print_exc()
        ended = Ended(crash=f"{type(error).__name__}: {first_line(error)}")
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
