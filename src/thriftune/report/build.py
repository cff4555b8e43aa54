"""Cells -> ReportRecord: everything a report says, before it is laid out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thriftune.errors import InputError
from thriftune.plan.cost import Market
from thriftune.recipe import dump_yaml
from thriftune.records import EvalResult, ReportCell, ReportRecord, ReportVariant, StepMetrics
from thriftune.report.agreement import examples, patterns
from thriftune.report.cells import Cell
from thriftune.report.comparable import refuse_incomparable
from thriftune.report.measures import plan_of, rent_of, table_rows
from thriftune.report.pairs import all_row_scores, compare_pairs
from thriftune.report.statistics import mean
from thriftune.report.variants import Metric, Variant, group, metric_of, score, share_a_device
from thriftune.report.verdict import Facts, certainty, verdict
from thriftune.report.wording import listed

CURVE_POINTS = 120
NO_METRIC = Metric("score", True, False, False)


def build_report(
    cells: Sequence[Cell],
    *,
    title: str,
    market: Market,
    search: dict[str, Any] | None,
    notes: Sequence[str],
    gpu: str | None = None,
) -> ReportRecord:
    """The report of cells that may stand in one table.

    Args:
        cells: of `read_cells`; cells that are not done become lines that say so.
        title: heading of the page.
        market: GPUs and prices, for the rent of the measured time.
        search: what a learning-rate search found, in the shape that `search_table` reads; None without one.
        notes: sentences that a reader should know, shown with the table.
        gpu: name of the GPU whose price counts, instead of the one that the cells ran on.

    Raises:
        InputError: no cells, an unknown `gpu`, or cells that are not comparable, with every reason.
    """
    if not cells:
        raise InputError(given="no cells", allowed="one cell or more", do="run a comparison first")
    refuse_incomparable(cells)
    kept, twice = _once(cells)
    variants = group(kept)
    results = [cell.record.result for cell in kept if cell.done and cell.record.result]
    metric = metric_of(results) if results else NO_METRIC
    rows = all_row_scores(variants)
    scores = [score(variant, metric, rows) if variant.done else None for variant in variants]
    rent = rent_of(kept, market, gpu)
    table = table_rows(variants, metric, scores, rent)
    done = [variant for variant in variants if variant.done]
    pairs = compare_pairs(done, metric, rows)
    facts = Facts(variants, metric, scores, pairs, table)
    sentence, chosen = verdict(facts)
    audits = [cell.run.data for cell in kept if cell.run and cell.run.data]
    runs = [cell.run for cell in kept if cell.run]
    first = results[0] if results else None
    return ReportRecord(
        title=title,
        verdict=sentence,
        chosen=chosen.name if chosen else None,
        certainty=certainty(facts, chosen),
        model=runs[0].model if runs else first.model if first else "",
        task=first.task if first else "",
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        as_percent=metric.as_percent,
        test_data=_test_data(first) if first else "",
        test_rows=first.rows if first else 0,
        train_data=audits[0].source if audits else "",
        variants=[_variant(variant) for variant in variants],
        table=table,
        pairs=pairs,
        patterns=patterns(variants, rows),
        examples=examples(variants, rows),
        cells=[_cell(cell) for variant in variants for cell in variant.cells],
        search=search,
        hardware=runs[0].hardware if runs else {},
        share_a_device=share_a_device(variants),
        versions=_versions(kept),
        commands=list(dict.fromkeys(run.command for run in runs)),
        notes=[*notes, *twice, *_notes(kept)],
    )


def _once(cells: Sequence[Cell]) -> tuple[list[Cell], list[str]]:
    """Cells of one variant and seed that scored the same are one (the base of two comparisons). Raises InputError for
    those that did not: a mean over them would count a seed twice."""
    kept: dict[tuple[str, int | None], Cell] = {}
    notes = []
    for cell in cells:
        place = (cell.record.variant, cell.record.seed)
        before = kept.get(place)
        if before is None or (cell.done and not before.done):
            kept[place] = cell
            if before is not None:
                notes.append(f"{before.folder} is not done; {cell.folder} stands in its place")
            continue
        if cell.done and _outcome(cell) != _outcome(before):
            seed = f" with seed {cell.record.seed}" if cell.record.seed is not None else ""
            raise InputError(
                given=f"{cell.record.variant}{seed} is there twice, with other scores: {before.folder}, {cell.folder}",
                allowed="each method and seed once",
                do="name one of the two",
            )
        notes.append(f"{cell.folder} is the same cell as {before.folder} and counted once")
    return list(kept.values()), notes


def _test_data(result: EvalResult) -> str:
    """'imdb test, 25,000 rows', and how many of them were asked when not all were."""
    whole, place = result.details.get("rows_of_split"), str(result.details.get("data", result.task))
    return f"{place}, of which {result.rows:,} were asked" if whole and whole != result.rows else place


def _outcome(cell: Cell) -> tuple[object, ...]:
    result = cell.record.result
    return (result.task, result.value, result.rows, result.model) if result else ()


def _variant(variant: Variant) -> ReportVariant:
    plans = [plan for cell in variant.cells if (plan := plan_of(cell))]
    runs = [cell.run for cell in variant.done if cell.run]
    return ReportVariant(
        name=variant.name,
        label=variant.label,
        method=variant.method,
        overrides=variant.cells[0].record.overrides,
        seeds=variant.seeds,
        cells=len(variant.cells),
        planned_memory=plans[0].memory if plans else {},
        allocated_bytes=mean([run.peak_bytes for run in runs]) if runs else None,
        reserved_bytes=(mean([run.reserved_bytes for run in runs]) or None) if runs else None,
    )


def _cell(cell: Cell) -> ReportCell:
    plan, run, result = plan_of(cell), cell.run, cell.record.result
    recipe = run.recipe if run else None
    tokens, losses, most = curve(cell.steps)
    return ReportCell(
        name=cell.name,
        variant=cell.record.variant,
        seed=cell.record.seed,
        status=cell.record.status,
        reason=cell.record.reason,
        folder=str(cell.folder),
        value=result.value if result else None,
        low=result.low if result else None,
        high=result.high if result else None,
        learning_rate=recipe.train.learning_rate if recipe else None,
        planned_peak_bytes=plan.peak_bytes if plan else None,
        usable_bytes=plan.usable_bytes if plan else None,
        events=run.events if run else [],
        command=run.command if run else "",
        recipe=dump_yaml(recipe) if recipe else "",
        curve_tokens=tokens,
        curve_loss=losses,
        curve_steps=most,
        cuts=run.cuts if run else [],
        start_rank=recipe.dynamic.r_start if recipe and recipe.method == "dynamic" else None,
    )


def curve(steps: Sequence[StepMetrics]) -> tuple[list[int], list[float], int]:
    """The training loss in at most 120 stretches of as many steps each: the end of a stretch in tokens seen, its mean
    loss over target tokens, and the most steps that one has. A step that is gone over again counts as it was last."""
    last = {step.step: step for step in steps}
    kept = [last[number] for number in sorted(last)]
    size = -(-len(kept) // CURVE_POINTS) if kept else 1
    stretches = [kept[start : start + size] for start in range(0, len(kept), size)]
    losses = [
        sum(step.loss * step.targets for step in stretch) / max(1, sum(step.targets for step in stretch))
        for stretch in stretches
    ]
    return [stretch[-1].tokens_seen for stretch in stretches], losses, size


def _versions(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """Name -> every version met: cells of one comparison may have been trained in several goes."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        for name, version in (cell.run.versions if cell.run else {}).items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return found


def _notes(cells: Sequence[Cell]) -> list[str]:
    """What a reader should know, from the records themselves."""
    notes = []
    changed = [f"{name} {' and '.join(versions)}" for name, versions in _versions(cells).items() if len(versions) > 1]
    if changed:
        notes.append(f"not every cell was trained with the same versions: {', '.join(changed)}")
    paths: dict[str, list[str]] = {}
    for cell in cells:
        if cell.done and cell.run:
            paths.setdefault(cell.run.path, []).append(cell.name)
    if len(paths) > 1:
        told = "; ".join(f"{path}: {listed(names)}" for path, names in paths.items())
        notes.append(f"not every cell was trained on the same path, which changes its time and memory ({told})")
    notes += _company(cells)
    without = [cell.name for cell in cells if cell.done and not cell.answers]
    if without:
        notes.append(f"the answers of {listed(without)} are not there: rows cannot be compared")
    return [*notes, *_events(cells)]


def _events(cells: Sequence[Cell]) -> list[str]:
    """What happened in the runs, each event once with the cells that had it. Cuts have a picture of their own."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        drawn = {cut.words for cut in cell.run.cuts} if cell.run else set()
        for event in dict.fromkeys(cell.run.events if cell.run else []):
            if event not in drawn:
                found.setdefault(event, []).append(cell.name)
    return [f"{listed(names)}: {event}" for event, names in found.items()]


def _company(cells: Sequence[Cell]) -> list[str]:
    """Of cells that ran at once: whether each had its device for itself."""
    done = [cell.record for cell in cells if cell.done]
    at_once = max((record.at_once for record in done), default=1)
    sharing = max((record.sharing for record in done), default=0)
    if at_once == 1:
        return []
    if not sharing:
        return [f"{at_once} cells ran at once, each on a GPU of its own"]
    return [
        f"{at_once} cells ran at once, up to {sharing + 1} of them on one device: the measured times, rents and "
        "energies do not compare methods, and the verdict does not look at them"
    ]
