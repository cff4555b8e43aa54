"""The planner's decisions one by one: settings, what would fit, dollars, rules of advice, the command, the text."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from datetime import date

import pytest

from thriftune.catalog.gpus import built_in_gpus
from thriftune.catalog.models import find_model
from thriftune.catalog.prices import ElectricityPrice
from thriftune.catalog.rows import Price
from thriftune.cli.app import recipe_of_words
from thriftune.engine.sizes import Keep
from thriftune.plan import advise
from thriftune.plan.command import settled, train_command
from thriftune.plan.cost import ELECTRICITY, POWER_SHARE, Market, cheapest, price_notes, run_dollars
from thriftune.plan.plan import METHODS, Question, make_plan, plan_method
from thriftune.plan.search import Case, Device, allowed_settings, candidates, choose, longest_that_fits, smallest_gpu
from thriftune.plan.show import gpu_table, plan_text, three_lines
from thriftune.plan.values import PARTS
from thriftune.plan.work import Rows, assumed_rows
from thriftune.planning import list_gpus, read_market
from thriftune.recipe import Recipe, read_recipe
from thriftune.records import PlannedMethod
from thriftune.shapes import from_config
from thriftune.units import GIB, format_dollars, format_seconds

GPUS = built_in_gpus()
TODAY = date(2026, 11, 24)
FREE_POWER = ElectricityPrice(0.2, "test", None)


def shape_of(name: str):
    row = find_model(name)
    assert row is not None
    return from_config(row.config, row.name)


LLAMA_8B = shape_of("llama-3-8b")
LLAMA_70B = shape_of("llama-3.1-70b")
MIXTRAL = shape_of("mixtral-8x7b")


def case_of(*words: str, shape=LLAMA_8B, rows: Rows | None = None) -> Case:
    recipe = read_recipe(None, words, {"model": "meta-llama/Meta-Llama-3-8B"})
    return Case(shape, recipe, rows or assumed_rows(recipe))


def on(key: str = "rtx-4090", count: int = 1, usable_gib: float | None = None) -> Device:
    gpu = GPUS[key]
    usable = gpu.usable_bytes if usable_gib is None else int(usable_gib * GIB)
    return Device(gpu, count, usable)


def price(gpu: str = "rtx-4090", usd: float = 0.5, kind: str = "on-demand", day: date = TODAY, least: int = 1) -> Price:
    return Price(gpu, f"at {usd}", kind, usd, "test", day, least)  # type: ignore[arg-type]


def market(*prices: Price) -> Market:
    return Market(list(GPUS.values()), prices, FREE_POWER, TODAY)


def plan_of(case: Case, *devices: Device, methods=METHODS, prefer="balanced", data_named=True, prices=None):
    question = Question(case, methods, prefer, data_named, "a test")
    return make_plan(question, devices, market(*(prices or (price(),))))


# ---------------------------------------------------------------- settings


def test_settings_left_open_are_tried_in_order_and_keep_the_rows_of_a_step():
    tried = list(allowed_settings(case_of()))
    assert tried == [(4, False), (4, True), (2, False), (1, False), (2, True), (1, True)]
    for found in candidates(case_of("engine=off"), "lora", on()):
        assert found.rows_at_once * found.accumulation == 16


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["per_device_train_batch_size=4"], [(4, False), (4, True)]),
        (["gradient_checkpointing=on"], [(4, True), (2, True), (1, True)]),
        (["gradient_checkpointing=off", "per_device_train_batch_size=8"], [(8, False)]),
        (["per_device_train_batch_size=3", "gradient_accumulation_steps=5"], [(3, False), (3, True)]),
    ],
)
def test_what_the_recipe_fixes_stays(words, expected):
    case = case_of(*words)
    assert list(allowed_settings(case)) == expected
    assert len(list(allowed_settings(replace(case, free=True)))) > 1


def test_with_room_nothing_is_recomputed_and_the_rows_stay():
    chosen = choose(candidates(case_of(), "lora", on("h200")), on("h200").usable_bytes)
    assert (chosen.rows_at_once, chosen.accumulation, chosen.checkpointing) == (4, 4, False)


def test_the_fastest_that_fits_is_taken():
    found = candidates(case_of("engine=off"), "lora", on("h200"))
    for usable_gib in (18, 20, 24, 30, 60):
        chosen = choose(found, int(usable_gib * GIB))
        fitting = [one for one in found if one.memory.peak_bytes <= usable_gib * GIB]
        assert chosen in fitting
        assert chosen.time.step_s == min(one.time.step_s for one in fitting)


def test_when_nothing_fits_the_smallest_is_taken():
    found = candidates(case_of("engine=off"), "lora", on())
    assert choose(found, GIB).memory.peak_bytes == min(one.memory.peak_bytes for one in found)


def test_without_a_gpu_the_first_that_fits_is_taken_and_no_time_is_known():
    device = Device(None, 1, 10**15)
    chosen = choose(candidates(case_of(), "lora", device), device.usable_bytes)
    assert (chosen.rows_at_once, chosen.checkpointing, chosen.time) == (4, False, None)
    found = plan_method(case_of(), "lora", device, market())
    assert (found.step_s, found.run_s, found.cost_usd, found.limited_by) == (0.0, 0.0, {}, "not estimated")


def test_the_longest_row_that_fits_is_found_by_bisection():
    case, device = case_of("max_length=32768"), on()
    smallest = choose(candidates(case, "lora", device), device.usable_bytes)
    assert smallest.memory.peak_bytes > device.usable_bytes
    length = longest_that_fits(case, "lora", device, smallest)
    assert length is not None and 128 <= length < 32768 and length % 64 == 0
    fits = plan_method(case_of(f"max_length={length}"), "lora", device, market())
    assert fits.fits
    assert not plan_method(case_of(f"max_length={length + 128}"), "lora", device, market()).fits
    assert longest_that_fits(case, "full", device, smallest) is None


def test_the_smallest_gpu_that_fits():
    case = case_of()
    smallest = choose(candidates(case, "full", on()), 1)
    found = smallest_gpu(case, "full", GPUS.values(), smallest)
    assert found is not None and found.usable_bytes >= smallest.memory.peak_bytes and not found.unified_memory
    assert not [
        gpu
        for gpu in GPUS.values()
        if not gpu.unified_memory and found.usable_bytes > gpu.usable_bytes > smallest.memory.peak_bytes * 1.01
    ]
    huge = case_of(shape=LLAMA_70B)
    assert smallest_gpu(huge, "full", GPUS.values(), choose(candidates(huge, "full", on()), 1)) is None


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_would():
    generic = ("per_device_train_batch_size=16", "engine=off")
    fixed = plan_method(case_of(*generic, "gradient_checkpointing=off"), "lora", on(), market())
    assert not fixed.fits
    assert "more than the 23.64 GiB that are usable" in fixed.notes[0]
    assert fixed.notes[1].startswith("fits with per_device_train_batch_size=")
    words = fixed.notes[1].removeprefix("fits with ").split()
    assert plan_method(case_of(*words, "engine=off"), "lora", on(), market()).fits
    large = plan_method(case_of("offload=off", shape=LLAMA_70B), "qlora", on(), market(price("a40", 0.44)))
    assert large.notes[1] == "fits on a40 (44.34 GiB usable, from $0.44 an hour)"
    assert "no single GPU" in plan_method(case_of(shape=LLAMA_70B), "full", on(), market()).notes[-1]


# ---------------------------------------------------------------- the engine


def test_the_engine_keeps_less_then_cuts_the_step_as_memory_gets_short():
    """What it does at run time, by the same function; the step's examples stay the same."""
    seen = []
    for usable_gib in (80, 50, 40, 36, 26, 21, 19):
        found = candidates(case_of(), "lora", on("h200", usable_gib=usable_gib))
        assert len(found) == 1 and (found[0].rows_at_once, found[0].accumulation) == (4, 4)
        assert found[0].memory.peak_bytes <= usable_gib * GIB
        seen.append((found[0].choice.most_tokens, found[0].choice.keep))
    assert seen[0] == (16_384, Keep.ALL) and seen[-1][0] < 16_384
    assert [tokens for tokens, _ in seen] == sorted((tokens for tokens, _ in seen), reverse=True)
    assert {keep for tokens, keep in seen if tokens == 16_384} > {Keep.ALL}


def test_4_bit_layers_are_held_unpacked_while_memory_lasts():
    held = [candidates(case_of(), "qlora", on("h200", usable_gib=gib))[0].choice.held for gib in (20, 62, 80)]
    assert held == sorted(held) and held[-1] == 32 and 0 < held[1] < 32
    little, much = (plan_method(case_of(), "qlora", on("h200", usable_gib=gib), market()) for gib in (62, 80))
    assert little.step_s > much.step_s and little.least_bytes == much.least_bytes < little.peak_bytes


@pytest.mark.parametrize(("switch", "keep"), [("on", Keep.INPUT), ("off", Keep.ALL)])
def test_the_engine_keeps_to_the_recipes_word_on_recomputation(switch, keep):
    found = plan_method(case_of(f"gradient_checkpointing={switch}"), "lora", on("h200"), market())
    assert found.fits and found.settings["layers_keep"] == keep.words
    assert found.settings["gradient_checkpointing"] == switch
    assert advise.recomputes(found) == (keep > Keep.ALL)


def test_without_recomputation_a_plan_that_does_not_fit_says_that_auto_would():
    found = plan_method(case_of("gradient_checkpointing=off"), "lora", on(usable_gib=19), market())
    assert not found.fits and "gradient_checkpointing=auto" in found.notes[1]
    words = found.notes[1].removeprefix("fits with ").split()
    assert plan_method(case_of(*words), "lora", on(usable_gib=19), market()).fits


@pytest.mark.parametrize(
    ("words", "method", "key", "reason"),
    [
        (["engine=off"], "lora", "h200", "the recipe says engine: off"),
        (["use_dora=true"], "lora", "h200", "a variant of LoRA"),
        ([], "qlora", "t4", "no bfloat16 products"),
        ([], "lora", "m4-max-128gb", "it runs on CUDA and on CPUs"),
        (["target_modules=[lm_head, q_proj]"], "lora", "h200", "an adapter on lm_head"),
    ],
)
def test_what_does_not_go_through_the_engine_says_why(words, method, key, reason):
    found = plan_method(case_of(*words), method, on(key, usable_gib=100), market())
    assert found.path == "generic" and "tokens_at_once" not in found.settings
    assert any(reason in note for note in found.notes)
    here = replace(on(), no_engine="Triton is not installed")
    assert plan_method(case_of(), "qlora", here, market()).path == "generic"


def test_a_falling_rank_is_planned_at_its_start_with_the_schedule_told():
    """Its peak is that of LoRA with the whole rank; asked about alone it is what is taken, with its own command."""
    case = case_of("method=dynamic", "dynamic.r_start=64", "dynamic.keep=0.25")
    plan = plan_of(case, on("h200"), methods=("dynamic",))
    (dynamic,) = plan.gpus[0].methods
    lora = plan_method(case_of("lora_r=64"), "lora", on("h200"), market(price()))
    assert dynamic.peak_bytes == lora.peak_bytes and dynamic.path == "engine"
    assert dynamic.trainable_parameters == lora.trainable_parameters
    told = next(note for note in dynamic.notes if note.startswith("starts at rank 64"))
    assert told.count("after step") == 4 and f"25 % after step {round(plan.steps / 2):,}" in told
    taken = plan.gpus[0].recommended
    assert taken.method == "dynamic" and "--method dynamic" in (taken.command or "")
    assert "dynamic.keep=0.25" in (taken.command or "")
    beside = plan_of(case_of("dynamic.r_start=64"), on("h200")).gpus[0]
    shown = next(found for found in beside.methods if found.method == "dynamic")
    assert shown.beside and shown.peak_bytes == dynamic.peak_bytes and beside.recommended.method == "lora"


def test_memory_is_compared_by_what_methods_need_not_by_what_they_take():
    """With memory free qlora holds its layers unpacked and takes more than lora; it could do with far less."""
    lora, qlora = (plan_method(case_of(), method, on("h200"), market()) for method in ("lora", "qlora"))
    assert qlora.peak_bytes > lora.peak_bytes and qlora.least_bytes < 0.6 * lora.least_bytes
    chosen, reasons = advise.recommend([lora, qlora], "memory")
    assert chosen is qlora and "with more free" in reasons[0]
    assert "qlora could do with" in advise.recommend([lora, qlora], "balanced")[1][1]


def test_on_a_cpu_the_engine_keeps_everything_and_takes_the_step_whole():
    """It does not count a computer's own memory, so there is no less that it would do with."""
    for usable in (10**15, 1000):
        found = plan_method(case_of(), "qlora", Device(None, 1, usable), market())
        assert found.path == "engine" and found.fits == (usable > 1000)
        assert found.settings["tokens_at_once"] == 16 * 1024 and found.settings["layers_keep"] == Keep.ALL.words
        assert found.least_bytes == found.peak_bytes and found.settings["layers_unpacked"] == 32


# ---------------------------------------------------------------- dollars


def test_dollars_are_hours_times_the_price_and_watts_times_the_kwh():
    found = run_dollars(GPUS["rtx-4090"], 2, 7200, [price(usd=0.5), price(usd=0.2, kind="spot", least=8)], FREE_POWER)
    assert found["at 0.5 on-demand"] == pytest.approx(2 * 2 * 0.5)
    assert found["at 0.2 spot"] == pytest.approx(2 * 8 * 0.2)
    assert found[ELECTRICITY] == pytest.approx(450 * POWER_SHARE * 2 * 2 / 1000 * 0.2)
    assert cheapest(found) == ("at 0.5 on-demand", 2.0)
    assert cheapest({ELECTRICITY: 0.1}) == (ELECTRICITY, 0.1)
    assert cheapest({}) is None


def test_old_and_whole_offers_and_no_offers_are_noted():
    old = price(day=date(2026, 5, 1))
    assert "prices seen more than 180 days ago, check them: at 0.5 on-demand (2026-05-01)" in price_notes(
        [old], FREE_POWER, 1, TODAY
    )
    assert price_notes([price()], FREE_POWER, 1, TODAY) == []
    old_power = ElectricityPrice(0.187, "a page", date(2026, 4, 26))
    assert (
        price_notes([price()], old_power, 1, TODAY)[0].endswith("electricity at home, $0.187 a kWh (2026-04-26)")
        and price_notes([price()], old_power, 1, date(2026, 5, 1)) == []
    )
    assert "(8 GPUs)" in price_notes([price(least=8)], FREE_POWER, 2, TODAY)[0]
    assert price_notes([price(least=8)], FREE_POWER, 8, TODAY) == []
    assert "no provider" in price_notes([], FREE_POWER, 1, TODAY)[0]
    assert any(
        "180 days" in note
        for note in make_plan(Question(case_of(), ("lora",), "balanced", True, ""), [on()], market(old)).gpus[0].notes
    )


# ---------------------------------------------------------------- advice


def planned(method: str, peak_gib: float, step_s: float = 1.0, usable_gib: float = 24, **changes) -> PlannedMethod:
    parts = dict.fromkeys(PARTS, 0) | {"weights": int(peak_gib * GIB)}
    values = {
        "method": method,
        "fits": peak_gib <= usable_gib,
        "peak_bytes": int(peak_gib * GIB),
        "usable_bytes": int(usable_gib * GIB),
        "allocated_bytes": 0,
        "reserved_bytes": 0,
        "memory": parts,
        "trainable_parameters": 1,
        "total_parameters": 100,
        "tokens_per_s": 1000 / step_s,
        "step_s": step_s,
        "run_s": 100 * step_s,
        "cost_usd": {"x on-demand": step_s},
        "limited_by": "compute",
        "settings": {"gradient_checkpointing": "off", "per_device_train_batch_size": 4},
    }
    return PlannedMethod(**{**values, **changes})


FULL, LORA, QLORA = planned("full", 120), planned("lora", 20), planned("qlora", 10, 1.3)


def test_lora_when_its_base_fits():
    chosen, reasons = advise.recommend([FULL, LORA, QLORA], "balanced")
    assert chosen is LORA
    assert "unquantised base fits" in reasons[0] and "save 10.00 GiB and take 1.30 times as long" in reasons[1]


def test_qlora_when_lora_does_not_fit():
    chosen, reasons = advise.recommend([FULL, planned("lora", 30), QLORA], "balanced")
    assert chosen is QLORA and "lora needs 6.00 GiB more than there is" in reasons[0]


def test_memory_as_the_constraint_takes_qlora_unless_it_is_slower_and_bigger():
    assert advise.recommend([LORA, QLORA], "memory")[0] is QLORA
    slow_and_big = planned("qlora", 21, 1.1)
    chosen, reasons = advise.recommend([LORA, slow_and_big], "memory")
    assert chosen is LORA and "slower and bigger" in reasons[0]
    assert "slower and bigger" in advise.recommend([LORA, slow_and_big], "balanced")[1][1]
    assert advise.recommend([LORA, planned("qlora", 21, 0.9)], "memory")[0] is LORA


def test_speed_takes_the_faster_and_says_when_recomputation_is_why():
    assert advise.recommend([LORA, QLORA], "speed")[0] is LORA
    recomputing = planned("lora", 20, 1.5, settings={"gradient_checkpointing": "on"})
    chosen, reasons = advise.recommend([recomputing, QLORA], "speed")
    assert chosen is QLORA and "has to recompute activations" in reasons[0]


def test_cost_takes_the_cheaper():
    chosen, reasons = advise.recommend([LORA, QLORA], "cost")
    assert chosen is LORA and "$1.00 at x on-demand" in reasons[0]
    assert advise.recommend([planned("lora", 20, cost_usd={}), QLORA], "cost")[0].method == "lora"


def test_full_only_for_quality_and_only_when_it_fits():
    small = planned("full", 22, 0.5)
    assert advise.recommend([small, LORA, QLORA], "balanced")[0] is LORA
    assert advise.recommend([small, LORA, QLORA], "speed")[0] is LORA
    chosen, reasons = advise.recommend([small, LORA, QLORA], "quality")
    assert chosen is small and "Biderman" in reasons[0]
    chosen, reasons = advise.recommend([FULL, LORA, QLORA], "quality")
    assert chosen is LORA and "needs 96.00 GiB more" in reasons[0]
    assert advise.recommend([small], "balanced")[0] is small


@pytest.mark.parametrize("prefer", advise.PREFERENCES)
def test_nothing_that_does_not_fit_is_recommended(prefer):
    chosen, reasons = advise.recommend([FULL, planned("lora", 30), planned("qlora", 25)], prefer)
    assert chosen is None and "no planned method fits" in reasons
    assert advise.recommend([FULL, LORA, planned("qlora", 25)], prefer)[0] is LORA
    assert advise.recommend([FULL, planned("lora", 30), QLORA], prefer)[0] is QLORA


@pytest.mark.parametrize(
    "rule",
    [
        *(advise.lora_when_its_base_fits, advise.qlora_when_lora_does_not_fit, advise.is_slower_and_bigger),
        *(advise.faster_adapter, advise.full_for_the_last_points, advise.full_does_not_fit, advise.few_rows_warning),
        *(advise.paged_optimizer_note, advise.several_gpus_note, advise.more_gpus_note, advise.sharded_full_note),
    ],
)
def test_every_rule_cites_why(rule):
    assert re.search(r"[A-Z]\w+ et al\. 20\d\d|litgpt's table \(A10G\)", rule.__doc__), rule.__name__


def test_few_rows_warn_of_learning_by_heart():
    assert "only 99 rows" in (advise.few_rows_warning(99, True) or "")
    assert advise.few_rows_warning(100, True) is None and advise.few_rows_warning(5, False) is None
    few = Rows((50,), (10,), 40, "forty rows")
    assert any("only 40 rows" in note for note in plan_of(case_of(rows=few), on()).notes)


def test_a_70b_on_24_gb_is_streamed_and_told_what_paging_does_not_do():
    plan = plan_of(case_of(shape=LLAMA_70B), on())
    found = plan.gpus[0]
    assert found.recommended.method == "qlora" and found.methods[2].settings["layers_streamed"] > 0
    (told,) = [note for note in found.notes if "paged optimizer" in note]
    assert "36.80 GiB; 23.64 GiB are usable" in told and "not weights" in told and "in this plan already" in told
    assert "qlora (streamed)" in plan_text(plan)
    for fits in (plan_of(case_of(), on()), plan_of(case_of(shape=LLAMA_70B), on("h200"))):
        assert not any("paged optimizer" in note for note in fits.gpus[0].notes)


def test_a_70b_on_24_gb_is_told_that_paged_optimizers_do_not_page_weights():
    found = plan_of(case_of("offload=off", shape=LLAMA_70B), on()).gpus[0]
    assert found.recommended.method is None and found.recommended.command is None
    text = " ".join(found.recommended.reasons)
    assert "it pages optimizer states, not weights" in text and "offload=auto" in text
    assert not any("paged" in reason for reason in plan_of(case_of(), on()).gpus[0].recommended.reasons)
    experts = " ".join(plan_of(case_of(shape=MIXTRAL), on()).gpus[0].recommended.reasons)
    assert "this model is of type mixtral" in experts and "offload=auto" not in experts


def test_lines_beside_the_methods_are_what_they_say_and_never_recommended():
    """Offload streams every layer; what was asked for by name, and machines that have none of it, get no such lines."""
    found = plan_of(case_of(), on("h200")).gpus[0]
    assert [plan.method for plan in found.methods if plan.beside] == ["lora-fp8", "dynamic", "qlora-offload"]
    qlora, away = found.methods[2], found.methods[-1]
    assert (away.settings["layers_resident"], away.settings["layers_streamed"]) == (0, 32)
    assert away.peak_bytes < 0.5 * qlora.peak_bytes and away.memory["weights"] < 0.5 * qlora.memory["weights"]
    asked = plan_method(case_of("offload={resident_layers: 0}", "method=qlora"), "qlora", on("h200"), market(price()))
    assert (asked.peak_bytes, asked.step_s) == (away.peak_bytes, away.step_s)
    for prefer in advise.PREFERENCES:
        question = Question(case_of(), METHODS, prefer, True, "")
        assert make_plan(question, [on("h200")], market()).gpus[0].recommended.method in METHODS
    for device in (on("h200", 2), on("t4")):
        assert "qlora-offload" not in [plan.method for plan in plan_of(case_of(), device).gpus[0].methods]
    assert not any(plan.beside for plan in plan_of(case_of(), on(), methods=("lora", "qlora")).gpus[0].methods)


def test_several_gpus_hold_a_whole_model_each():
    found = plan_of(case_of(), on("a100-80gb", 2)).gpus[0]
    text = " ".join(found.notes)
    assert "each holds the whole model" in text and "(FSDP) is not supported here yet" in text
    assert "GiB on each of 2" in text
    assert found.recommended.command.startswith("torchrun --nproc-per-node 2 -m thriftune train ")
    alone = plan_of(case_of(), on("a100-80gb")).gpus[0]
    assert "make a run faster, not smaller" in text and "not smaller" not in " ".join(alone.notes)
    assert found.methods[1].tokens_per_s > 1.5 * alone.methods[1].tokens_per_s


def test_several_gpus_are_considered_where_one_was_asked_about():
    alone, eight = (plan_of(case_of(), on("a100-80gb", count), prices=[price("a100-80gb")]).gpus[0] for count in (1, 8))
    (told,) = [note for note in alone.notes if note.startswith("of several such GPUs")]
    lora = eight.methods[1]
    assert f"8 take {format_seconds(lora.run_s)} and ${lora.cost_usd['at 0.5 on-demand']:.2g}" in told
    assert lora.run_s < 0.3 * alone.methods[1].run_s
    assert not any("of several" in note for note in eight.notes)
    streamed = plan_of(case_of(shape=LLAMA_70B), on()).gpus[0]
    assert streamed.recommended.method == "qlora" and not any("of several" in note for note in streamed.notes), (
        "layers are streamed to one GPU"
    )


def test_stacked_experts_stay_in_16_bits():
    assert "45.1 G of 46.7 G" in (advise.stacked_experts_note(MIXTRAL, METHODS) or "")
    assert advise.stacked_experts_note(MIXTRAL, ("lora",)) is None
    assert advise.stacked_experts_note(LLAMA_8B, METHODS) is None


# ---------------------------------------------------------------- the command and the text


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["lora_r=64", "lora.alpha=8", "max_length=512", "seed=7", "output=my run"],
        ["gradient_checkpointing=on", "per_device_train_batch_size=2", "optim=adamw_torch"],
        ["data.columns={prompt: question, completion: 'true'}", "target_modules=q_proj,v_proj"],
        ["chat_template='none'", "model.revision='1e3'", "report_to=[]"],
        ["data.path=some dir/x=y.jsonl", "lora.options={rank_pattern: {q_proj: 8}}"],
    ],
)
def test_the_command_reads_back_to_the_planned_recipe(words):
    recipe = read_recipe(None, words, {"model": "org/name", "data": "rows.jsonl"})
    case = Case(LLAMA_8B, recipe, assumed_rows(recipe))
    found = plan_method(case, "qlora", on(), market())
    line = shlex.split(train_command(recipe, found, 1, data_named=True))
    assert line[:4] == ["thriftune", "train", "org/name", "--data"]
    assert line[5] == "--method"
    again = recipe_of_words([line[2], *line[7:]], None, {"data": line[4], "method": line[6]})
    assert again == settled(recipe, found)


def test_full_drops_the_adapters_options_and_absent_data_gets_a_stand_in():
    recipe = read_recipe(None, ["lora_r=64"], {"model": "a/b"})
    found = plan_method(Case(LLAMA_8B, recipe, assumed_rows(recipe)), "full", on("h200"), market())
    line = train_command(recipe, found, 1, data_named=False)
    assert "lora" not in line and "--data rows.jsonl" in line


def test_the_text_is_at_most_100_columns_wide_and_says_everything():
    plan = plan_of(case_of(), on(), on("a100-80gb", 2), on("h200"))
    for article in (False, True):
        text = plan_text(plan, article)
        assert max(len(line) for line in text.splitlines()) <= 100
        assert "recommended: lora" in text and "2 x a100-80gb" in text
    text = plan_text(plan)
    for part in (*PARTS, "limited by", "trainable", "thriftune train"):
        assert part in text
    article = plan_text(plan, article=True)
    for row in ("trainable parameters", "share", "memory", "time an epoch", "rent an epoch", "QLoRA", "41,943,040"):
        assert row in article


def test_every_method_that_fits_is_priced_at_every_place_and_what_does_not_at_none():
    offers = (price(usd=2.0), price(usd=9.0, kind="spot"))
    text = plan_text(plan_of(case_of(), on("rtx-4090"), prices=offers))
    found = plan_of(case_of(), on("rtx-4090"), prices=offers).gpus[0]
    table = text[text.index("the run costs") :].split("\n\n")[0].splitlines()
    assert table[0].split()[3:] == [plan.method for plan in found.methods if plan.fits]
    assert [" ".join(line.split()[: -len(table[0].split()[3:])]) for line in table[1:]] == [
        "electricity at home", "at 2.0 on-demand", "at 9.0 spot",
    ]  # fmt: skip
    lora = next(plan for plan in found.methods if plan.method == "lora")
    assert table[2].split()[3] == format_dollars(lora.cost_usd["at 2.0 on-demand"])


@pytest.mark.parametrize("name", ["llama-3.1-405b", "mixtral-8x22b", "llama-3-8b", "llama-3.1-70b", "qwen2-0.5b"])
def test_wide_numbers_stay_in_100_columns(name):
    text = plan_text(plan_of(case_of("num_train_epochs=50", shape=shape_of(name)), on("t4"), on("h200", 8)))
    assert max(len(line) for line in text.splitlines()) <= 100, text


def test_the_article_table_is_of_one_epoch_or_of_the_steps_asked_for():
    one = plan_of(case_of("num_train_epochs=1"), on("h200"))
    three = plan_of(case_of("num_train_epochs=3"), on("h200"))
    row = [
        next(line for line in plan_text(plan, True).splitlines() if "time an epoch" in line) for plan in (one, three)
    ]
    assert row[0] == row[1]
    assert "time for 7 steps" in plan_text(plan_of(case_of("max_steps=7"), on("h200")), True)


def test_three_lines_before_a_run():
    found = plan_of(case_of(), on()).gpus[0]
    lines = three_lines(found, found.methods[1])
    assert len(lines) == 3 and all(line.startswith("plan: ") for line in lines)
    assert "of 23.64 GiB free: weights 14.96 GiB" in lines[0]
    assert "a step" in lines[1] and "electricity at home" in lines[1]
    assert "unquantised base fits" in lines[2] and "limited by" in lines[2]
    refused = three_lines(found, found.methods[0])
    assert "DOES NOT FIT" in refused[0] and "full: asked for" in refused[2]


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "$0.00"), (0.00312, "$0.0031"), (0.00003, "<$0.0001"), (0.42, "$0.42"), (640.4, "$640")]
)
def test_dollars_have_two_digits_that_mean_something(amount, text):
    assert format_dollars(amount) == text


def test_the_list_of_gpus_has_them_all():
    rows = list_gpus()
    assert [row["gpu"] for row in rows][: len(GPUS)] == list(GPUS)
    lines = gpu_table(rows).splitlines()
    assert len(lines) == len(rows) + 3 and max(map(len, lines)) <= 100
    today = read_market().today
    for row, line in zip(rows, lines[1:-2], strict=True):
        old = row["price_date"] is not None and (today - date.fromisoformat(row["price_date"])).days > 180
        assert row["price_is_old"] == old == line.endswith(" old"), line
    assert any(row["price_is_old"] for row in rows) and lines[-1].startswith("old: seen more than 180 days ago")
    assert len(gpu_table([row for row in rows if not row["price_is_old"]]).splitlines()) < len(rows)


def test_the_recipes_method_and_defaults_do_not_change():
    recipe = Recipe()
    before = recipe.dump()
    plan_of(Case(LLAMA_8B, recipe, assumed_rows(recipe)), on())
    assert recipe.dump() == before
