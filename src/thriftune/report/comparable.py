"""May these cells stand in one table? What has to be equal, and every way in which it is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from thriftune.errors import InputError
from thriftune.report.cells import Cell, flat_options, processes_of

SHOWN_CELLS = 3
MACHINE = ("gpu", "gpu_memory_bytes", "cpu_count", "torch_threads")
# How answers are written: everything but the rows at once, which do not change them.
NOT_AN_ANSWER = "batch_size"


def refuse_incomparable(cells: Sequence[Cell]) -> None:
    """Raises InputError with every reason why these cells cannot stand in one table.

    Equal must be: the model; the task, its rows and how answers are drawn; the training rows, their length limit, the
    rows and number of steps; the machine. Cells of one seed must have seen as many tokens and targets in every step.
    Method, adapter, quantisation, learning rate and precision may differ: they are what is compared.
    """
    reasons = [
        reason
        for what, value_of in (*_OF_RUNS.items(), *_OF_RESULTS.items())
        if (reason := _differing(what, [(cell, value_of(cell)) for cell in cells]))
    ]
    reasons += _differing_options(cells)
    reasons += _differing_rows(cells)
    reasons += _differing_steps(cells)
    if reasons:
        listed = "".join(f"\n    - {reason}" for reason in reasons)
        raise InputError(
            given=f"{len(cells)} cells that cannot stand in one table:{listed}",
            allowed="cells of one model, task, training rows, steps and machine; method, lora.*, quant.*, "
            "learning_rate, precision and seed may differ",
            do="report each kind by itself, or run the missing ones alike (thriftune compare does)",
        )


def _differing(what: str, values: Sequence[tuple[Cell, Hashable]]) -> str | None:
    """'model: a (lora-seed1) against b (full-seed1, full-seed2)', or None when all that have a value agree."""
    groups: dict[Hashable, list[str]] = {}
    for cell, value in values:
        if value is not None:
            groups.setdefault(value, []).append(cell.name)
    if len(groups) < 2:
        return None
    return f"{what}: " + " against ".join(f"{value} ({_listed(names)})" for value, names in groups.items())


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_CELLS} more" if len(names) > SHOWN_CELLS else ""
    return ", ".join(names[:SHOWN_CELLS]) + more


def _model_name(cell: Cell) -> str | None:
    return cell.run.model if cell.run else cell.record.result.model if cell.record.result else None


def _model(cell: Cell) -> str | None:
    """The last part of the model's name: folders get moved, and are written in several ways."""
    name = _model_name(cell)
    if name is None:
        return None
    revision = cell.run.recipe.model.revision if cell.run else None
    return f"{Path(name).name}@{revision}" if revision else Path(name).name


def _owner(cell: Cell) -> str | None:
    """The first part of a hub's name; None for a folder."""
    owner, slash, rest = (_model_name(cell) or "").partition("/")
    return owner if slash and "/" not in rest and not owner.startswith((".", "~")) and owner else None


def _of_run(value_of: Callable[[Any], Hashable]) -> Callable[[Cell], Hashable]:
    """Only finished runs: one that ran out of memory has fewer steps, and says so in its own line."""
    return lambda cell: value_of(cell.run) if cell.run and cell.record.status == "done" else None


def _machine(run: Any) -> str:
    found = {name: run.hardware[name] for name in MACHINE if run.hardware.get(name) is not None}
    if "gpu" in found:  # its host's processors matter little
        count = f"{processes_of(run)} x " if processes_of(run) > 1 else ""
        return f"{count}{found['gpu']}, {found.get('gpu_memory_bytes', 0):,} bytes"
    kind = str(run.hardware.get("device", "unknown")).split(":")[0]
    return f"{kind} with {found.get('cpu_count', '?')} processors, {found.get('torch_threads', '?')} threads"


def _differing_options(cells: Sequence[Cell]) -> list[str]:
    """What is left of the recipe's training section: a difference there is one of the training, not the method, unless
    it was asked for as a sweep and stands in the cell's name."""
    swept = {name for cell in cells for name in cell.record.overrides}
    skipped = {
        *{"per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"},
        *{"gradient_checkpointing", "learning_rate", "logging_steps", "resume_from_checkpoint", "optim"},
        *{"save_strategy", "save_steps", "save_total_limit", "eval_strategy", "eval_steps"},
    }
    found: dict[str, list[tuple[Cell, Hashable]]] = {}
    for cell in cells:
        if cell.run and cell.record.status == "done":
            flat = flat_options(cell.run.recipe.model_dump(mode="json", include={"train"}))
            for name, value in flat.items():
                if name not in swept and name.split(".")[-1] not in skipped:
                    found.setdefault(name, []).append((cell, str(value)))
    return [reason for name, values in sorted(found.items()) if (reason := _differing(name, values))]


def _training_data(run: Any) -> str:
    data = run.recipe.data
    parts = [data.name, data.split, data.subset, *(f"{data.max_samples} rows" for _ in [0] if data.max_samples)]
    return " ".join(str(part) for part in parts if part)


_OF_RUNS: dict[str, Callable[[Cell], Hashable]] = {
    "model": _model,
    "the model's owner": _owner,
    "parameters of the model": _of_run(lambda run: run.total_parameters),
    "training data": _of_run(_training_data),
    "training rows used": _of_run(lambda run: run.data.rows_used if run.data else None),
    "tokens a row may have (data.max_length)": _of_run(lambda run: run.recipe.data.max_length),
    "rows an optimizer step": _of_run(
        lambda run: (
            run.recipe.train.per_device_train_batch_size
            * run.recipe.train.gradient_accumulation_steps
            * processes_of(run)
        )
    ),
    "optimizer steps": _of_run(lambda run: run.steps),
    "machine (times and memory would be compared)": _of_run(_machine),
}


def _of_result(value_of: Callable[[Any], Hashable]) -> Callable[[Cell], Hashable]:
    return lambda cell: value_of(cell.record.result) if cell.record.result else None


def _answering(result: Any) -> str | None:
    settings = result.details.get("settings")
    if not isinstance(settings, dict):
        return None
    return json.dumps({name: value for name, value in sorted(settings.items()) if name != NOT_AN_ANSWER})


_OF_RESULTS: dict[str, Callable[[Cell], Hashable]] = {
    "task": _of_result(lambda result: result.task),
    "metric": _of_result(lambda result: result.metric),
    "test data": _of_result(lambda result: result.details.get("data")),
    "test rows asked": _of_result(lambda result: result.rows),
    "tokens a test prompt may have": _of_result(lambda result: result.details.get("max_length")),
    "how answers are drawn": _of_result(_answering),
}


def _differing_rows(cells: Sequence[Cell]) -> list[str]:
    """Whether the same rows with the same targets were asked, by their numbers, where the answers are there."""
    asked = {cell.key: {row.get("row"): row.get("target") for row in cell.answers} for cell in cells if cell.answers}
    if not asked:
        return []
    first, *others = asked.items()
    reasons = []
    told = Path(first[0]).name
    for key, rows in others:
        name = Path(key).name
        if rows.keys() != first[1].keys():
            apart = len(rows.keys() ^ first[1].keys())
            reasons.append(f"test rows: {name} and {told} were asked different ones ({apart:,} rows apart)")
        elif rows != first[1]:
            number = next(number for number, target in rows.items() if target != first[1][number])
            reasons.append(f"test targets: those of {name} and {told} differ, first in row {number}")
    return reasons


def _differing_steps(cells: Sequence[Cell]) -> list[str]:
    """Cells of one seed must have trained on the same rows in the same order: equal tokens and targets each step."""
    reasons = []
    first_of: dict[int, Cell] = {}
    for cell in cells:
        if not cell.done or cell.run is None:
            continue
        first = first_of.setdefault(cell.run.recipe.seed, cell)
        if first is cell or first.run is None:
            continue
        prints = [run.data.fingerprint for run in (first.run, cell.run) if run.data]
        if len(set(prints)) > 1:
            reasons.append(f"training tokens: the audits of {first.name} and {cell.name} have other fingerprints")
        for ours, theirs in zip(cell.steps, first.steps, strict=False):
            if (ours.step, ours.tokens, ours.targets) != (theirs.step, theirs.tokens, theirs.targets):
                reasons.append(
                    f"tokens a step: step {ours.step} of {cell.name} has {ours.tokens:,} tokens and {ours.targets:,} "
                    f"targets, of {first.name} {theirs.tokens:,} and {theirs.targets:,}"
                )
                break
    return reasons
