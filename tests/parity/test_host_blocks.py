"""Pinned memory of the host: what is asked for while it lasts, what is given back, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from small_host import SmallHost, disk_readers
from streamed_models import CPU, Pair, make_pair
from thriftune.engine import hosted
from thriftune.engine.hosted import Hosted, stream_layers
from thriftune.engine.program import Program
from thriftune.engine.read import read_program
from thriftune.engine.shelf import HostShelf
from thriftune.errors import DoesNotFitError

LAYERS = 10


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
    host = SmallHost(slabs * size)
    host.watch(monkeypatch)
    holder = Hosted(pair.slabs, CPU, print)
    streaming = stream_layers(program_of(pair).layers, holder, resident, 2)
    assert sorted(streaming.resident) == resident and len(streaming.streamed) == held
    assert (streaming.disk is None) == (held == LAYERS - len(resident))
    assert host.mapped == holder.bytes <= slabs * size
    for index, slab in [*streaming.resident.items(), *streaming.streamed.items()]:
        assert slab.equal(pair.slabs.kept[index]), index
    holder.close()


# ---------------------------------------------------------------- what is given back


def test_a_larger_shelf_is_asked_for_when_nothing_of_the_smaller_one_is_mapped(monkeypatch) -> None:
    row = 3 * 7 * 4  # bytes of a token: three layers, seven wide, in float32
    host = SmallHost(9 * row)
    host.watch(monkeypatch)
    found = HostShelf.of(3, 5, 7, torch.float32, CPU)
    found.begin([5])
    assert host.mapped == 5 * row
    found.begin([4, 5])
    assert host.mapped == 9 * row and found.rows_LPD.shape == (3, 9, 7)
    with pytest.raises(DoesNotFitError, match="the inputs of 3 layers for 10 tokens a step need 840 B"):
        found.begin([10])


def test_a_shelf_that_is_closed_has_nothing_mapped(monkeypatch) -> None:
    host = SmallHost(10**6)
    host.watch(monkeypatch)
    found = HostShelf.of(3, 5, 7, torch.float32, CPU)
    found.close()
    assert host.mapped == 0 and found.rows_LPD.dtype == torch.float32


@pytest.mark.parametrize("fails", ["take", "new_slots", "read_scales"])
def test_what_fails_on_the_way_to_streaming_leaves_no_block_and_no_thread(pair, monkeypatch, fails) -> None:
    """The reader's thread would hold every block for as long as the process lives."""
    host, before = SmallHost(7 * pair.slabs.layouts[0].bytes), disk_readers()
    host.watch(monkeypatch)
    done = getattr(hosted, fails, None) or getattr(Hosted, fails)

    def fail(*arguments: Any) -> None:
        done(*arguments)
        assert host.mapped > 0
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(hosted if hasattr(hosted, fails) else Hosted, fails, fail)
    with pytest.raises(torch.OutOfMemoryError):
        pair.streamed([4], fp8=True)
    assert host.mapped == 0 and disk_readers() == before


@pytest.mark.parametrize("resident", [[], [4]])
def test_a_layer_that_cannot_be_read_leaves_every_block_released(pair, monkeypatch, resident) -> None:
    """Whoever keeps the error keeps its frames, and so the blocks: they are released before."""
    made: list[Any] = []
    pin = hosted.pinned_block
    monkeypatch.setattr(hosted, "pinned_block", lambda *words: made.append(pin(*words)) or made[-1])

    def read(*_: Any) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr(pair.slabs, "read", read)
    with pytest.raises(OSError, match="input/output error"):
        pair.streamed(resident)
    assert made and all(block.bytes.numel() == 0 for block in made)
