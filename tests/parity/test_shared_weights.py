"""4-bit layers that share the memory they are unpacked into: who may share, and what happens when memory is short."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from test_engine_gradients import examples, gradients

from streamed_models import make_pair
from thriftune.engine.attention import ReferenceAttention
from thriftune.engine.packing import pack
from thriftune.engine.sizes import Keep

CPU = torch.device("cpu")


@pytest.mark.parametrize("fp8", [False, True])
def test_stacks_of_one_layer_never_share_memory(fp8: bool) -> None:
    """An MLP as wide as the heads together: `o` and `down` are then of one size, and both are there at once."""
    pair = make_pair(hidden_size=64, intermediate_size=64)
    program = pair.resident(fp8)
    for layer in program.layers:
        assert len({stack.memory.data_ptr() for stack in layer.stacks}) == 4
    batch, keep = pack(examples((9, 2, 17, 5)), CPU), [Keep.INPUT] * len(program.layers)
    shared = float(program.add_gradients(batch, 0.1, keep, ReferenceAttention())), gradients(pair.whole)
    for layer in program.layers:
        layer.hold()
    program.copy_masters()
    held = float(program.add_gradients(batch, 0.1, keep, ReferenceAttention())), gradients(pair.whole)
    assert shared[0] == held[0]
    assert all(torch.equal(shared[1][name], gradient) for name, gradient in held[1].items())


@pytest.mark.parametrize("fp8", [False, True])
def test_a_layer_that_finds_no_memory_of_its_own_goes_on_sharing(fp8: bool, monkeypatch) -> None:
    pair = make_pair()
    program = pair.resident(fp8)
    batch, keep = pack(examples((9, 2, 17, 5)), CPU), [Keep.ALL] * len(program.layers)
    wanted = float(program.add_gradients(batch, 0.1, keep, ReferenceAttention())), gradients(pair.whole)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    program.layers[0].hold()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", full)
        patched.setattr(torch, "zeros_like", full)
        with pytest.raises(torch.OutOfMemoryError):
            program.layers[1].hold()
    assert program.let_go()
    program.copy_masters()
    found = float(program.add_gradients(batch, 0.1, keep, ReferenceAttention())), gradients(pair.whole)
    assert found[0] == wanted[0]
    assert all(torch.equal(found[1][name], gradient) for name, gradient in wanted[1].items())
