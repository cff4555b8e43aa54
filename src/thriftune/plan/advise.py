"""Which method to take, by rules a person can check: each says why in its docstring, and in the words it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from thriftune.catalog.rows import Gpu
from thriftune.plan.cost import cheapest
from thriftune.records import PlannedMethod
from thriftune.shapes import ModelShape
from thriftune.units import format_bytes, format_count, format_dollars, format_seconds

Prefer = Literal["balanced", "speed", "memory", "quality", "cost"]
PREFERENCES: tuple[Prefer, ...] = ("balanced", "speed", "memory", "quality", "cost")
FEW_ROWS = 100
SMALL_CARD_BYTES = 26 * 1024**3  # a 24 GB card, by any maker's count


def recommend(planned: Sequence[PlannedMethod], prefer: Prefer) -> tuple[PlannedMethod | None, list[str]]:
    """The method to take of those planned for one GPU, None when none fits; and the reasons in words."""
    by_name = {plan.method: plan for plan in planned}
    lora, qlora, full = (by_name.get(name) for name in ("lora", "qlora", "full"))
    if prefer == "quality" and full is not None and full.fits:
        return full, [full_for_the_last_points(full)]
    reasons = [full_does_not_fit(full)] if prefer == "quality" and full is not None else []
    chosen, why = _adapter(lora, qlora, prefer)
    if chosen is not None:
        return chosen, [*reasons, *why]
    dynamic = by_name.get("dynamic")
    if dynamic is not None and dynamic.fits and lora is None and qlora is None:
        return dynamic, ["dynamic was asked for, and it fits"]
    if full is not None and full.fits and lora is None and qlora is None:
        return full, ["full fine-tuning was asked for, and it fits"]
    return None, ["no planned method fits", *why]


def _adapter(
    lora: PlannedMethod | None, qlora: PlannedMethod | None, prefer: Prefer
) -> tuple[PlannedMethod | None, list[str]]:
    fitting = [plan for plan in (lora, qlora) if plan is not None and plan.fits]
    if not fitting:
        return None, []
    if lora is None or qlora is None:
        return fitting[0], [f"{fitting[0].method} fits; the other adapter method was not asked about"]
    if not lora.fits:
        return qlora, [qlora_when_lora_does_not_fit(lora, qlora)]
    if not qlora.fits:
        return lora, [lora_when_its_base_fits(lora), "qlora does not fit with these settings"]
    if prefer == "memory":
        return qlora_for_memory(lora, qlora)
    if prefer == "speed":
        return faster_adapter(lora, qlora)
    if prefer == "cost":
        return cheaper_adapter(lora, qlora)
    reasons = [lora_when_its_base_fits(lora), what_qlora_would_change(lora, qlora)]
    return lora, [reason for reason in reasons if reason]


def lora_when_its_base_fits(lora: PlannedMethod) -> str:
    """LoRA when the 16-bit base fits: no step unpacks weights, and the adapter merges exactly into what it was trained
    on, so nothing is added when answers are served (Hu et al. 2021, arXiv 2106.09685, section 4.2). Google Cloud's
    study of open models found LoRA 66 % faster than QLoRA and up to 40 % cheaper."""
    return (
        f"lora: the unquantised base fits ({format_bytes(lora.peak_bytes)} of {format_bytes(lora.usable_bytes)} "
        "usable), so no step has to unpack 4-bit weights, and the adapter merges exactly into the weights it was "
        "trained on"
    )


def qlora_when_lora_does_not_fit(lora: PlannedMethod, qlora: PlannedMethod) -> str:
    """QLoRA when the 16-bit base does not fit: NF4 holds a weight in about 4.13 bits, and with double quantisation
    reaches 16-bit LoRA's scores (Dettmers et al. 2023, arXiv 2305.14314, table 3)."""
    over = format_bytes(lora.peak_bytes - lora.usable_bytes)
    return (
        f"qlora: lora needs {over} more than there is; with the base in 4 bits the peak is "
        f"{format_bytes(qlora.peak_bytes)} of {format_bytes(qlora.usable_bytes)} usable"
    )


def is_slower_and_bigger(qlora: PlannedMethod, lora: PlannedMethod) -> bool:
    """QLoRA pays for unpacking each weight in every pass. For small models at large batches the buffers for that are
    larger than what 4 bits save: litgpt's table (A10G) has TinyLlama 1.1B at 13.50 GB with LoRA and 16.24 GB with
    QLoRA, and 8.09 against 8.70 minutes."""
    return least_bytes(qlora) >= least_bytes(lora) and qlora.step_s >= lora.step_s


def least_bytes(plan: PlannedMethod) -> int:
    """What a method needs: the engine fills the memory that is free, and could do with less."""
    return plan.peak_bytes if plan.least_bytes is None else plan.least_bytes


def qlora_for_memory(lora: PlannedMethod, qlora: PlannedMethod) -> tuple[PlannedMethod, list[str]]:
    """When memory is the constraint: the smaller of the two, which is not QLoRA for every model (see
    `is_slower_and_bigger`)."""
    needed = {plan.method: format_bytes(least_bytes(plan)) for plan in (lora, qlora)}
    if is_slower_and_bigger(qlora, lora):
        return lora, [
            f"lora: for this model and batch qlora is slower and bigger ({needed['qlora']} against {needed['lora']})"
        ]
    small, large = sorted((lora, qlora), key=least_bytes)
    why = f"{small.method}: the least memory, {needed[small.method]} against {needed[large.method]} of {large.method}"
    if small.path == "engine":
        why += "; with more free, the engine takes more and is faster"
    return small, [why]


def faster_adapter(lora: PlannedMethod, qlora: PlannedMethod) -> tuple[PlannedMethod, list[str]]:
    """When speed matters: usually LoRA (litgpt, A10G, Llama-2-7B: 32.8 against 45.7 minutes), but QLoRA's room can let
    it skip recomputation that LoRA needs, which costs a third of the time (Chen et al. 2016, arXiv 1604.06174)."""
    fast, slow = (lora, qlora) if lora.step_s <= qlora.step_s else (qlora, lora)
    why = f"{fast.method}: the faster one, {fast.step_s:.3g} s a step against {slow.step_s:.3g} s of {slow.method}"
    if recomputes(slow) and not recomputes(fast):
        why += f", which has to recompute activations to fit ({fast.method} does not)"
    return fast, [why]


def cheaper_adapter(lora: PlannedMethod, qlora: PlannedMethod) -> tuple[PlannedMethod, list[str]]:
    """When dollars matter: on one GPU they follow the hours, so the faster one is the cheaper one."""
    cheap, other = (lora, qlora) if lora.run_s <= qlora.run_s else (qlora, lora)
    rent, other_rent = cheapest(cheap.cost_usd), cheapest(other.cost_usd)
    if rent is None or other_rent is None:
        return cheap, [f"{cheap.method}: the shorter run of the two, and so the cheaper one"]
    return cheap, [
        f"{cheap.method}: {format_dollars(rent[1])} at {rent[0]}, {other.method} {format_dollars(other_rent[1])}; "
        "compare with smaller GPUs, which may be cheaper still (--gpu can be repeated)"
    ]


def what_qlora_would_change(lora: PlannedMethod, qlora: PlannedMethod) -> str | None:
    """What a person gives up with the default, in this plan's own numbers; None where no time is known."""
    if is_slower_and_bigger(qlora, lora):
        return "qlora would be slower and bigger here: 4 bits save less than unpacking them costs"
    saved = least_bytes(lora) - least_bytes(qlora)
    if not lora.step_s or saved <= 0:
        return None
    ratio = qlora.step_s / lora.step_s
    if qlora.path == "engine":
        return (
            f"qlora could do with {format_bytes(saved)} less ({format_bytes(least_bytes(qlora))}); with this much free "
            f"it takes {ratio:.2f} times as long a step"
        )
    if ratio > 1:
        return f"qlora would save {format_bytes(saved)} and take {ratio:.2f} times as long a step"
    return f"qlora would save {format_bytes(saved)} and be {1 / ratio:.2f} times as fast: --prefer speed takes it"


def recomputes(plan: PlannedMethod) -> bool:
    return bool(plan.settings.get("recomputes", plan.settings["gradient_checkpointing"] == "on"))


def full_for_the_last_points(full: PlannedMethod) -> str:
    """Full fine-tuning when the last points matter and it fits: on code and mathematics LoRA stayed behind it, and
    forgot less of what the base could do (Biderman et al. 2024, arXiv 2405.09673)."""
    return (
        f"full: it fits ({format_bytes(full.peak_bytes)} of {format_bytes(full.usable_bytes)} usable); with much "
        "new to learn it scores above LoRA, and forgets more of what the base could do (Biderman et al. 2024)"
    )


def full_does_not_fit(full: PlannedMethod) -> str:
    """AdamW asks for 16 bytes a parameter (Rajbhandari et al. 2019, ZeRO, arXiv 1910.02054, section 3.1)."""
    over = format_bytes(full.peak_bytes - full.usable_bytes)
    return f"full fine-tuning would score highest, and needs {over} more than there is: an adapter is the next best"


def few_rows_warning(rows: int, known: bool) -> str | None:
    """Below about 100 rows an adapter learns the rows by heart: OpenAI's guide to fine-tuning sees clear gains from 50
    to 100 examples on, LIMA took 1,000 chosen ones (Zhou et al. 2023, arXiv 2305.11206)."""
    if not known or rows >= FEW_ROWS:
        return None
    return (
        f"only {rows} rows: fewer than {FEW_ROWS} are easily learnt by heart. Hold some out (eval_fraction=0.2), "
        "keep to one or two epochs, take a small rank (lora_r=4), or write more rows"
    )


def paged_optimizer_note(qlora: PlannedMethod, whole_bytes: float, gpu: Gpu, no_engine: str | None) -> str | None:
    """A 70B does not fit on 24 GB: 'paged' optimizers page optimizer states (Dettmers et al. 2023, section 3), which an
    adapter hardly has; the `whole_bytes` of 4-bit weights stay. Streaming layers from the host does help; it is planned
    unless the recipe or the number of GPUs forbids it, or the engine, which does it, does not take the run: `no_engine`
    says why."""
    streamed = "layers_streamed" in qlora.settings
    if whole_bytes <= 0.95 * qlora.usable_bytes or (qlora.fits and not streamed):
        return None
    small = " on a card of 24 GB or less" if gpu.memory_bytes <= SMALL_CARD_BYTES else ""
    if no_engine is not None:
        way = f", for which the engine is needed, and it does not take this run: {no_engine}"
    else:
        way = ", and is in this plan already" if streamed else ", on one GPU: offload=auto"
    return (
        f"qlora's weights alone take {format_bytes(whole_bytes)}; {format_bytes(qlora.usable_bytes)} are usable. A "
        f"paged optimizer does not help{small}: it pages optimizer states, not weights. Streaming layers from the "
        f"computer's memory is what helps{way}"
    )


def several_gpus_note(count: int, planned: Sequence[PlannedMethod]) -> str | None:
    """Data parallel is what there is today: each GPU holds the whole model and gradients are exchanged (Li et al. 2020,
    PyTorch Distributed, arXiv 2006.15704)."""
    if count == 1:
        return None
    most = max(plan.peak_bytes for plan in planned)
    return (
        f"{count} GPUs take steps of {count} times the rows, and each holds the whole model (up to "
        f"{format_bytes(most)} here): more GPUs make a run faster, not smaller. Lower gradient_accumulation_steps to "
        "keep a step's rows"
    )


def more_gpus_note(several: Mapping[int, PlannedMethod]) -> str | None:
    """What data parallel over more of the same GPU would do to the run, by how many there are (Li et al. 2020): sooner
    done, at about the price of one, as long as the exchange of gradients is short beside a step."""
    told = [
        f"{count} take {format_seconds(plan.run_s)}" + (f" and {format_dollars(rent[1])}" if rent else "")
        for count, plan in several.items()
        if plan.fits and plan.step_s
        for rent in (cheapest(plan.cost_usd),)
    ]
    if not told:
        return None
    return (
        f"of several such GPUs, {', '.join(told)}: each holds the whole model, and a step has as many times the rows "
        "(--gpus plans them)"
    )


def sharded_full_note(full: PlannedMethod | None, count: int) -> str | None:
    """What fully sharded training would hold on each GPU: weights, gradients and optimizer state divided by the number
    of GPUs, the rest whole (Rajbhandari et al. 2019, ZeRO stage 3; Zhao et al. 2023, FSDP, arXiv 2304.11277)."""
    if full is None or full.fits:
        return None
    shared = sum(full.memory[part] for part in ("weights", "gradients", "optimizer"))
    rest = full.peak_bytes - shared
    counts = [count] if count > 1 else [2, 4, 8]
    needs = ", ".join(f"{format_bytes(shared / number + rest)} on each of {number}" for number in counts)
    return f"full fine-tuning sharded over several GPUs (FSDP) is not supported here yet; it would need about {needs}"


def stacked_experts_note(shape: ModelShape, methods: Sequence[str]) -> str | None:
    """transformers 5 keeps a layer's experts in one tensor each, which are no linears; bitsandbytes quantises linears
    only, so 4-bit loading leaves them in 16 bits."""
    stacked = shape.sum_over_linears(lambda linear: 0 if linear.is_module else linear.weights)
    if not stacked or "qlora" not in methods:
        return None
    return (
        f"qlora leaves the stacked experts ({format_count(stacked)} of {format_count(shape.total_parameters)} "
        "parameters) in 16 bits: 4-bit loading reaches linears only"
    )
