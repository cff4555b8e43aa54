"""Folders of a federation: what the system refuses to write there is told as our error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thriftune.errors import DiskFullError, OutputError
from thriftune.train.checkpoint import is_disk_full


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raises OutputError, or DiskFullError where there is no room, in the place of the system's own errors."""
    try:
        yield
    except OSError as error:
        given = f"{folder} cannot be written to: {error.strerror or error}"
        if is_disk_full(error):
            raise DiskFullError(
                given=given, allowed="a disk with room", do="free some and give the same command again"
            ) from None
        raise OutputError(
            given=given, allowed="a folder you may write to", do="name another --output, or mend that"
        ) from None
