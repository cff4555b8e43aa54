"""Rows of docs/claims.md about models whose layers are streamed: what was measured, and what is planned for a 4090."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from counting import REPOSITORY, built_in, shape_of

from thriftune.plan.adapter import adapter_of
from thriftune.plan.engine import engine_case
from thriftune.plan.memory import setup_of
from thriftune.plan.offload import Streamed, streamed
from thriftune.plan.values import Time
from thriftune.plan.work import Rows, work_of
from thriftune.recipe import read_recipe

RECORDS = REPOSITORY / "benchmarks" / "results" / "streaming" / "steps.jsonl"
ROWS, LENGTH = 2, 2048  # a step of the records


def recorded(model: str, batch: str, cap_gib: int | None, **more: Any) -> dict[str, Any]:
    """The one measured case: `cap_gib` None for all layers on the GPU. With the paged optimizer and in bfloat16."""
    wanted = {"model": model, "batch": batch, "cap_gib": cap_gib, "optim": "paged_adamw_8bit", "fp8": False, **more}
    rows = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    (found,) = (row for row in rows if row["stage"] == "steps" and all(row[key] == wanted[key] for key in wanted))
    return dict(found)


def planned_streamed(model: str, gpu: str, overrides: Sequence[str] = ()) -> tuple[Streamed, Time]:
    """The planner's prediction for the same step on another card."""
    shape, card = shape_of(model), built_in(gpu)
    words = [f"per_device_train_batch_size={ROWS}", "gradient_accumulation_steps=1", f"max_length={LENGTH}"]
    recipe = read_recipe(overrides=["method=qlora", *words, *overrides])
    adapter = adapter_of(shape, recipe.lora, "qlora")
    case = engine_case(shape, adapter, setup_of(recipe, "qlora", False, True, "paged_adamw_8bit"), card)
    work = work_of(Rows((LENGTH,), (LENGTH - 1,), 100 * ROWS, "full rows"), recipe)
    found = streamed(case, recipe, work, min(card.usable_bytes, recipe.max_memory_bytes or card.usable_bytes))
    assert found.time is not None
    return found, found.time


def measured_and_planned(model: str, name: str, epoch_tokens: int) -> list[tuple[str, str, str]]:
    """(what, number, how) of `name` in 24 GiB and on an RTX 4090."""
    ran, of_gsm8k = recorded(name, "2x2048", 24), recorded(name, "gsm8k", 24)
    plan, time = planned_streamed(model, "rtx-4090")
    where = "measured: one H100 held to 24 GiB"
    stay, layers = plan.offload.resident, plan.offload.layers
    rate, peak = time.tokens_per_s, plan.memory.peak_bytes / 2**30
    return [
        ("layers streamed, steps of 4,096 tokens", f"{ran['tokens_per_s']:,} tokens/s", where),
        ("GPU memory, the driver's context included", f"{ran['peak_gib']:.1f} GiB", where),
        ("of a step: copying, and waiting for copies",
         f"{ran['copy_s']:.2f} s and {ran['waited_s']:.3f} s of {ran['step_s']:.2f} s", where),
        ("16 rows of GSM8K a step", f"{of_gsm8k['tokens_per_s']:,} tokens/s", where),
        ("an epoch of GSM8K at that speed", f"{epoch_tokens / of_gsm8k['tokens_per_s'] / 60:.0f} min", "arithmetic"),
        ("on an RTX 4090, steps of 4,096 tokens",
         f"{rate:,.0f} tokens/s, {peak:.1f} GiB", f"predicted: {stay} of {layers} layers stay"),
        ("its transfers are hidden from", f"{plan.hidden_from_tokens:,} tokens a step", "predicted"),
        ("an epoch of GSM8K on it", f"{epoch_tokens / rate / 3600:.1f} h", "arithmetic, if it keeps that speed"),
    ]  # fmt: skip
