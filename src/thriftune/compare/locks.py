"""Who works in a comparison's folder: one comparison at a time, and no child of an earlier one beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from thriftune.errors import InputError

COMPARISON = ".lock"
CHILDREN = ".cell.lock"


@contextmanager
def held_by_comparison(folder: Path) -> Iterator[None]:
    """Hold the folder until the process ends. Raises InputError when another comparison holds it."""
    with _flocked(folder / COMPARISON, exclusive=True, waits=False) as got:
        if not got:
            raise InputError(
                given=f"another comparison is running in {folder}",
                allowed="one at a time in a folder",
                do="wait for it, or name another --output",
            )
        yield


def held_by_children(folder: Path) -> AbstractContextManager[bool]:
    """Hold the folder as a child does, together with the others."""
    return _flocked(folder / CHILDREN, exclusive=False, waits=True)


def wait_for_orphans(folder: Path) -> None:
    """Until no child of a comparison that was killed is left: it may be saving, and it holds memory."""
    with _flocked(folder / CHILDREN, exclusive=True, waits=True):
        pass


@contextmanager
def _flocked(path: Path, *, exclusive: bool, waits: bool) -> Iterator[bool]:
    """Whether the lock was got. Always true where there is no fcntl: on Windows comparisons are not told apart."""
    try:
        import fcntl
    except ImportError:
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
