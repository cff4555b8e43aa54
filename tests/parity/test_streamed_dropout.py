"""Streamed layers with dropout against the resident program's: every gradient, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_streaming import LENGTHS, SCALE, EarlyLane, LateLane, assert_equal, differ, parts_of
from torch import Tensor

from streamed_models import CPU, Pair, examples, gradients, make_pair
from thriftune.engine import by_layer
from thriftune.engine.attention import ReferenceAttention
from thriftune.engine.shelf import DeviceShelf, HostShelf, Shelf
from thriftune.engine.sizes import Keep
from thriftune.kernels.dropout import Key

KEY = (11, 12)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair(dropout=0.2)


def by_resident(pair: Pair, most_tokens: int, key: Key = KEY, fp8: bool = False, keep: Keep = Keep.INPUT) -> Any:
    program, total = pair.resident(fp8), 0.0
    for part in parts_of(examples(LENGTHS), most_tokens):
        total += float(program.add_gradients(part, SCALE, [keep] * len(program.layers), ReferenceAttention(), key))
    return total, gradients(pair.whole)


def by_streamed(
    pair: Pair, most_tokens: int, resident: Any, lane: Any, shelf: Shelf, fp8: bool = False
) -> tuple[float, dict[str, Tensor]]:
    program, streaming = pair.streamed(resident, fp8=fp8)
    for slot in streaming.slots:
        slot.owner = None
    streaming.lane = lane
    parts = parts_of(examples(LENGTHS), most_tokens)
    loss = by_layer.add_gradients(program, streaming, shelf, parts, SCALE, ReferenceAttention(), KEY)
    return float(loss), gradients(pair.shell)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("lane", [EarlyLane, LateLane])
@pytest.mark.parametrize("most_tokens", [100, 30])
@pytest.mark.parametrize("resident", [(), (1, 4), range(6)])
def test_every_gradient_is_that_of_the_resident_program(pair, lane, most_tokens, resident, fp8) -> None:
    wanted = by_resident(pair, most_tokens, fp8=fp8)
    assert_equal(by_streamed(pair, most_tokens, resident, lane(), DeviceShelf(), fp8), wanted)
    assert_equal(by_resident(pair, most_tokens, fp8=fp8, keep=Keep.ALL), wanted)
    assert differ(by_resident(pair, most_tokens, (12, 12), fp8)[1], wanted[1]), "another step has other masks"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3", {"head_dim": 32}),
        ("qwen2", {}),
        ("mistral", {"sliding_window": 5}),
        ("llama", {"targets": ["q_proj", "v_proj"]}),  # layers then end in a plain frozen projection
    ],
)
def test_models_of_every_form(kind, changes) -> None:
    pair = make_pair(kind, dropout=0.2, **changes)
    shelf = HostShelf.of(6, sum(LENGTHS), 64, torch.float32, CPU)
    shelf.leaving, shelf.coming = LateLane(), LateLane()
    assert_equal(by_streamed(pair, 30, (2,), LateLane(), shelf), by_resident(pair, 30))


def test_the_loss_alone_has_no_dropout(pair) -> None:
    parts, whole = parts_of(examples(LENGTHS), 30), pair.resident()
    wanted = sum(float(whole.loss(part, ReferenceAttention())) for part in parts)
    program, streaming = pair.streamed((3,))
    assert float(by_layer.losses(program, streaming, parts, ReferenceAttention())) == pytest.approx(wanted, rel=1e-12)
    assert abs(by_resident(pair, 30)[0] - wanted) > 1e-3
