"""Pinned memory of the host: what is asked for while it lasts, what is given back, and when."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from streamed_models import CPU, Pair, make_pair
from thriftune.engine import host_memory, hosted, shelf
from thriftune.engine.host_memory import LEFT_FOR_THE_SYSTEM
from thriftune.engine.hosted import Hosted, stream_layers
from thriftune.engine.program import Program
from thriftune.engine.read import read_program
from thriftune.engine.shelf import HostShelf
from thriftune.errors import DoesNotFitError

LAYERS = 10


@dataclass
class Host:
    """A host of so many bytes beside what is left for the system, which falls with each block that is mapped."""

    bytes: int
    _pages: list[tuple[Any, int]] = field(default_factory=list)

    @property
    def mapped(self) -> int:
        return sum(size for pages, size in self._pages if pages() is not None)

    def available_bytes(self) -> int:
        return LEFT_FOR_THE_SYSTEM + self.bytes - self.mapped

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


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair(num_hidden_layers=LAYERS)


def program_of(pair: Pair) -> Program:
    return read_program(pair.shell, longest=64, rank_multiple=8, fp8=False)


# ---------------------------------------------------------------- what has room


@pytest.mark.parametrize(
    ("slabs", "resident", "held"),
    [(6, [4], 3), (9, [4], 9), (8, [4], 5), (4, [1, 3, 5, 7, 9], 1), (7, [1, 3, 4, 5, 7, 9], 4), (3, [], 0)],
)
def test_layers_that_stay_are_read_before_the_others_fill_the_hosts_memory(
    pair, monkeypatch, slabs, resident, held
) -> None:
    """The blocks that they are read through are given back, so what is streamed may take all there is."""
    size = pair.slabs.layouts[0].bytes
    host = Host(slabs * size)
    host.watch(monkeypatch)
    holder = Hosted(pair.slabs, CPU, print)
    streaming = stream_layers(program_of(pair).layers, holder, resident, 2)
    assert sorted(streaming.resident) == resident and len(streaming.streamed) == held
    assert (streaming.disk is None) == (held == LAYERS - len(resident))
    assert host.mapped == holder.bytes <= slabs * size
    for index, slab in [*streaming.resident.items(), *streaming.streamed.items()]:
        assert slab.equal(pair.slabs.kept[index]), index


# ---------------------------------------------------------------- what is given back


def test_a_larger_shelf_is_asked_for_when_nothing_of_the_smaller_one_is_mapped(monkeypatch) -> None:
    row = 3 * 7 * 4  # bytes of a token: three layers, seven wide, in float32
    host = Host(9 * row)
    host.watch(monkeypatch)
    found = HostShelf.of(3, 5, 7, torch.float32, CPU)
    found.begin([5])
    assert host.mapped == 5 * row
    found.begin([4, 5])
    assert host.mapped == 9 * row and found.rows_LPD.shape == (3, 9, 7)
    with pytest.raises(DoesNotFitError, match="the inputs of 3 layers for 10 tokens a step need 840 B"):
        found.begin([10])


def test_a_shelf_that_is_closed_has_nothing_mapped(monkeypatch) -> None:
    host = Host(10**6)
    host.watch(monkeypatch)
    found = HostShelf.of(3, 5, 7, torch.float32, CPU)
    found.close()
    assert host.mapped == 0 and found.rows_LPD.dtype == torch.float32
