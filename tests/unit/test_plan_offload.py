"""The plan of streamed layers: what stays, what it takes, and how time follows the link and the tokens of a step."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from test_plan import GPUS, LLAMA_8B, LLAMA_70B, case_of, market, on, plan_of, shape_of

from thriftune.engine.offload import Demand, choose_offload, least_offload, needed_bytes, slab_bytes
from thriftune.engine.residency import spread
from thriftune.engine.sizes import LayerSizes, ProgramSizes, StackSizes
from thriftune.kernels.slab import Matrix, SlabLayout
from thriftune.plan.memory import NF4_BYTES
from thriftune.plan.plan import plan_method
from thriftune.plan.search import Device
from thriftune.plan.values import PARTS
from thriftune.units import GIB

LAYER = LayerSizes(
    StackSizes(8192, 10240, 64), StackSizes(8192, 8192, 64), StackSizes(8192, 57344, 64), StackSizes(28672, 8192, 64),
    64, 8, False, False,
)  # fmt: skip
SIZES = ProgramSizes([(LAYER, 80)], 8192, 128_256, 2, fp8=False)
SLAB = slab_bytes(LAYER, NF4_BYTES[True])


def demand(tokens: int = 4096, resident: int | None = None) -> Demand:
    return Demand(tokens, 1024, False, 2 * GIB, SLAB, resident)


def planned(*words: str, shape=LLAMA_70B, usable_gib: float = 24, gpu: str = "h200"):
    return plan_method(case_of(*words, shape=shape), "qlora", on(gpu, usable_gib=usable_gib), market())


# ---------------------------------------------------------------- the choice


def test_a_slab_has_the_bytes_of_its_layout():
    shapes = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
    layout = SlabLayout(tuple(Matrix("", *shape) for shape in shapes), 64, True)
    assert layout.bytes == pytest.approx(SLAB, rel=1e-4)
    assert 437e6 < SLAB < 445e6, "a layer of 70B, as others count it"


def test_more_memory_keeps_more_layers_and_never_takes_more_than_there_is():
    before = 0
    for free_gib in range(6, 60):
        free = free_gib * GIB
        chosen = choose_offload(SIZES, free, demand())
        taken = needed_bytes(SIZES, demand(), chosen.most_tokens, chosen.inputs_on_host) + chosen.resident * SLAB
        assert taken <= free
        if not chosen.inputs_on_host:
            assert chosen.resident >= before
            before = chosen.resident
    assert before == 80


def test_inputs_wait_on_the_host_when_they_would_push_layers_out():
    assert choose_offload(SIZES, 7 * GIB, demand()).inputs_on_host
    assert not choose_offload(SIZES, 17 * GIB, demand()).inputs_on_host
    assert choose_offload(SIZES, 17 * GIB, demand(64 * 1024)).inputs_on_host


def test_what_the_recipe_wants_stays_and_no_more():
    assert choose_offload(SIZES, 40 * GIB, demand(resident=12)).resident == 12
    assert choose_offload(SIZES, None, demand(resident=12)).resident == 12
    assert choose_offload(SIZES, None, demand()).resident == 0
    more_than_there_are = demand(resident=10 * SIZES.number_of_layers)
    assert choose_offload(SIZES, GIB, more_than_there_are).resident == SIZES.number_of_layers
    assert least_offload(SIZES, more_than_there_are).resident == SIZES.number_of_layers


def test_no_more_layers_stay_than_there_are():
    for free in (None, 7 * GIB, 60 * GIB):
        chosen = choose_offload(SIZES, free, demand(resident=1000))
        assert chosen == choose_offload(SIZES, free, demand(resident=80)) and chosen.resident == 80
        assert spread(chosen.resident, chosen.layers) == list(range(80))


def test_where_nothing_fits_the_least_is_tried():
    least = choose_offload(SIZES, GIB, demand())
    assert (least.resident, least.inputs_on_host, least.most_tokens) == (0, True, 1024)


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize("name", ["llama-3.1-70b", "Mistral-Large-Instruct-2407"])
def test_70b_and_123b_fit_on_24_gb(name):
    shape = shape_of(name)
    found = plan_method(case_of(shape=shape), "qlora", on("rtx-4090"), market())
    assert found.fits and found.peak_bytes <= 23.64 * GIB
    assert 0 < found.settings["layers_resident"] < shape.num_layers
    assert found.settings["layers_resident"] + found.settings["layers_streamed"] == shape.num_layers
    assert list(found.memory) == list(PARTS) and sum(found.memory.values()) == found.peak_bytes
    assert "streams" in found.notes[0]


def test_without_offload_it_does_not():
    assert not planned("offload=off").fits
    assert "layers_streamed" not in planned("offload=off").settings
    assert "layers_streamed" not in plan_of(case_of(shape=LLAMA_8B), on()).gpus[0].methods[2].settings


def test_several_gpus_do_not_stream():
    two = Device(GPUS["rtx-4090"], 2, GPUS["rtx-4090"].usable_bytes)
    assert not plan_method(case_of(shape=LLAMA_70B), "qlora", two, market()).fits


def test_speed_never_falls_with_memory():
    for name in ("llama-3-8b", "Qwen3-32B", "llama-3.1-70b"):
        found = [planned(shape=shape_of(name), usable_gib=gib) for gib in (6, 8, 10, 12, 16, 24, 40, 80)]
        speeds = [plan.tokens_per_s for plan in found if plan.fits]
        assert len(speeds) >= 5
        assert all(more >= 0.9 * less for less, more in itertools.pairwise(speeds)), name


def test_what_fits_whole_is_not_streamed():
    assert "layers_streamed" not in planned(shape=LLAMA_8B, usable_gib=24).settings
    assert "layers_streamed" in planned(shape=LLAMA_8B, usable_gib=6).settings
    assert "layers_streamed" not in planned("gradient_checkpointing=off", usable_gib=24).settings


def test_short_steps_wait_for_the_link_and_long_ones_do_not():
    short = planned("max_length=64", "per_device_train_batch_size=1", "gradient_accumulation_steps=4")
    long = planned("max_length=2048", "per_device_train_batch_size=4", "gradient_accumulation_steps=1")
    assert short.limited_by == "link" and "waits for the link" in short.notes[-1]
    assert long.limited_by == "compute" and "transfers are hidden" in long.notes[-1]
    assert 256 < short.settings["hidden_from_tokens"] < 8192
    slow = Device(replace(GPUS["h200"], link_bytes_per_s=GPUS["h200"].link_bytes_per_s / 8), 1, 24 * GIB)
    behind = plan_method(
        case_of("max_length=2048", "gradient_accumulation_steps=1", shape=LLAMA_70B), "qlora", slow, market()
    )
    assert behind.limited_by == "link" and behind.tokens_per_s < 0.6 * long.tokens_per_s


def test_the_recipe_may_say_how_many_stay():
    found = planned("offload={resident_layers: 7}", "method=qlora")
    assert (found.settings["layers_resident"], found.settings["layers_streamed"]) == (7, 73)
    command = plan_of(case_of("offload={resident_layers: 7}", "method=qlora", shape=LLAMA_70B), on(), methods=["qlora"])
    assert "resident_layers" in command.gpus[0].recommended.command
