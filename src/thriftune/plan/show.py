"""A plan as a person reads it, in at most 100 columns."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from thriftune.catalog.rows import STALE_AFTER_DAYS
from thriftune.plan.cost import ELECTRICITY, cheapest
from thriftune.plan.values import PARTS
from thriftune.records import GpuPlan, Plan, PlannedMethod
from thriftune.units import GIB, MIB, format_bytes, format_count, format_dollars, format_seconds, format_share

WIDTH = 100
OLD_PRICES = f"old: seen more than {STALE_AFTER_DAYS} days ago; prices of your own go into ~/.config/thriftune/*.yaml"
ARTICLE_NAMES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA", "dynamic": "dynamic rank"}


def plan_text(plan: Plan, article: bool = False) -> str:
    """The whole answer; with `article` the methods side by side instead of one a line."""
    lines = [
        f"{plan.model}: {plan.model_source}",
        f"data: {plan.data}",
        f"run: {plan.steps:,} steps, {plan.tokens:,} tokens",
    ]
    lines = [part for line in lines for part in _wrapped(line, "  ")]
    for found in plan.gpus:
        lines += ["", *_gpu_lines(found, article)]
    if plan.notes:
        lines += ["", *_listed("notes", plan.notes)]
    return "\n".join(lines)


def _gpu_lines(found: GpuPlan, article: bool) -> list[str]:
    name = f"{found.gpus} x {found.gpu}" if found.gpus > 1 else found.gpu
    lines = [f"{name}: {format_bytes(found.methods[0].usable_bytes)} usable" + (" each" if found.gpus > 1 else "")]
    lines += _indented(_article_rows(found) if article else _method_rows(found.methods))
    if not article:
        own = [plan for plan in found.methods if not plan.beside]
        counts = {plan.trainable_parameters for plan in own}
        others = [plan for plan in found.methods if plan.trainable_parameters not in counts]
        trained = (f"{plan.method} {_trainable_words(plan)}" for plan in (*own, *others))
        lines += [
            *_wrapped(f"  trainable parameters: {', '.join(trained)}", "    "),
            "",
            *_indented(_part_rows(found.methods)),
        ]
        for plan in own:
            if not plan.fits:
                word = "fit" if plan.peak_bytes > plan.usable_bytes else "run"
                lines += ["", *_listed(f"{plan.method} does not {word}", plan.notes)]
    chosen = found.recommended
    lines += ["", *_listed(f"recommended: {chosen.method or 'nothing here'}", chosen.reasons)]
    if chosen.command is not None:
        lines += ["", *_command_lines(chosen.command)]
    costs = _cost_rows([plan for plan in found.methods if not (article and plan.beside)])
    if costs:
        lines += ["", *_indented(costs)]
    if found.notes:
        lines += ["", *_listed(f"about {name}", found.notes)]
    return lines


def _method_rows(methods: Sequence[PlannedMethod]) -> list[list[str]]:
    rows = [["", "fits", "peak", "tokens/s", "a step", "the run", "rent", "limited by"]]
    for plan in methods:
        rows.append(
            [
                _name(plan),
                fit_words(plan),
                format_bytes(plan.peak_bytes),
                *_pace(plan),
                _cheapest_words(plan),
                plan.limited_by if plan.fits else "-",
            ]
        )
    return rows


def _name(plan: PlannedMethod) -> str:
    """With a mark where not all layers fit and the others are streamed from the computer's memory."""
    marked = not plan.beside and plan.settings.get("layers_streamed")
    return f"{plan.method} (streamed)" if marked else plan.method


def _trainable_words(plan: PlannedMethod) -> str:
    share = format_share(plan.trainable_parameters, plan.total_parameters)
    return f"{format_count(plan.trainable_parameters)} ({share})"


def fit_words(plan: PlannedMethod) -> str:
    if plan.fits:
        return "yes"
    missing = plan.peak_bytes - plan.usable_bytes
    return f"no, +{format_bytes(missing)}" if missing > 0 else "no"


def _pace(plan: PlannedMethod) -> list[str]:
    if not _has_time(plan):
        return ["-", "-", "-"]
    return [format_count(round(plan.tokens_per_s)), format_seconds(plan.step_s), format_seconds(plan.run_s)]


def _has_time(plan: PlannedMethod) -> bool:
    """Not for what does not fit: nobody can have that time for that money here."""
    return plan.fits and plan.step_s > 0


def _cheapest_words(plan: PlannedMethod) -> str:
    found = cheapest(plan.cost_usd)
    return format_dollars(found[1]) if found and _has_time(plan) else "-"


def _part_rows(methods: Sequence[PlannedMethod]) -> list[list[str]]:
    most = max(plan.peak_bytes for plan in methods)
    unit, digits, name = (MIB, 1, "MiB") if most < 2 * GIB else (GIB, 2 if most < 1000 * GIB else 1, "GiB")
    rows = [[name, *PARTS, "peak"]]
    for plan in methods:
        sizes = (*(plan.memory[part] for part in PARTS), plan.peak_bytes)
        rows.append([plan.method, *(f"{size / unit:.{digits}f}" for size in sizes)])
    return rows


def _article_rows(found: GpuPlan) -> list[list[str]]:
    methods = [plan for plan in found.methods if not plan.beside]
    settings = methods[0].settings
    span = f"for {settings['max_steps']:,} steps" if "max_steps" in settings else "an epoch"
    epochs = settings.get("num_train_epochs", 1.0)
    return [
        ["", *(ARTICLE_NAMES.get(plan.method, plan.method) for plan in methods)],
        ["trainable parameters", *(f"{plan.trainable_parameters:,}" for plan in methods)],
        ["share", *(format_share(plan.trainable_parameters, plan.total_parameters) for plan in methods)],
        ["memory", *(format_bytes(plan.peak_bytes) for plan in methods)],
        ["fits", *(fit_words(plan) for plan in methods)],
        [f"time {span}", *(format_seconds(plan.run_s / epochs) if _has_time(plan) else "-" for plan in methods)],
        [f"rent {span}", *(_money(plan, cheapest(plan.cost_usd), epochs) for plan in methods)],
        [f"electricity {span}", *(_money(plan, _electricity(plan), epochs) for plan in methods)],
    ]


def _electricity(plan: PlannedMethod) -> tuple[str, float] | None:
    return next((item for item in plan.cost_usd.items() if item[0] == ELECTRICITY), None)


def _money(plan: PlannedMethod, found: tuple[str, float] | None, epochs: float) -> str:
    return format_dollars(found[1] / epochs) if found and _has_time(plan) else "-"


def _cost_rows(methods: Sequence[PlannedMethod]) -> list[list[str]]:
    """The whole run's price at each place, cheapest first, for every method that fits; empty where no time is known."""
    able = [plan for plan in methods if _has_time(plan) and plan.cost_usd]
    if not able:
        return []
    places = sorted(able[0].cost_usd, key=lambda place: able[0].cost_usd[place])
    head = ["the run costs", *(plan.method for plan in able)]
    return [head, *([place, *(format_dollars(plan.cost_usd[place]) for plan in able)] for place in places)]


def _indented(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell: the first to the left, the others to the right, text after numbers left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    gap = "  " if 2 + sum(widths) + 2 * (len(widths) - 1) <= WIDTH else " "
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + gap.join(cells).rstrip())
    return lines


def _command_lines(command: str) -> list[str]:
    """The command over several lines, of which a shell makes one again."""
    lines = ["  "]
    for word in map(shlex.quote, shlex.split(command)):
        if len(lines[-1]) + len(word) + 3 > WIDTH and lines[-1].strip():
            lines[-1] += "\\"
            lines.append("      ")
        lines[-1] += f"{word} "
    return [line.rstrip() for line in lines]


def _listed(title: str, texts: Sequence[str]) -> Iterator[str]:
    yield f"  {title}:"
    for text in texts:
        yield from _wrapped(f"    - {text}", "      ")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def three_lines(found: GpuPlan, plan: PlannedMethod) -> list[str]:
    """What `train` says before it starts: memory by its largest parts; time and cost; why this method, what limits."""
    parts = sorted(plan.memory.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts[:4] if size)
    where = "of memory" if found.gpu == "cpu" else "free"
    memory = f"plan: peak {format_bytes(plan.peak_bytes)} of {format_bytes(plan.usable_bytes)} {where}: {shown}" + (
        "" if plan.fits else " -- DOES NOT FIT"
    )
    time = "plan: time is not estimated for CPUs"
    if plan.step_s:
        costs = "; ".join(f"{format_dollars(amount)} {place}" for place, amount in _two_costs(plan))
        time = f"plan: {format_seconds(plan.step_s)} a step, {format_seconds(plan.run_s)} in all; {costs}"
    chosen = found.recommended.method == plan.method and len(found.methods) > 1
    reason = found.recommended.reasons[0] if chosen else f"{plan.method}: asked for"
    how = _how(plan)
    limit = f"; limited by {plan.limited_by}" if plan.step_s else ""
    return [memory, time, f"plan: {reason}; {how}{limit}"]


def _how(plan: PlannedMethod) -> str:
    settings = plan.settings
    if "layers_streamed" in settings:
        layers = settings["layers_resident"] + settings["layers_streamed"]
        return (
            f"{settings['layers_resident']} of {layers} layers stay on the GPU, the others are streamed from the "
            f"computer's memory, of which {format_bytes(settings['host_bytes'])} are pinned"
        )
    if plan.path == "engine":
        return f"up to {settings['tokens_at_once']:,} tokens at once; layers keep {settings['layers_keep']}"
    rows = settings["per_device_train_batch_size"]
    return f"rows at once: {rows}; recomputation {settings['gradient_checkpointing']}"


def _two_costs(plan: PlannedMethod) -> list[tuple[str, float]]:
    """The cheapest rent and the electricity."""
    return list(dict(found for found in (cheapest(plan.cost_usd), _electricity(plan)) if found).items())


def several(min_gpus: int) -> str:
    """That an offer is of so many GPUs at least; nothing for one."""
    return f" ({min_gpus} at least)" if min_gpus > 1 else ""


def gpu_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The GPUs of the catalogue, one a line: `thriftune gpus`."""
    cells = [["gpu", "memory", "GB/s", "W", "$ an hour", "at", "seen"]]
    for row in rows:
        price = row["usd_per_hour"]
        cells.append(
            [
                row["gpu"],
                format_bytes(row["memory_bytes"]),
                f"{row['bandwidth_bytes_per_s'] / 1e9:,.0f}",
                f"{row['power_w']:.0f}",
                f"{price:.2f}" if price is not None else "-",
                "-" if price is None else row["provider"] + several(row["min_gpus"]),
                f"{row['price_date'] or '-'}{' old' if row['price_is_old'] else ''}",
            ]
        )
    lines = [line.removeprefix("  ") for line in _indented(cells)]
    if any(row["price_is_old"] for row in rows):
        lines += ["", OLD_PRICES]
    return "\n".join(lines)
