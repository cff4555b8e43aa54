"""A streamed program against the same program with all of it on the device: every gradient, bit for bit.

A GPU copies at a time that nobody chose: any time between "sent" and "waited for". Here both ends of that are run, a
copy made at once and one made at the last moment, with slots filled with rubbish between, so that what would be a race
there is a sure failure here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from streamed_models import ALL, CPU, Pair, examples, gradients, make_pair
from thriftune.engine import by_layer, host_memory, hosted
from thriftune.engine.attention import ReferenceAttention
from thriftune.engine.disk import DiskReader
from thriftune.engine.host_memory import PinnedBlock
from thriftune.engine.lanes import HostLane
from thriftune.engine.offload import Offload
from thriftune.engine.packing import cut_by_tokens, pack
from thriftune.engine.residency import Streaming, sends, spread
from thriftune.engine.shelf import DeviceShelf, HostShelf, Shelf
from thriftune.engine.sizes import Keep
from thriftune.engine.streamed_path import StreamedPath
from thriftune.errors import DoesNotFitError, ModelError
from thriftune.recipe import QuantRecipe

LENGTHS = (9, 2, 17, 5, 30, 1, 3)
SCALE = 0.1


class EarlyLane(HostLane):
    """Copies the moment it may, over rubbish."""

    sent: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.sent = []

    def send(self, source: Tensor, place: Tensor, free: Any) -> Any:
        place.view(torch.uint8).fill_(0xFF)
        self.sent.append(source.data_ptr())
        super().send(source, place, free)


class LateLane(HostLane):
    """Copies when somebody waits for it; until then the place holds rubbish."""

    def send(self, source: Tensor, place: Tensor, free: Any) -> Any:
        place.view(torch.uint8).fill_(0xFF)
        return [source, place]

    def wait(self, arrival: Any) -> None:
        if arrival:
            super().send(*arrival, None)
            arrival.clear()

    def settle(self, arrival: Any) -> None:
        self.wait(arrival)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair()


def parts_of(rows: Sequence[Any], most_tokens: int) -> list[Any]:
    return [pack(group, CPU) for group in cut_by_tokens(rows, most_tokens)]


def by_resident(pair: Pair, most_tokens: int) -> tuple[float, dict[str, Tensor]]:
    program, total = pair.resident(), 0.0
    for part in parts_of(examples(LENGTHS), most_tokens):
        total += float(program.add_gradients(part, SCALE, [Keep.INPUT] * len(program.layers), ReferenceAttention()))
    return total, gradients(pair.whole)


def by_streamed(
    pair: Pair, most_tokens: int, resident: Sequence[int] = (), slots: int = 2, lane: Any = None, shelf: Any = None
) -> tuple[float, dict[str, Tensor]]:
    program, streaming = pair.streamed(resident, slots)
    streaming.lane = lane or EarlyLane()
    return run(pair, program, streaming, most_tokens, shelf or DeviceShelf())


def run(pair: Pair, program: Any, streaming: Streaming, most_tokens: int, shelf: Shelf) -> tuple[float, dict]:
    parts = parts_of(examples(LENGTHS), most_tokens)
    loss = by_layer.add_gradients(program, streaming, shelf, parts, SCALE, ReferenceAttention())
    return float(loss), gradients(pair.shell)


def assert_equal(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-12)
    assert found[1].keys() == wanted[1].keys() and len(wanted[1]) > 0
    for name, gradient in wanted[1].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("lane", [EarlyLane, LateLane])
@pytest.mark.parametrize("most_tokens", [100, 30])
@pytest.mark.parametrize(("resident", "slots"), [((), 2), ((), 1), ((), 3), ((1, 4), 2), ((0, 5), 2), (range(6), 2)])
def test_every_gradient_is_that_of_the_resident_program(pair, lane, most_tokens, resident, slots) -> None:
    wanted = by_resident(pair, most_tokens)
    assert_equal(by_streamed(pair, most_tokens, resident, slots, lane()), wanted)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3", {"head_dim": 32}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("qwen2", {}),
        ("mistral", {"sliding_window": 5}),
        ("llama", {"targets": ["q_proj", "v_proj"]}),  # layers then end in a plain frozen projection
        ("llama", {"quant": QuantRecipe(bnb_4bit_use_double_quant=False)}),
        ("llama", {"quant": QuantRecipe(bnb_4bit_quant_type="fp4")}),
    ],
)
@pytest.mark.parametrize("lane", [EarlyLane, LateLane])
def test_models_of_every_form(kind, changes, lane) -> None:
    pair = make_pair(kind, **changes)
    assert_equal(by_streamed(pair, 30, (2,), lane=lane()), by_resident(pair, 30))


@pytest.mark.parametrize("lane", [EarlyLane, LateLane])
@pytest.mark.parametrize("resident", [(), (1, 4)])
def test_products_in_8_bit_floats(pair, lane, resident) -> None:
    whole, total = pair.resident(fp8=True), 0.0
    for part in parts_of(examples(LENGTHS), 30):
        total += float(whole.add_gradients(part, SCALE, [Keep.INPUT] * 6, ReferenceAttention()))
    wanted = (total, gradients(pair.whole))
    program, streaming = pair.streamed(resident, fp8=True)
    for slot in streaming.slots:
        slot.owner = None
    streaming.lane = lane()
    found = run(pair, program, streaming, 30, DeviceShelf())
    assert_equal(found, wanted)
    assert differ(found[1], by_resident(pair, 30)[1]), "8 bits must round otherwise than 16"


@pytest.mark.parametrize("lane", [EarlyLane, LateLane])
def test_inputs_that_wait_on_the_host_change_no_bit(pair, lane) -> None:
    wanted = by_resident(pair, 30)
    shelf = HostShelf.of(6, sum(LENGTHS), 64, torch.float32, CPU)
    shelf.leaving, shelf.coming = lane(), lane()
    assert_equal(by_streamed(pair, 30, shelf=shelf), wanted)


def test_a_step_of_more_tokens_than_the_first_epochs_largest_finds_room_on_the_host(pair) -> None:
    shelf = HostShelf.of(6, sum(LENGTHS) - 9, 64, torch.float32, CPU)
    assert_equal(by_streamed(pair, 30, shelf=shelf), by_resident(pair, 30))
    assert shelf.rows_LPD.shape == (6, sum(LENGTHS), 64)


def test_the_shelf_keeps_times_of_one_pass_only(pair) -> None:
    """A CUDA event for every copy of a run would be a leak."""
    shelves = [HostShelf.of(6, sum(LENGTHS), 64, torch.float32, CPU) for _ in range(2)]
    for shelf, passes in zip(shelves, (1, 3), strict=True):
        for _ in range(passes):
            by_streamed(pair, 30, shelf=shelf)
    once, often = ((shelf.leaving.times(), shelf.coming.times()) for shelf in shelves)
    assert once == often and all(times.bytes for times in once)


def test_copies_back_that_nobody_took_are_waited_for_before_their_memory_is_let_go(pair) -> None:
    """A pass that ran out of memory leaves them on the way; their memory would be used while they arrive."""
    sent: list[object] = []

    class Counting(HostLane):
        def send(self, source: Tensor, place: Tensor, free: Any) -> Any:
            super().send(source, place, free)
            sent.append(object())
            return sent[-1]

        def wait(self, arrival: Any) -> None:
            sent.remove(arrival)

    shelf = HostShelf.of(6, sum(LENGTHS), 64, torch.float32, CPU)
    shelf.coming = Counting()
    shelf.begin([30, 37])
    for part, tokens in enumerate((30, 37)):
        shelf.put(5, part, torch.ones(tokens, 64))
    shelf.fetch(5)
    shelf.take(5, 0)
    assert len(sent) == 1
    shelf.begin([30, 37])
    assert not sent


def test_the_shelf_waits_for_what_leaves_before_it_lets_go_of_it(pair) -> None:
    """The positive control of the test above: without the wait, inputs that leave late never arrive."""

    class Forgetful(HostShelf):
        def _let_go(self, most: int) -> None:
            self._on_the_way_out.clear()

    shelf = Forgetful.of(6, sum(LENGTHS), 64, torch.float32, CPU)
    shelf.leaving, shelf.coming = LateLane(), LateLane()
    _, found = by_streamed(pair, 30, shelf=shelf)
    assert not all(torch.equal(found[name], gradient) for name, gradient in by_resident(pair, 30)[1].items())


@pytest.mark.parametrize("lane", [EarlyLane, LateLane])
@pytest.mark.parametrize("held", [0, 1])
def test_layers_that_are_read_from_the_disk(pair, lane, held, monkeypatch) -> None:
    slab = pair.slabs.layouts[0].bytes
    monkeypatch.setattr(hosted, "available_bytes", lambda: hosted.LEFT_FOR_THE_SYSTEM + (held + hosted.STAGED) * slab)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 10**12)
    program, streaming = pair.streamed((2,))
    assert streaming.disk is not None and len(streaming.streamed) == held
    streaming.lane = streaming.disk.lane = lane()
    wanted = by_resident(pair, 30)
    for _ in range(3):  # the first pass finds nothing read, later ones what was left over
        assert_equal(run(pair, program, streaming, 30, DeviceShelf()), wanted)


def test_a_disk_that_fails_ends_the_pass_with_its_own_error() -> None:
    def fails(index: int, slab: Tensor) -> None:
        raise OSError("input/output error")

    reader = DiskReader(fails, [64], [torch.empty(64, dtype=torch.uint8)], HostLane())
    reader.announce([0])
    with pytest.raises(OSError, match="input/output error"):
        reader.take(0, wait=True)


def test_a_slab_from_the_disk_is_not_overwritten_before_its_copy_was_made() -> None:
    """One block, two layers, copies that are made late: the second is read only when the first has been copied."""
    lane = LateLane()
    reader = DiskReader(lambda index, slab: slab.fill_(index + 1), [8, 8], [torch.zeros(8, dtype=torch.uint8)], lane)
    reader.announce([0, 1])
    places = [torch.zeros(8, dtype=torch.uint8) for _ in range(2)]
    for index, place in enumerate(places):
        slab = reader.take(index, wait=True)
        assert slab is not None
        reader.sent(index, lane.send(slab, place, None))
    assert places[0].tolist() == [1] * 8


def test_what_was_not_announced_is_read_all_the_same() -> None:
    blocks = [torch.zeros(8, dtype=torch.uint8) for _ in range(2)]
    reader = DiskReader(lambda index, slab: slab.fill_(index), [8] * 5, blocks, HostLane())
    reader.announce([0, 1, 2])
    for index in (3, 2, 4):
        slab = reader.take(index, wait=True)
        assert slab is not None and slab.tolist() == [index] * 8
        reader.sent(index, None)


@pytest.mark.parametrize(
    ("second", "read_then"),
    [([0, 1, 2, 3, 4, 5], [3, 4, 5]), ([0, 2, 1, 3], [1, 3]), ([2, 0, 1, 4], [0, 1, 4])],
)
def test_what_was_read_ahead_is_not_read_again_for_the_next_pass(second, read_then) -> None:
    """The pass after the present one was announced too: two layers of it are ready and the third is being read when it
    begins. Where it begins otherwise than was said, what does not fit is read anew."""
    begun: list[int] = []
    may_end = threading.Event()

    def read(index: int, slab: Tensor) -> None:
        begun.append(index)
        if len(begun) == 9:
            assert may_end.wait(30)
        slab.fill_(index)

    def use(order: Sequence[int]) -> None:
        for index in order:
            slab = reader.take(index, wait=True)
            assert slab is not None and slab.tolist() == [index] * 8
            reader.sent(index, None)

    first, blocks = [*range(6)], [torch.zeros(8, dtype=torch.uint8) for _ in range(3)]
    reader = DiskReader(read, [8] * 6, blocks, HostLane())
    reader.announce([*first, *first])
    use(first)
    until(lambda: len(begun) == 9)
    reader.announce(second)
    may_end.set()
    use(second)
    reader.close()
    assert begun == [*first, 0, 1, 2, *read_then]


def test_each_pass_reads_from_the_disk_what_it_copies(pair, monkeypatch) -> None:
    """As generating does: every token's pass is announced twice, so that the next one is read ahead."""
    monkeypatch.setattr(hosted, "available_bytes", lambda: hosted.LEFT_FOR_THE_SYSTEM)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 10**12)
    done: list[int] = []
    read = pair.slabs.read
    monkeypatch.setattr(pair.slabs, "read", lambda index, *rest: (read(index, *rest), done.append(index)))
    monkeypatch.setattr(pair.slabs, "read_again", lambda index, slab: (read(index, slab, print), done.append(index)))
    _, streaming = pair.streamed(())
    lane = streaming.lane = EarlyLane()
    for _ in range(4):
        streaming.begin([*range(6), *range(6)])
        for index in range(6):
            streaming.acquire(index)
            streaming.release(index)
        until(lambda: len(done) >= len(lane.sent) + hosted.STAGED)
    assert len(done) == len(lane.sent) + hosted.STAGED


def until(happened: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.001)


def test_the_order_of_copies_is_foreseen(pair) -> None:
    visits = [*range(6), *reversed(range(6))]
    for slots in (1, 2, 3):
        program, streaming = pair.streamed((), slots)
        for _ in range(2):
            lane = EarlyLane()
            streaming.lane = lane
            number_of = {slab.data_ptr(): index for index, slab in streaming.streamed.items()}
            foreseen = sends(visits, [slot.owner for slot in streaming.slots])
            run(pair, program, streaming, 100, DeviceShelf())
            assert [number_of[source] for source in lane.sent] == foreseen


def test_one_step_after_another_with_changed_adapters(pair) -> None:
    """Slots keep their layers from step to step; the adapters' values are taken anew."""
    program, streaming = pair.streamed((3,))
    whole = pair.resident()
    try:
        for number in range(3):
            for model, own in ((pair.whole, whole), (pair.shell, program)):
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if "lora_" in name:
                            parameter.mul_(1.0 + 0.1 * number)
                own.copy_masters()
            found = run(pair, program, streaming, 30, DeviceShelf())
            total = 0.0
            for part in parts_of(examples(LENGTHS), 30):
                total += float(whole.add_gradients(part, SCALE, [Keep.INPUT] * 6, ReferenceAttention()))
            assert_equal(found, (total, gradients(pair.whole)))
    finally:
        with torch.no_grad():
            for model in (pair.whole, pair.shell):
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.div_(1.0 * 1.1 * 1.2)


def test_the_loss_alone(pair) -> None:
    parts = parts_of(examples(LENGTHS), 30)
    whole = pair.resident()
    wanted = sum(float(whole.loss(part, ReferenceAttention())) for part in parts)
    program, streaming = pair.streamed((0, 3))
    for lane in (EarlyLane(), LateLane()):
        streaming.lane = lane
        for slot in streaming.slots:
            slot.owner = None
        assert float(by_layer.losses(program, streaming, parts, ReferenceAttention())) == pytest.approx(wanted, 1e-12)


# ---------------------------------------------------------------- planted bugs: each must be found


class OneLayerEarly(Streaming):
    """The slot goes to the next layer when its own arrives, not when it has been unpacked."""

    checked = True

    def acquire(self, index: int) -> None:
        super().acquire(index)
        if index in self.resident:
            return
        slot = self._slot_of(index)
        assert slot is not None
        slot.in_use = False
        place = self._coming.popleft()
        self._send()
        self._coming.appendleft(place)
        slot.in_use = True
        if not self.checked:
            slot.owner = index


class NoWait(Streaming):
    """What is computed does not wait for the copy."""

    def acquire(self, index: int) -> None:
        lane, self.lane = self.lane, HostLane()
        super().acquire(index)
        self.lane = lane


def planted(pair: Pair, kind: type[Streaming], lane: Any) -> dict[str, Tensor]:
    program, streaming = pair.streamed((), slots=1)
    names = ("layers", "layouts", "tables", "resident", "streamed", "slots")
    wrong = kind(**{name: getattr(streaming, name) for name in names}, lane=lane)
    return run(pair, program, wrong, 100, DeviceShelf())[1]


def differ(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return not all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_a_slot_that_changes_hands_too_early_is_noticed(pair) -> None:
    with pytest.raises(RuntimeError, match="was overwritten while the layer was in use"):
        planted(pair, OneLayerEarly, EarlyLane())


def test_without_the_check_of_owners_its_gradients_are_wrong(pair, monkeypatch) -> None:
    monkeypatch.setattr(OneLayerEarly, "checked", False)
    assert differ(planted(pair, OneLayerEarly, EarlyLane()), by_resident(pair, 100)[1])


def test_a_copy_that_is_not_waited_for_gives_wrong_gradients(pair) -> None:
    assert differ(planted(pair, NoWait, LateLane()), by_resident(pair, 100)[1])


def test_layers_out_of_order_are_refused(pair) -> None:
    _, streaming = pair.streamed(())
    streaming.begin([0, 1, 2])
    with pytest.raises(RuntimeError, match="layer 2 is visited where layer 0 was announced"):
        streaming.acquire(2)


# ---------------------------------------------------------------- what is sent, and when


def test_turning_layers_are_not_fetched_twice(pair) -> None:
    """Six layers, two slots: six fetched forward, four backward, and the next step finds the first two."""
    program, streaming = pair.streamed(())
    lane = EarlyLane()
    streaming.lane = lane
    number_of = {slab.data_ptr(): index for index, slab in streaming.streamed.items()}
    run(pair, program, streaming, 100, DeviceShelf())
    assert [number_of[source] for source in lane.sent] == [0, 1, 2, 3, 4, 5, 3, 2, 1, 0]
    lane.sent.clear()
    run(pair, program, streaming, 100, DeviceShelf())
    assert [number_of[source] for source in lane.sent] == [2, 3, 4, 5, 3, 2, 1, 0]


def test_a_pass_that_was_broken_off_leaves_nothing_behind(pair) -> None:
    program, streaming = pair.streamed(())
    streaming.lane = EarlyLane()
    streaming.begin(range(6))
    streaming.acquire(0)  # and never released: it ran out of memory
    assert_equal(run(pair, program, streaming, 30, DeviceShelf()), by_resident(pair, 30))


def test_resident_layers_can_be_given_up(pair) -> None:
    program, streaming = pair.streamed((0, 2, 4, 5))
    streaming.lane = EarlyLane()
    assert streaming.give_up(2, lambda index: pair.slabs.kept[index].clone()) == 2
    assert len(streaming.resident) == 2 and len(streaming.streamed) == 4
    assert_equal(run(pair, program, streaming, 30, DeviceShelf()), by_resident(pair, 30))


def test_layers_given_up_in_evaluation_are_missing_in_training_and_parts_stay(pair) -> None:
    program, streaming = pair.streamed((0, 2, 4))
    slabs = hosted.Hosted(pair.slabs, CPU, print)
    chosen = Offload(resident=3, layers=6, inputs_on_host=False, most_tokens=64)
    path = StreamedPath(program, streaming, slabs, DeviceShelf(), CPU, ReferenceAttention(), chosen, longest=30)
    measuring = path.in_evaluation()
    for left in (2, 1, 0):
        assert "1 layers more are streamed" in measuring.step_down("full")
        assert path.offload == measuring.offload == replace(chosen, resident=left)
    assert "parts of 64 -> 32 tokens" in measuring.step_down("full")
    assert (path.offload.most_tokens, measuring.offload.most_tokens) == (64, 32)
    assert "parts of 64 -> 32 tokens" in path.step_down("full")
    path.step_down("full")
    with pytest.raises(DoesNotFitError, match="0 of 6 layers stay on the GPU, 6 are streamed"):
        path.step_down("full")
    for asked in (path.parameters_changed, path.copies_bytes):  # of method dynamic, which streams nothing
        with pytest.raises(NotImplementedError):
            asked()


def test_resident_layers_lie_between_the_streamed_ones() -> None:
    assert spread(20, 80) == list(range(2, 80, 4))
    assert spread(0, 80) == [] and spread(80, 80) == list(range(80)) and spread(1, 3) == [1]
    for resident in range(1, 33):
        assert len(set(spread(resident, 32))) == resident


# ---------------------------------------------------------------- the shell


def test_a_shell_refuses_to_be_called(pair) -> None:
    with pytest.raises(ModelError, match="layers are streamed"):
        pair.shell(input_ids=torch.tensor([[1, 2]]))
    linear = pair.shell.get_base_model().model.layers[0].mlp.up_proj.base_layer
    with pytest.raises(AssertionError):
        linear(torch.zeros(1, 64))


def test_a_shell_has_adapters_like_the_whole_model(pair) -> None:
    of_whole = {name: value.shape for name, value in pair.whole.named_parameters() if value.requires_grad}
    assert of_whole == {name: value.shape for name, value in pair.shell.named_parameters() if value.requires_grad}
    assert len(of_whole) == 6 * len(ALL) * 2


def test_a_shell_takes_no_memory_for_its_layers(pair) -> None:
    layer = pair.shell.get_base_model().model.layers[0]
    linears = [layer.self_attn.q_proj, layer.mlp.up_proj]
    assert all(linear.base_layer.weight.untyped_storage().nbytes() == 1 for linear in linears)


def test_a_block_is_of_the_size_asked_for() -> None:
    shelf = HostShelf.of(3, 5, 7, torch.float32, CPU)
    assert isinstance(shelf.block, PinnedBlock) and shelf.block.bytes.numel() == 3 * 5 * 7 * 4
