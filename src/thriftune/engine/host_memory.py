"""Pinned host memory of exactly the size asked for, or a refusal that says what is missing.

PyTorch's own allocator of pinned memory rounds each block up to a power of two; here pages are mapped and registered
with the driver as they are. A copy from memory that is not pinned would run, many times slower and not beside
computation, so nothing here falls back to it.
"""

from __future__ import annotations

import mmap
import resource
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from thriftune.errors import DoesNotFitError
from thriftune.units import format_bytes

LEFT_FOR_THE_SYSTEM = 1024**3
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class _Pages(mmap.mmap):
    """Pages which the driver forgets before the system gets them back. Where it did not, whatever is mapped at the same
    address later would be refused as registered already. A tensor over the pages keeps them."""

    registered: tuple[int, torch.device] | None = None

    def forget(self) -> None:
        if self.registered is not None:
            address, device = self.registered
            self.registered = None
            torch.cuda.synchronize(device)  # a copy may still read them
            torch.cuda.cudart().cudaHostUnregister(address)

    def __del__(self) -> None:
        with suppress(RuntimeError):  # of a device that has failed, or at the end of the process
            self.forget()


@dataclass
class PinnedBlock:
    """`bytes` is a tensor over the block; it must not be used after `release`. One that nobody holds is released."""

    bytes: Tensor
    device: torch.device
    _pages: _Pages | None

    def release(self) -> None:
        """Have the driver forget the pages. The system has them back when no tensor over them is left either."""
        if self._pages is not None:
            self._pages.forget()
        self.bytes, self._pages = torch.empty(0, dtype=torch.uint8), None


def available_bytes() -> int | None:
    """Host memory that can still be taken: what the kernel has, within the container's limit. None where unknown."""
    found = []
    try:
        words = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(words["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    for limit, used in CGROUPS:
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()) + _reclaimable(Path(limit).parent))
        except (OSError, ValueError):  # no such file, or the limit is "max"
            continue
    return max(0, min(found)) if found else None


def _reclaimable(folder: Path) -> int:
    """Of what a container uses, the pages of files, which the kernel drops when memory is asked for."""
    try:
        words = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(words.get("inactive_file", 0)) + int(words.get("active_file", 0))


def lock_limit() -> int | None:
    """`ulimit -l` in bytes, None when there is none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def check_host_memory(needed: int, what: str) -> None:
    """Raise DoesNotFitError when the host does not have so many bytes."""
    available = available_bytes()
    if available is not None and needed > available - LEFT_FOR_THE_SYSTEM:
        raise DoesNotFitError(
            given=f"{what} need {format_bytes(needed)} of host memory, and {format_bytes(available)} are available",
            allowed=f"what is available less {format_bytes(LEFT_FOR_THE_SYSTEM)} for the system",
            do="close other programs, raise the container's limit, allow more GPU memory with max_memory, or take a "
            "smaller model",
        )


def pinned_block(size: int, device: torch.device, what: str) -> PinnedBlock:
    """A block of `size` bytes that copies to `device` can run from beside computation; plain memory on a CPU.

    Whether there is room is asked before, by `check_host_memory`. Raises DoesNotFitError when the driver refuses.
    """
    try:
        pages = _Pages(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise _refused(size, what, error.strerror or str(error)) from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages takes small ones, which are pinned a little more slowly
            pages.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(pages, dtype=torch.uint8)[:size]
    if device.type == "cuda":
        code = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), size, 0))
        if code != 0:
            with suppress(RuntimeError):  # the driver keeps its error until a launch asks for it
                torch.zeros(1, device=device)
            raise _refused(size, what, f"cudaHostRegister answered error {code}")
        pages.registered = block.data_ptr(), device
    return PinnedBlock(block, device, pages)


def _refused(size: int, what: str, why: str) -> DoesNotFitError:
    limit = lock_limit()
    locked = "no limit" if limit is None else format_bytes(limit)
    return DoesNotFitError(
        given=f"{what} need {format_bytes(size)} of pinned host memory, which was refused: {why}; ulimit -l: {locked}",
        allowed="pinned memory; copies from other memory would be many times slower, so they are not made",
        do="raise the limit of locked memory (ulimit -l unlimited, docker --ulimit memlock=-1), or stream fewer layers "
        "with a larger max_memory",
    )
