"""The answer to "what would this run take": every method on every GPU asked about, and one recommendation for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from thriftune.catalog.rows import Gpu
from thriftune.engine.sizes import Choice, Keep
from thriftune.plan.advise import (
    Prefer,
    few_rows_warning,
    more_gpus_note,
    paged_optimizer_note,
    recommend,
    several_gpus_note,
    sharded_full_note,
    stacked_experts_note,
)
from thriftune.plan.command import PINNED, train_command
from thriftune.plan.cost import Market, price_notes, run_dollars
from thriftune.plan.memory import setup_of, weight_bytes
from thriftune.plan.search import (
    Candidate,
    Case,
    Device,
    Stopwatch,
    candidates,
    choose,
    longest_that_fits,
    may_stream,
    smallest_gpu,
)
from thriftune.plan.time import efficiency_of
from thriftune.plan.values import FP8_LORA, OFFLOADED, Work
from thriftune.recipe import contradictions_of_dynamic, cut_schedule
from thriftune.records import GpuPlan, Plan, PlannedMethod, Recommendation
from thriftune.units import format_bytes, format_dollars

METHODS = ("full", "lora", "qlora")  # that are planned when none is named
KNOWN_METHODS = (*METHODS, "dynamic")
MORE_GPUS = (2, 4, 8)  # considered where one was asked about
NO_TIME = "not estimated"  # limited_by where there is no GPU
NO_CPU_TIME = "time is not estimated for CPUs; `thriftune plan --measure` times a few layers on this one"


@dataclass(frozen=True, slots=True)
class Question:
    """A case and how its answer is wanted. `data_named`: the rows' lengths are of a person's data, not assumed. With a
    `stopwatch` the times of what fits are its own instead of the table's. `methods_named`: no others are wanted."""

    case: Case
    methods: Sequence[str]
    prefer: Prefer
    data_named: bool
    model_source: str
    notes: tuple[str, ...] = ()
    stopwatch: Stopwatch | None = None
    methods_named: bool = False


def make_plan(question: Question, devices: Sequence[Device], market: Market) -> Plan:
    """Raises InputError when an adapter's targets match nothing in the model."""
    case = question.case
    work = case.work(case.recipe.train.per_device_train_batch_size, devices[0].count)
    warning = few_rows_warning(case.rows.count, question.data_named)
    return Plan(
        model=case.recipe.model.name,
        model_source=question.model_source,
        data=case.rows.source,
        steps=work.steps,
        tokens=work.tokens,
        gpus=[plan_gpu(question, device, market) for device in devices],
        notes=[*question.notes, *case.shape.notes, *([warning] if warning else [])],
    )


def plan_gpu(question: Question, device: Device, market: Market) -> GpuPlan:
    case = question.case
    planned = [plan_method(case, method, device, market, question.stopwatch) for method in question.methods]
    chosen, reasons = recommend(planned, question.prefer)
    by_name = {plan.method: plan for plan in planned}
    paged = None
    if device.gpu is not None and "qlora" in by_name:
        whole_bytes = weight_bytes(case.shape, setup_of(case.recipe, "qlora", False, True))
        no_engine = case.engine_reason("qlora", device)
        paged = paged_optimizer_note(by_name["qlora"], whole_bytes, device.gpu, no_engine)
    if chosen is None:
        closest = min(planned, key=lambda plan: plan.peak_bytes)
        reasons += [f"{closest.method} {note}" for note in closest.notes]
        reasons += [paged] if paged else []
    else:
        reasons += [f"{chosen.method} {note}" for note in chosen.notes]
    command = None
    if chosen is not None:
        command = train_command(case.recipe, chosen, device.count, question.data_named)
    notes = [
        several_gpus_note(device.count, planned),
        _on_more_gpus(question, device, chosen, market),
        sharded_full_note(by_name.get("full"), device.count) if device.gpu else None,
        stacked_experts_note(case.shape, question.methods),
        paged if chosen is not None else None,
        *_notes_of_times(question, device, planned, chosen),
        *_notes_of_gpu(device, market),
    ]
    return GpuPlan(
        gpu=device.gpu.key if device.gpu else "cpu",
        gpus=device.count,
        methods=[*planned, *_beside(question, by_name, device, market)],
        recommended=Recommendation(method=chosen.method if chosen else None, reasons=reasons, command=command),
        notes=[note for note in notes if note],
    )


def _on_more_gpus(question: Question, device: Device, chosen: PlannedMethod | None, market: Market) -> str | None:
    """For one GPU on which the method that is taken fits."""
    if chosen is None or device.gpu is None or device.gpu.unified_memory or device.count > 1 or question.stopwatch:
        return None
    several = {
        count: plan_method(question.case, chosen.method, replace(device, count=count), market) for count in MORE_GPUS
    }
    return more_gpus_note(several)


def _beside(
    question: Question, planned: Mapping[str, PlannedMethod], device: Device, market: Market
) -> list[PlannedMethod]:
    """Further ways to train, a line each where they could be had and no methods were named. They are never recommended,
    because what they cost is for the user to weigh: 8-bit products and a rank that falls some accuracy, streaming of
    layers that would fit the computer's memory."""
    case = question.case
    if question.methods_named or tuple(question.methods) != METHODS or case.recipe.precision != "auto":
        return []
    if device.gpu is None or question.stopwatch is not None:
        return []
    found = []
    eight = replace(case, recipe=case.recipe.model_copy(update={"precision": "fp8"}))
    if eight.engine_reason("lora", device) is None:
        found.append(plan_method(eight, "lora", device, market).model_copy(update={"method": FP8_LORA}))
    if _refusal(case, "dynamic", device, None) is None:
        found.append(plan_method(case, "dynamic", device, market))
    if case.engine_reason("qlora", device) is None and "layers_streamed" not in planned["qlora"].settings:
        away = replace(case, recipe=case.recipe.model_copy(update={"offload": {"resident_layers": 0}}))
        if may_stream(away.recipe, "qlora", device):
            found.append(plan_method(away, "qlora", device, market).model_copy(update={"method": OFFLOADED}))
    return [plan.model_copy(update={"beside": True}) for plan in found]


def _notes_of_times(
    question: Question, device: Device, planned: Sequence[PlannedMethod], chosen: PlannedMethod | None
) -> list[str]:
    """Where the times come from. What was timed says so itself; the chosen method's words are among its reasons."""
    if question.stopwatch is not None:
        return [f"{plan.method} {plan.notes[-1]}" for plan in planned if plan.fits and plan is not chosen]
    if device.gpu is None:
        return [NO_CPU_TIME]
    if efficiency_of(device.gpu).measured:
        return []
    return [
        "times are from this GPU's stated rates and the shares of them that an H200 reached: nobody has measured this "
        "kind of GPU with thriftune yet; on a machine that has one, --measure does"
    ]


def _notes_of_gpu(device: Device, market: Market) -> list[str]:
    gpu = device.gpu
    if gpu is None:
        return []
    notes = []
    if gpu.unified_memory:
        notes.append("thriftune trains on CUDA GPUs and CPUs today; the numbers are what this GPU would need")
    return [*notes, *price_notes(market.prices_of(gpu), market.electricity, device.count, market.today)]


def plan_method(
    case: Case, method: str, device: Device, market: Market, stopwatch: Stopwatch | None = None
) -> PlannedMethod:
    """One method with the best settings that the recipe leaves open; the smallest ones when nothing fits."""
    adapter = case.adapter(method)
    reason = case.engine_reason(method, device)
    chosen = choose(candidates(case, method, device), device.usable_bytes)
    refusal = _refusal(case, method, device, reason)
    fits = refusal is None and chosen.memory.peak_bytes <= device.usable_bytes
    time, work = chosen.time, chosen.work
    step_s = time.step_s if time else 0.0
    if refusal is not None:
        notes = [refusal]
    elif fits:
        notes = _settings_notes(case, method, chosen, reason)
    else:
        notes = _what_would_fit(case, method, device, chosen, market)
    if method == "dynamic" and refusal is None:
        notes = [*notes, _cuts_note(case, work.steps)]
    if stopwatch is not None and fits and chosen.streamed is not None:
        notes = [*notes, "was not measured: a few layers do not tell how transfers of all of them hide"]
    elif stopwatch is not None and fits:
        timed = stopwatch(method, chosen)
        step_s = step_s if timed.step_s is None else timed.step_s
        notes = [*notes, timed.note]
    elif stopwatch is not None:
        notes = [*notes, "was not measured, because it does not fit"]
    run_s = step_s * work.steps
    cost = {}
    if device.gpu is not None:
        cost = run_dollars(device.gpu, device.count, run_s, market.prices_of(device.gpu), market.electricity)
    return PlannedMethod(
        method=method,
        fits=fits,
        peak_bytes=chosen.memory.peak_bytes,
        usable_bytes=device.usable_bytes,
        allocated_bytes=chosen.memory.allocated_bytes,
        reserved_bytes=chosen.memory.reserved_bytes,
        memory=chosen.memory.parts,
        trainable_parameters=adapter.trained,
        total_parameters=case.shape.total_parameters,
        tokens_per_s=work.tokens_per_step / step_s if step_s else 0.0,
        step_s=step_s,
        run_s=run_s,
        cost_usd=cost,
        limited_by=time.limited_by if time else NO_TIME,
        settings=chosen.settings(case.recipe),
        path=chosen.path,
        least_bytes=chosen.least_bytes,
        notes=notes,
    )


def _refusal(case: Case, method: str, device: Device, no_engine: str | None) -> str | None:
    """Why training would refuse this, however much memory there is; None where it would not."""
    if case.recipe.precision == "fp8" and method != "full" and no_engine is not None:
        return f"is refused with precision=fp8, which only the engine has: {no_engine}"
    if method != "dynamic":
        return None
    if device.count > 1:
        return "is refused on several GPUs: it runs in one process"
    problems = contradictions_of_dynamic(case.recipe)
    return f"is refused: {problems[0]}" if problems else None


def _settings_notes(case: Case, method: str, chosen: Candidate, no_engine: str | None) -> list[str]:
    """Sentences without their subject, the method. `no_engine` says why it does not go through the engine."""
    if chosen.streamed is not None:
        return chosen.streamed.notes(chosen.work)
    if chosen.choice is not None:
        return _engine_notes(chosen.choice, chosen.work)
    asked = case.recipe.train.per_device_train_batch_size
    rows = f"{chosen.work.rows} row{'s' if chosen.work.rows > 1 else ''}"
    notes = [f"takes {rows} at once, up to {chosen.work.rows * chosen.work.length:,} tokens with padding"]
    if chosen.rows_at_once < asked:
        notes.append(
            f"accumulates {chosen.accumulation} micro-batches instead of {case.rows_a_step // asked}, for memory"
        )
    if chosen.checkpointing and case.recipe.train.gradient_checkpointing == "auto":
        notes.append("recomputes activations in the backward pass, for memory")
    if method != "full":
        notes.append(f"does not go through the engine: {no_engine}")
    return notes


def _cuts_note(case: Case, steps: int) -> str:
    """The peak is that of the start; what cuts free is for nothing that comes before them."""
    schedule = cut_schedule(case.recipe.dynamic, steps)
    told = ", ".join(f"{100 * share:.0f} % after step {step:,}" for step, share in schedule.items())
    return f"starts at rank {case.recipe.dynamic.r_start}, which the peak is for; of the adapter stays {told}"


def _engine_notes(choice: Choice, work: Work) -> list[str]:
    whole = choice.most_tokens >= work.packed.largest
    rows = "takes a step's rows at once, up to" if whole else "cuts a step into parts of up to"
    notes = [f"{rows} {choice.most_tokens:,} tokens side by side without padding (the engine)"]
    if choice.keep > Keep.ALL:
        notes.append(f"has layers keep {choice.keep.words} and computes the rest again, for memory")
    return notes


def _what_would_fit(case: Case, method: str, device: Device, smallest: Candidate, market: Market) -> list[str]:
    """By how much it does not fit, and the nearest changes with which it would."""
    peak = smallest.memory.peak_bytes
    notes = [
        f"needs {format_bytes(peak)} at its smallest settings, {format_bytes(peak - device.usable_bytes)} more than "
        f"the {format_bytes(device.usable_bytes)} that are usable"
    ]
    free = case.freed
    freed = choose(candidates(free, method, device), device.usable_bytes)
    if freed.memory.peak_bytes <= device.usable_bytes:
        settings = freed.settings(free.recipe)
        notes.append(f"fits with {' '.join(f'{name}={settings[name]}' for name in PINNED)}")
        return notes
    length = longest_that_fits(free, method, device, freed)
    if length is not None:
        at_once = f" ({freed.rows_at_once} rows at once)" if freed.choice is None else ""
        notes.append(f"fits with max_length={length}{at_once}")
    gpu = smallest_gpu(free, method, market.gpus, freed)
    if gpu is not None:
        notes.append(f"fits on {gpu.key} ({format_bytes(gpu.usable_bytes)} usable{_price_of(gpu, market)})")
    else:
        notes.append("fits on no single GPU of the catalogue")
    return notes


def _price_of(gpu: Gpu, market: Market) -> str:
    offer = market.least_offer(gpu)
    if offer is None:
        return ""
    several = f" for {offer.min_gpus}" if offer.min_gpus > 1 else ""
    return f", from {format_dollars(offer.usd_per_hour * offer.min_gpus)} an hour{several}"
