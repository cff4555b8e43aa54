"""The lines of the table: the article's first, in its order, then what else a person weighs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thriftune.catalog.gpus import find_gpu
from thriftune.catalog.rows import Price
from thriftune.errors import InputError
from thriftune.plan.cost import Market, place_of, seen_words
from thriftune.records import PlannedMethod, ReportRow, ReportValue
from thriftune.report.cells import BASE, Cell, processes_of
from thriftune.report.statistics import mean, spread
from thriftune.report.variants import Metric, Scored, Variant, seed_of, share_a_device
from thriftune.report.wording import DASH, STATUS_WORDS, metric_name, range_text, score_text, spread_text
from thriftune.units import format_bytes, format_count, format_dollars, format_seconds, format_share

PARAMETERS, TIME, SCORE, RESULT = "Parameters and memory", "Time and money", "Score", "The result in use"
UNTRAINED = "the base is not trained"
NO_RUN = "no record of a run"
NO_PLAN = "no plan was recorded"
TIMED = ("s", "tokens/s", "USD", "Wh")
SHARED = "beside other cells on one device: does not compare methods"
SAME_SHARE = 0.01  # a spread below this share of its mean is not worth a number


@dataclass(frozen=True)
class Rent:
    """The cheapest on-demand offer of the GPU that the cells ran on, or that was chosen instead; or `why` there is no
    price. `note` names place and price."""

    price: Price | None
    why: str
    note: str = ""

    def of(self, duration_s: float, gpus: int = 1) -> float | None:
        if self.price is None:
            return None
        return self.price.usd_per_hour * max(self.price.min_gpus, gpus) * duration_s / 3600


@dataclass(frozen=True)
class _Line:
    """How one row is made. `of` gives a cell's number; `missing` says why a trained, finished cell has none."""

    key: str
    group: str
    label: str
    unit: str
    of: Callable[[Cell], float | None]
    text: Callable[[float], str]
    missing: str
    note: str = ""
    planned: bool = False  # holds for cells that never ran
    trained: bool = True  # the base has none
    signed: bool = False


def rent_of(cells: Sequence[Cell], market: Market, chosen: str | None) -> Rent:
    """With the price of the GPU called `chosen`, else of the cells' own. Raises InputError for an unknown choice."""
    known = {row.key: row for row in market.gpus}
    instead = find_gpu(chosen, known) if chosen is not None else None
    machines = [cell.run.hardware for cell in cells if cell.run]
    if not machines:
        return Rent(None, NO_RUN)
    name = next((str(machine["gpu"]) for machine in machines if machine.get("gpu")), None)
    if name is None:
        return Rent(None, "trained on a CPU, which has no rent in the catalogue")
    try:
        gpu = instead or find_gpu(name, known)
    except InputError:
        return Rent(None, f"the catalogue has no GPU called {name}")
    offer = market.usual_offer(gpu)
    if offer is None:
        return Rent(None, f"the catalogue has no on-demand price of {gpu.key}")
    several = f" for {offer.min_gpus} GPUs, the fewest rented out" if offer.min_gpus > 1 else ""
    seen = seen_words(offer, market.today)
    elsewhere = f"; times are of {name}" if instead is not None and gpu.name != name else ""
    hourly = offer.usd_per_hour * offer.min_gpus
    return Rent(offer, "", f"{gpu.name} at {place_of(offer)}, ${hourly:.2f} an hour{several}, {seen}{elsewhere}")


def table_rows(
    variants: Sequence[Variant], metric: Metric, scores: Sequence[Scored | None], rent: Rent
) -> list[ReportRow]:
    """Every row of the table, values in the order of `variants`; `scores` is None where no cell is done."""
    base = next((cell for variant in variants if variant.method == BASE for cell in variant.done), None)
    machines = [cell.run.hardware for variant in variants for cell in variant.cells if cell.run]
    on_cpu = bool(machines) and not any(machine.get("gpu") for machine in machines)
    before = [*_parameter_lines(), *(_process_lines() if on_cpu else _memory_lines()), *_time_lines(on_cpu, rent)]
    rows = [_row(line, variants) for line in before]
    rows += _score_rows(variants, metric, scores)
    rows += [_row(line, variants) for line in (_forgetting(base), *_result_lines())]
    return rows


def plan_of(cell: Cell) -> PlannedMethod | None:
    return cell.record.plan or (cell.run.plan if cell.run else None)


def _plan(value_of: Callable[[PlannedMethod], float]) -> Callable[[Cell], float | None]:
    def of(cell: Cell) -> float | None:
        plan = plan_of(cell)
        return (value_of(plan) or None) if plan else None

    return of


def _run(value_of: Callable[..., float | None]) -> Callable[[Cell], float | None]:
    return lambda cell: value_of(cell.run) if cell.run and cell.done else None


def _parameter_lines() -> list[_Line]:
    def trained(cell: Cell) -> float | None:
        plan = plan_of(cell)
        return cell.run.trainable_parameters if cell.run else plan.trainable_parameters if plan else None

    def share(cell: Cell) -> float | None:
        known = cell.run or plan_of(cell)
        return known.trainable_parameters / known.total_parameters if known and known.total_parameters else None

    return [
        _Line("trainable", PARAMETERS, "Trained parameters", "parameters", trained, format_count, NO_RUN, planned=True),
        _Line(
            *("trainable_share", PARAMETERS, "Share of the model", "share", share),
            *(lambda value: format_share(value, 1), NO_RUN),
            planned=True,
        ),
    ]


def _memory_lines() -> list[_Line]:
    def line(
        key: str, label: str, of: Callable[[Cell], float | None], why: str, planned: bool, note: str = ""
    ) -> _Line:
        return _Line(key, PARAMETERS, label, "bytes", of, format_bytes, why, note, planned)

    return [
        line(
            *("needed_planned", "Peak memory, planned", _plan(lambda plan: plan.peak_bytes), NO_PLAN, True),
            note="the whole need, with what the driver and libraries hold outside PyTorch",
        ),
        line("allocated_planned", "Peak allocated, planned", _plan(lambda plan: plan.allocated_bytes), NO_PLAN, True),
        line("peak_measured", "Peak allocated, measured", _run(lambda run: run.peak_bytes), NO_RUN, False),
        line("reserved_planned", "Peak reserved, planned", _plan(lambda plan: plan.reserved_bytes), NO_PLAN, True),
        line(
            "reserved_measured", "Peak reserved, measured", _run(lambda run: run.reserved_bytes or None), NO_RUN, False
        ),
    ]


def _process_lines() -> list[_Line]:
    note = "on a CPU: the process's resident memory"
    return [
        _Line(
            *("needed_planned", PARAMETERS, "Peak memory, planned", "bytes", _plan(lambda plan: plan.peak_bytes)),
            *(format_bytes, NO_PLAN, note),
            planned=True,
        ),
        _Line(
            *("peak_measured", PARAMETERS, "Peak memory, measured", "bytes", _run(lambda run: run.peak_bytes)),
            *(format_bytes, NO_RUN, note),
        ),
    ]


def _time_lines(on_cpu: bool, rent: Rent) -> list[_Line]:
    no_time = "time is not planned for CPUs" if on_cpu else NO_PLAN

    def planned_epoch(cell: Cell) -> float | None:
        plan = plan_of(cell)
        epochs = cell.run.epochs if cell.run and cell.done else plan.settings.get("num_train_epochs") if plan else None
        return plan.run_s / epochs if plan and plan.run_s and epochs else None

    def planned_rent(cell: Cell) -> float | None:
        plan = plan_of(cell)
        return rent.of(plan.run_s) if plan and plan.run_s else None

    lines = [
        _Line("epoch_planned", TIME, "An epoch, planned", "s", planned_epoch, format_seconds, no_time, planned=True),
        _Line(
            *("epoch_measured", TIME, "An epoch, measured", "s"),
            *(_run(lambda run: run.train_s / run.epochs if run.epochs else None), format_seconds, NO_RUN),
        ),
        _Line("train", TIME, "The whole training", "s", _run(lambda run: run.train_s or None), format_seconds, NO_RUN),
        _Line(
            *("rent_planned", TIME, "Rent of the training, planned", "USD", planned_rent, format_dollars),
            *(rent.why or no_time, rent.note),
            planned=True,
        ),
        _Line(
            *("rent_measured", TIME, "Rent of the training, as timed", "USD"),
            *(_run(lambda run: rent.of(run.train_s, processes_of(run))), format_dollars, rent.why or NO_RUN, rent.note),
        ),
        _Line(
            *("tokens_per_s", TIME, "Tokens a second", "tokens/s", _run(lambda run: run.tokens_per_s or None)),
            *(lambda value: f"{value:,.0f}", NO_RUN),
        ),
    ]
    why = "a CPU has no energy counter" if on_cpu else "no energy counter was read"
    energy = _run(lambda run: None if run.energy_j is None else processes_of(run) * run.energy_j / 3600)
    lines.append(_Line("energy", TIME, "Energy of the training", "Wh", energy, energy_text, why, "of the GPUs alone"))
    return lines


def energy_text(energy_wh: float) -> str:
    return f"{energy_wh / 1000:.3g} kWh" if energy_wh >= 999.5 else f"{energy_wh:.3g} Wh"


def _score_rows(variants: Sequence[Variant], metric: Metric, scores: Sequence[Scored | None]) -> list[ReportRow]:
    values, ranges = [], []
    for variant, found in zip(variants, scores, strict=True):
        if found is None:
            values.append(_dash(_state(variant)))
            ranges.append(_dash(_state(variant)))
            continue
        values.append(
            ReportValue(
                text=score_text(found.mean, metric),
                spread_text=spread_text(found.spread, metric) if found.spread is not None else "",
                mean=found.mean,
                spread=found.spread,
                low=found.low,
                high=found.high,
                by_seed=_named(found.by_seed),
            )
        )
        ranges.append(ReportValue(text=range_text(found.low, found.high, metric), low=found.low, high=found.high))
    name = metric_name(metric)
    several = any(found and len(found.by_seed) > 1 for found in scores)
    kind = "other test rows would give; one seed says nothing of others"
    if several:
        kind = "other test rows and other seeds would give"
    better = "" if metric.higher_is_better else "lower is better"
    unit = "share" if metric.as_percent else name
    return [
        ReportRow(key="score", group=SCORE, label=name.capitalize(), unit=unit, note=better, values=values),
        ReportRow(key="interval", group=SCORE, label="95 % interval", unit=unit, note=f"what {kind}", values=ranges),
    ]


def _forgetting(base: Cell | None) -> _Line:
    before = base.record.general.value if base and base.record.general else None

    def forgotten(cell: Cell) -> float | None:
        after = cell.record.general.value if cell.done and cell.record.general else None
        return after - before if after is not None and before is not None else None

    return _Line(
        *(
            "forgetting",
            SCORE,
            "Loss on general text, change",
            "nats a token",
            forgotten,
            lambda value: f"{value:+.3f}",
        ),
        missing="no base was measured on the general text" if before is None else "not measured on the general text",
        note="nats a token, after training less before; above 0 something was forgotten",
        signed=True,
    )


def _result_lines() -> list[_Line]:
    def milliseconds(duration_s: float) -> str:
        return f"{1000 * duration_s:.3g} ms" if duration_s < 0.9995 else format_seconds(duration_s)

    return [
        _Line(
            *("result_bytes", RESULT, "Size of the result", "bytes", lambda cell: cell.record.result_bytes),
            *(format_bytes, "its files were not measured", "an adapter's files; of full, the whole model's"),
        ),
        _Line(
            *("first_token", RESULT, "First token, as trained", "s", lambda cell: cell.record.first_token_s),
            *(milliseconds, "not timed", "median of one prompt at a time, the adapter beside its base"),
            trained=False,
        ),
        _Line(
            *("first_token_merged", RESULT, "First token, merged", "s"),
            *(lambda cell: cell.record.merged_first_token_s, milliseconds, "nothing to merge, or not timed"),
            note="the adapter folded into its base",
        ),
    ]


def _row(line: _Line, variants: Sequence[Variant]) -> ReportRow:
    values = [_value(line, variant) for variant in variants]
    note = line.note
    if line.unit in TIMED and not line.planned and share_a_device(variants):
        note = "; ".join(part for part in (note, SHARED) if part)
    return ReportRow(key=line.key, group=line.group, label=line.label, unit=line.unit, note=note, values=values)


def _value(line: _Line, variant: Variant) -> ReportValue:
    if line.trained and variant.method == BASE:
        return _dash(UNTRAINED)
    by_seed = {seed_of(cell): number for cell in variant.cells if (number := line.of(cell)) is not None}
    if not by_seed:
        return _dash(line.missing if variant.done or line.planned else _state(variant))
    numbers = list(by_seed.values())
    middle, apart = mean(numbers), spread(numbers)
    worth = apart is not None and apart > SAME_SHARE * abs(middle)
    return ReportValue(
        text=line.text(middle),
        spread_text=f"± {line.text(apart).lstrip('+')}" if apart is not None and worth else "",
        mean=middle,
        spread=apart,
        by_seed=_named(by_seed),
    )


def _named(by_seed: dict[str, float]) -> dict[str, float]:
    """A cell without a seed (the base) is called by that."""
    return {("no seed" if seed == "None" else seed): value for seed, value in by_seed.items()}


def _state(variant: Variant) -> str:
    """Why no cell of a variant is done."""
    states = dict.fromkeys(STATUS_WORDS[cell.record.status] for cell in variant.cells)
    return f"{variant.label} {' and '.join(states)}"


def _dash(why: str) -> ReportValue:
    return ReportValue(text=DASH, missing=why)
