"""The plots: training loss by tokens, and the score by what it costs, with the front that nothing beats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thriftune.records import ReportCell, ReportRecord, ReportRow
from thriftune.report.cells import BASE
from thriftune.report.svg import (
    COLOURS,
    DASHES,
    LINE,
    SHAPES,
    Axis,
    Drawing,
    apart,
    horizontal_axis,
    number_text,
    padded,
    text_width,
    vertical_axis,
)
from thriftune.report.text import metric_as_shown
from thriftune.report.wording import metric_name, score_text
from thriftune.units import GIB, MIB, format_count, format_dollars, format_seconds

LOG_FROM = 12.0  # losses this many times apart are drawn on a logarithmic axis
HEIGHT = 300.0
MOST_NEIGHBOURS = 4  # on either side, that a point of a loss curve is the mean of
LONGEST_LABEL = 84.0  # pixels beside a plot; longer names go by their letter


@dataclass(frozen=True, slots=True)
class Look:
    """How a variant is drawn wherever it appears. `tag` is its name, or its letter where the names are long."""

    label: str
    tag: str
    colour: str
    dash: str
    shape: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot for a wide and for a narrow page, with what it shows in words."""

    title: str
    caption: str
    wide: str
    narrow: str
    legend: bool


WIDE, NARROW = 520.0, 340.0
Draw = Callable[[float], Drawing]
Box = tuple[float, float, float, float]


def looks(report: ReportRecord) -> dict[str, Look]:
    """The base is grey; the others have a colour, a dash and a shape in the order of the table."""
    variants = report.variants
    lettered = len(variants) > 26 or max(text_width(variant.label) for variant in variants) > LONGEST_LABEL
    found = {}
    number = 0
    for place, variant in enumerate(variants):
        tag = chr(ord("A") + place) if lettered and place < 26 else str(place + 1) if lettered else variant.label
        if variant.method == BASE:
            found[variant.name] = Look(variant.label, tag, "s0", "1 3", "circle")
            continue
        found[variant.name] = Look(
            variant.label,
            tag,
            f"s{number % COLOURS + 1}",
            DASHES[number % len(DASHES)],
            SHAPES[number % len(SHAPES)],
        )
        number += 1
    return found


def figure(title: str, caption: str, draw: Draw, description: str, legend: bool) -> Figure:
    wide = draw(WIDE).render(title, description, "wide")
    return Figure(title, caption, wide, draw(NARROW).render(title, description, "narrow"), legend)


def loss_figure(report: ReportRecord, looks_of: dict[str, Look]) -> Figure | None:
    """One line a cell; None when no cell has steps."""
    cells = [cell for cell in report.cells if len(_points(cell)) > 1]
    if not cells:
        return None
    values = [loss for cell in cells for _, loss in _points(cell)]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > LOG_FROM
    most = max(cell.curve_steps for cell in cells)
    each = "every step" if most == 1 else f"means of {most} steps"

    def draw(width: float) -> Drawing:
        drawing = Drawing(width, HEIGHT)
        names = list(dict.fromkeys(cell.variant for cell in cells))
        right = width - 10 - max(text_width(looks_of[name].tag) for name in names) - 8
        y_low, y_high = (low, high) if logarithmic else padded(values, 0.04)
        across = Axis(0, max(tokens for cell in cells for tokens, _ in _points(cell)), 44, right)
        down = Axis(y_low, y_high, HEIGHT - 44, 12, logarithmic)
        vertical_axis(drawing, down, 44, right, number_text)
        horizontal_axis(drawing, across, HEIGHT - 44, format_count, "tokens seen in training")
        ends: dict[str, list[float]] = {}
        for cell in cells:
            points = [(across(tokens), down(loss)) for tokens, loss in _points(cell)]
            drawing.path(points, f"raw {looks_of[cell.variant].colour}")
        for cell in cells:
            look = looks_of[cell.variant]
            points = [(across(tokens), down(loss)) for tokens, loss in smoothed(_points(cell))]
            drawing.path(points, f"curve {look.colour}", look.dash)
            ends.setdefault(cell.variant, []).append(points[-1][1])
        wanted = [sum(places) / len(places) for places in ends.values()]
        for name, y, aim in zip(ends, apart(wanted, LINE, 16, HEIGHT - 48), wanted, strict=True):
            look = looks_of[name]
            drawing.path([(right + 2, aim), (right + 8, y)], f"leader {look.colour}")
            drawing.text(right + 10, y + 4, look.tag, f"t label {look.colour}")
        return drawing

    scale = "; the axis of the loss is logarithmic" if logarithmic else ""
    around = 2 * max(neighbours(_points(cell)) for cell in cells) + 1
    strong = f"pale as measured ({each}), strong the mean of {around} points around" if around > 1 else each
    caption = f"Mean loss over the answers' tokens, one line a cell: {strong}{scale}."
    ends = ", ".join(f"{cell.name} ends at {_points(cell)[-1][1]:.3g}" for cell in cells)
    return figure("Training loss by tokens", caption, draw, f"{caption} {ends}.", True)


def _points(cell: ReportCell) -> list[tuple[int, float]]:
    """Without losses that are not finite, which have no place on a page."""
    pairs = zip(cell.curve_tokens, cell.curve_loss, strict=True)
    return [(tokens, loss) for tokens, loss in pairs if math.isfinite(loss)]


def neighbours(points: Sequence[tuple[int, float]]) -> int:
    """None for a short curve, whose shape they would change."""
    return min(MOST_NEIGHBOURS, len(points) // 15)


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each loss as the mean of it and its neighbours. At the start, where it falls fast, as many on either side."""
    reach = neighbours(points)
    found = []
    for place, (tokens, _) in enumerate(points):
        before, after = min(reach, place), min(reach, place)
        near = [loss for _, loss in points[place - before : place + after + 1]]
        found.append((tokens, sum(near) / len(near)))
    return found


@dataclass(frozen=True, slots=True)
class _Spot:
    """A trained variant in a plot of score by cost; `seeds` are the places of its cells."""

    name: str
    x: float
    y: float
    low: float
    high: float
    seeds: list[tuple[float, float]]


def cost_figures(report: ReportRecord, looks_of: dict[str, Look]) -> list[Figure]:
    """Score by peak memory, and by dollars; by time where the machine has no price, by neither where cells shared a
    device."""
    rows = {row.key: row for row in report.table}
    by = "Score" if report.metric == "score" else metric_name(metric_as_shown(report)).capitalize()
    memory = rows["peak_measured"]
    largest = max((value.mean or 0.0) for value in memory.values)
    unit, unit_name = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    found = [
        _cost_figure(
            *(report, looks_of, rows, "peak_measured", f"{by} by peak memory"),
            lambda value: number_text(value / unit),
            f"peak memory, measured ({unit_name})",
            unit,
        )
    ]
    paid = any(value.mean for value in rows["rent_measured"].values)
    if not report.share_a_device:
        key, what, tick, name = (
            ("rent_measured", "dollars", format_dollars, "rent of the training")
            if paid
            else ("train", "training time", format_seconds, "training time")
        )
        found.append(_cost_figure(report, looks_of, rows, key, f"{by} by {what}", tick, name, 1.0))
    return [figure_ for figure_ in found if figure_ is not None]


def _cost_figure(
    report: ReportRecord,
    looks_of: dict[str, Look],
    rows: dict[str, ReportRow],
    key: str,
    title: str,
    tick: Callable[[float], str],
    name: str,
    unit: float,
) -> Figure | None:
    spots = _spots(report, rows, key)
    if not spots:
        return None
    front = front_of(report, spots)
    metric = metric_as_shown(report)
    base = next((variant for variant in report.variants if variant.method == BASE), None)
    base_score = rows["score"].values[report.variants.index(base)].mean if base else None
    joins = "The line joins what nothing else beats"
    if len(front) < 2:
        joins = f"Nothing else beats {' or '.join(looks_of[name].label for name in front)}"
    caption = (
        f"Bars are 95 % intervals, small dots single seeds. {joins}: no other method needs clearly less and is as "
        "good, by the tests below."
    )
    caption += f" Rent: {rows[key].note}." if rows[key].unit == "USD" else ""

    def draw(width: float) -> Drawing:
        drawing = Drawing(width, HEIGHT)
        x_low, x_high = padded([spot.x for spot in spots] + [x for spot in spots for x, _ in spot.seeds], 0.12)
        x_low = 0.0 if x_low < 0.25 * x_high else x_low
        y_low, y_high = _score_range(spots, base_score, report.as_percent)
        across = Axis(x_low, x_high, 48, width - 12)
        down = Axis(y_low, y_high, HEIGHT - 44, 12)
        percent = (lambda v: f"{100 * v:.4g} %") if report.as_percent else number_text
        vertical_axis(drawing, down, 48, width - 12, percent)
        step = _tick_unit(across, unit)
        horizontal_axis(drawing, step[0], HEIGHT - 44, lambda value: tick(value * step[1]), name)
        taken = [_around(across(spot.x), down(spot.y), 12, 12) for spot in spots]
        taken += [(across(spot.x) - 3, down(spot.high), across(spot.x) + 3, down(spot.low)) for spot in spots]
        if base_score is not None:
            text = f"base {score_text(base_score, metric)}"
            taken.append(_base_line(drawing, across, down, base_score, text, taken))
        line = [(across(spot.x), down(spot.y)) for spot in spots if spot.name in front]
        if len(line) > 1:
            drawing.path(sorted(line), "front")
        for spot in spots:
            _draw_spot(drawing, spot, across, down, looks_of[spot.name])
        _label_spots(drawing, spots, across, down, looks_of, taken)
        return drawing

    told = ", ".join(f"{looks_of[spot.name].label} {score_text(spot.y, metric)} at {tick(spot.x)}" for spot in spots)
    return figure(title, caption, draw, f"{told}. {caption}", True)


def _tick_unit(across: Axis, unit: float) -> tuple[Axis, float]:
    """The axis in its unit, so that ticks are round in it."""
    return Axis(across.low / unit, across.high / unit, across.start, across.end), unit


def _spots(report: ReportRecord, rows: dict[str, ReportRow], key: str) -> list[_Spot]:
    spots = []
    for place, variant in enumerate(report.variants):
        cost, score = rows[key].values[place], rows["score"].values[place]
        if cost.mean is None or score.mean is None or score.low is None or score.high is None:
            continue
        seeds = [(cost.by_seed[seed], score.by_seed[seed]) for seed in score.by_seed if seed in cost.by_seed]
        spots.append(_Spot(variant.name, cost.mean, score.mean, score.low, score.high, seeds))
    return spots


def front_of(report: ReportRecord, spots: Sequence[_Spot]) -> set[str]:
    """Variants that no other one makes needless: one that needs clearly less and is not shown to be worse, needs no
    more and is shown to be better, or is on the better side in both, however little, so that the line never turns
    back."""
    shown = {frozenset((pair.first, pair.second)) for pair in report.pairs if pair.shown}

    def needless(spot: _Spot, other: _Spot) -> bool:
        differs = frozenset((spot.name, other.name)) in shown
        better = other.y > spot.y if report.higher_is_better else other.y < spot.y
        if better and other.x <= spot.x:
            return True
        if differs:
            return better and other.x <= 1.02 * spot.x
        return other.x < 0.98 * spot.x

    return {spot.name for spot in spots if not any(needless(spot, other) for other in spots if other is not spot)}


def _score_range(spots: Sequence[_Spot], base: float | None, as_percent: bool) -> tuple[float, float]:
    """The intervals with some room; with the base where it lies near."""
    values = [value for spot in spots for value in (spot.low, spot.high, *(y for _, y in spot.seeds))]
    low, high = min(values), max(values)
    if base is not None and low - 1.5 * (high - low) <= base <= high + 1.5 * (high - low):
        values.append(base)
    low, high = padded(values, 0.1)
    return (max(0.0, low), min(1.0, high)) if as_percent else (low, high)


def _base_line(drawing: Drawing, across: Axis, down: Axis, base: float, text: str, taken: Sequence[Box]) -> Box:
    """A line at the base's score, named where it is emptiest, or a note at the edge beyond which it lies."""
    y = down(base)
    if down.low <= base <= down.high:
        drawing.line(across.start, y, across.end, y, "curve s0")
        heights = [y - 5, y + 14]
    else:
        arrow, heights = ("\u2193", [down.start - 6]) if base < down.low else ("\u2191", [down.end + 12])
        text = f"{arrow} {text}"
    middle = (across.start + across.end) / 2
    ends = [(across.end, "end"), (across.start + 4, "start"), (middle, "middle")]
    places = [(x, height, anchor) for height in heights for x, anchor in ends if down.end <= height <= down.start + 2]
    boxes = [_text_box(place, text_width(text)) for place in places]
    covered = [sum(_overlap(box, other) for other in taken) for box in boxes]
    best = covered.index(min(covered))
    drawing.text(places[best][0], places[best][1], text, "t label s0", places[best][2])
    return boxes[best]


def _draw_spot(drawing: Drawing, spot: _Spot, across: Axis, down: Axis, look: Look) -> None:
    x = across(spot.x)
    drawing.line(x, down(max(spot.low, down.low)), x, down(min(spot.high, down.high)), f"bar {look.colour}")
    for seed_x, seed_y in spot.seeds if len(spot.seeds) > 1 else []:
        drawing.dot(across(seed_x), down(seed_y), 2.0, f"seed {look.colour}")
    drawing.marker(x, down(spot.y), look.shape, f"mark {look.colour}")


def _label_spots(
    drawing: Drawing,
    spots: Sequence[_Spot],
    across: Axis,
    down: Axis,
    looks_of: dict[str, Look],
    taken: list[Box],
) -> None:
    """Each name beside its marker, where it covers no other name or marker."""
    for spot in spots:
        look = looks_of[spot.name]
        x, y, width = across(spot.x), down(spot.y), text_width(look.tag)
        shifts = (4.0, -8.0, 16.0, -20.0, 28.0)
        places = [(x + side * 9, y + dy, anchor) for dy in shifts for side, anchor in ((1, "start"), (-1, "end"))]
        places += [(x, y + dy, "middle") for dy in (-24.0, 34.0, -36.0, 46.0)]
        boxes = {place: _text_box(place, width) for place in places}
        inside = [place for place, box in boxes.items() if across.start <= box[0] and box[2] <= across.end + 8]
        inside = [place for place in inside if down.end <= place[1] <= down.start]
        best = min(inside or places, key=lambda place: sum(_overlap(boxes[place], other) for other in taken))
        taken.append(boxes[best])
        drawing.text(best[0], best[1], look.tag, f"t label {look.colour}", best[2])


def _text_box(place: tuple[float, float, str], width: float) -> Box:
    x, y, anchor = place
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return left, y - 10, left + width, y + 2


def _around(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return across * down if across > 0 and down > 0 else 0.0
