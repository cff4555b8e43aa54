"""Every gradient of a streamed program against the resident one's, bit for bit, on the card itself.

With the reference attention, whose backward pass adds in a fixed order. The copy stream is delayed on purpose and slots
are filled with rubbish before each copy; then bugs are planted, which must be found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from random_models import make_model, make_slabs
from torch import Tensor

from thriftune.data import Example
from thriftune.engine import by_layer
from thriftune.engine.attention import ReferenceAttention
from thriftune.engine.lanes import CudaLane, HostLane, Lane
from thriftune.engine.packing import pack
from thriftune.engine.residency import Streaming
from thriftune.engine.shelf import DeviceShelf, HostShelf, Shelf
from thriftune.engine.sizes import Keep
from thriftune.kernels.dropout import Key

KEY, OTHER_KEY = (1, 2), (1, 3)  # of two steps' masks, where there is dropout
DELAY_CYCLES = 60_000_000  # some 30 ms: far longer than a layer computes on so few tokens
LAYERS = 4


class DelayedLane(CudaLane):
    """Rubbish first, then nothing for a while, then the copy."""

    def send(self, source: Tensor, place: Tensor, free: Any) -> Any:
        if free is not None:
            self.stream.wait_event(free)
        with torch.cuda.stream(self.stream):
            place.view(torch.uint8).fill_(0xFF)
            torch.cuda._sleep(DELAY_CYCLES)
        return super().send(source, place, None)


class DeafLane(DelayedLane):
    """A planted bug: nobody waits for the copy."""

    def wait(self, arrival: Any) -> None: ...


class OneLayerEarly(Streaming):
    """A planted bug: the slot goes to the next layer when its own has arrived, before it was unpacked."""

    def acquire(self, index: int) -> None:
        super().acquire(index)
        slot = self._slot_of(index)
        assert slot is not None
        slot.in_use, slot.free = False, self.lane.mark()
        first = self._coming.popleft()
        self._send()
        self._coming.appendleft(first)
        slot.in_use, slot.owner = True, index
        if slot.bytes.is_cuda:
            torch.cuda._sleep(DELAY_CYCLES)  # of what computes, so that the copy wins


def examples_of(lengths: Sequence[int], vocabulary: int) -> list[Example]:
    drawn = np.random.default_rng(3)
    return [
        Example(drawn.integers(4, vocabulary, length, dtype=np.int32), np.ones(length, dtype=bool), index)
        for index, length in enumerate(lengths)
    ]


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> int:
    assert found.keys() == wanted.keys() and len(wanted) > 0
    return sum(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def check(name: str, device: torch.device, extra: Sequence[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of how many gradients are equal, for four layers of a shape."""
    cuda = device.type == "cuda"
    lengths = (200, 64, 248) if cuda else (20, 6, 24)
    model = make_model(name, device, max(lengths), layers=LAYERS, extra=extra, vocab_size=4096)
    make_slabs(model, say)
    generator = torch.Generator(device).manual_seed(1)
    for path, parameter in model.model.named_parameters():
        if ".lora_B." in path:  # zero at the start of a run, which would make half of the gradients zero
            parameter.data.normal_(0.0, 0.02, generator=generator)
    program, attention = model.program, ReferenceAttention()
    program.copy_masters()
    parts = [pack(group, device) for group in ([row] for row in examples_of(lengths, 4096))]

    def resident() -> dict[str, Tensor]:
        model.streaming(range(LAYERS), 1, HostLane())
        for part in parts:
            program.add_gradients(part, 1e-2, [Keep.INPUT] * LAYERS, attention, KEY)
        return gradients(model.model)

    def streamed(streaming: Streaming, shelf: Shelf, key: Key = KEY) -> dict[str, Tensor]:
        by_layer.add_gradients(program, streaming, shelf, parts, 1e-2, attention, key)
        if cuda:
            torch.cuda.synchronize(device)  # with a bug planted, copies may still run when their slots are given back
        return gradients(model.model)

    def lane(kind: type[CudaLane]) -> Lane:
        return kind(device) if cuda else HostLane()

    wanted = resident()
    dtype, width = model.loaded.base_dtype, program.embedding_VD.shape[1]
    on_host = HostShelf.of(LAYERS, sum(lengths), width, dtype, device)
    early = model.streaming((), 1, lane(CudaLane))
    early = OneLayerEarly(**{key: getattr(early, key) for key in
                             ("layers", "layouts", "tables", "resident", "streamed", "slots", "lane")})  # fmt: skip
    found: dict[str, Callable[[], dict[str, Tensor]]] = {
        "resident, again": resident,
        "streamed": lambda: streamed(model.streaming((), 2, lane(CudaLane)), DeviceShelf()),
        "streamed, copies delayed, slots poisoned": lambda: streamed(
            model.streaming((), 2, lane(DelayedLane)), DeviceShelf()
        ),
        "one layer resident, inputs on the host, delayed": lambda: streamed(
            model.streaming((1,), 2, lane(DelayedLane)), on_host
        ),
        "planted: slot reused one layer early": lambda: streamed(early, DeviceShelf()),
    }
    if cuda:
        found["planted: copies not waited for"] = lambda: streamed(
            model.streaming((), 2, lane(DeafLane)), DeviceShelf()
        )
    if program.drops:
        found["planted: another step's masks"] = lambda: streamed(
            model.streaming((), 2, lane(CudaLane)), DeviceShelf(), OTHER_KEY
        )
    rows = []
    for what, run in found.items():
        count = equal(run(), wanted)
        right = (count < len(wanted)) if what.startswith("planted") else (count == len(wanted))
        row = {"stage": "equality", "model": name, "targets": " ".join(extra), "what": what, "equal": count}
        rows.append(row | {"of": len(wanted), "as_it_must_be": right, "slab_bytes": model.layout.bytes})
        say(f"{name} {' '.join(extra)} {what}: {count} of {len(wanted)} equal{'' if right else '  <-- WRONG'}")
    on_host.block.release()
    model.release()
    return rows


def check_all(names: Sequence[str], device: torch.device, say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        rows += check(name, device, (), say)
    # Layers that end in a plain frozen projection: without an adapter on `down`, nor on others.
    rows += check(names[-1], device, ("lora_target_modules=q_proj,v_proj",), say)
    return rows + check(names[-1], device, ("lora_dropout=0.1",), say)
