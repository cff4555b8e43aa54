"""Streamed layers on a CUDA device: gradients at real shapes, copies delayed; pinned memory; whole runs; the cap."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from thriftune.engine import host_memory
from thriftune.engine.host_memory import pinned_block
from thriftune.engine.lanes import CudaLane
from thriftune.errors import DoesNotFitError
from thriftune.recipe import read_recipe
from thriftune.run_path import OUTSIDE_BYTES, hold_memory
from tiny import losses_of, record_of, tiny_model, tiny_recipe, tiny_rows, train_tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "streaming"))
import equality

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)
MIB = 1024**2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("8B", ()),
        ("70B", ()),
        ("123B", ()),
        ("70B", ("lora_target_modules=q_proj,v_proj",)),
        ("70B", ("lora_dropout=0.1",)),
    ],
)
def test_every_gradient_is_the_resident_programs_and_planted_bugs_are_found(name, words) -> None:
    rows = equality.check(name, GPU, words, print)
    assert len(rows) == (7 if "lora_dropout=0.1" in words else 6)
    assert all(row["as_it_must_be"] for row in rows), [row for row in rows if not row["as_it_must_be"]]


def test_a_block_is_pinned_and_a_copy_from_it_runs_beside_computation() -> None:
    block = pinned_block(100 * MIB + 4096, GPU, "the test's block")
    assert block.bytes.is_pinned() and block.bytes.numel() == 100 * MIB + 4096
    block.bytes.random_(0, 256)
    place, lane = torch.zeros_like(block.bytes, device=GPU), CudaLane(GPU)
    torch.cuda.synchronize()
    torch.cuda._sleep(400_000_000)  # computation that lasts far longer than the copy
    arrival = lane.send(block.bytes, place, None)
    lane.settle(arrival)
    assert not torch.cuda.current_stream(GPU).query(), "the copy waited for what was computed"
    lane.wait(arrival)
    times = lane.times()
    assert torch.equal(place.cpu(), block.bytes) and times.bytes == block.bytes.numel() and times.copy_s > 0
    block.release()


def test_a_block_that_nobody_released_does_not_stand_in_the_way_of_the_next() -> None:
    """The system gives the same address again, and the driver must have forgotten what lay there."""
    addresses = {pinned_block(16 * MIB, GPU, "a block").bytes.data_ptr() for _ in range(20)}
    assert len(addresses) < 20


def test_a_refused_block_leaves_no_error_for_what_comes_next(monkeypatch) -> None:
    block = pinned_block(MIB, GPU, "a block")
    monkeypatch.setattr(host_memory, "_Pages", lambda *_, **__: block._pages)  # the same pages twice: refused
    with pytest.raises(DoesNotFitError, match="cudaHostRegister answered error"):
        pinned_block(MIB, GPU, "the same block")
    assert float(torch.ones(8, device=GPU).sum()) == 8
    block.release()


@pytest.mark.parametrize("precision", ["auto", "fp8"])
def test_a_streamed_run_is_the_resident_one(tmp_path, monkeypatch, precision) -> None:
    """To rounding: attention's backward pass adds in no fixed order on a GPU."""
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with products in 8-bit floats")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny_model(tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=5, hidden_size=128)
    rows = tiny_rows(tmp_path / "rows.jsonl", 22)
    train = {"gradient_checkpointing": "on", "optim": "adamw_torch"}
    for name, offload in (("whole", "off"), ("streamed", {"resident_layers": 1})):
        recipe = tiny_recipe(
            model,
            rows,
            tmp_path / name,
            method="qlora",
            engine="auto",
            offload=offload,
            precision=precision,
            max_memory="4GiB",
            train=train,
        )
        train_tiny(recipe)
    told = record_of(tmp_path / "streamed").offload
    assert told is not None and told.resident_layers == 1 and told.copy_s > 0
    assert losses_of(tmp_path / "streamed") == pytest.approx(losses_of(tmp_path / "whole"), rel=5e-3)
    torch.cuda.set_per_process_memory_fraction(1.0, GPU)


def test_the_cap_is_kept() -> None:
    recipe = read_recipe(None, ["method=qlora", "max_memory=2GiB"], {})
    try:
        hold_memory(GPU, recipe, 100 * MIB)
        allowed = 2 * 1024 * MIB - OUTSIDE_BYTES - 100 * MIB
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(allowed + 64 * MIB, dtype=torch.uint8, device=GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
