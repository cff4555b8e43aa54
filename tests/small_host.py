"""A computer with little memory, for tests of what is pinned."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest

from thriftune.engine import host_memory, hosted, shelf


@dataclass
class SmallHost:
    """A host of so many bytes beside what is left for the system; what is available falls with each block that is
    mapped, and rises again when nothing holds its pages."""

    bytes: int
    _pages: list[tuple[Any, int]] = field(default_factory=list)

    @property
    def mapped(self) -> int:
        return sum(size for pages, size in self._pages if pages() is not None)

    def available_bytes(self) -> int:
        return host_memory.LEFT_FOR_THE_SYSTEM + self.bytes - self.mapped

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (host_memory, hosted):
            monkeypatch.setattr(module, "available_bytes", self.available_bytes)
        pin = host_memory.pinned_block

        def pinned_block(size: int, *rest: Any) -> Any:
            block = pin(size, *rest)
            self._pages.append((weakref.ref(block._pages), size))
            return block

        for module in (hosted, shelf):
            monkeypatch.setattr(module, "pinned_block", pinned_block)


def disk_readers() -> int:
    """Threads that read layers ahead; those of a test that left one too, so compare with the number before."""
    return sum(thread.name == "disk reader" for thread in threading.enumerate())
