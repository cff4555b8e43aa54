"""Bars: memory by part planned against measured, who is right on how many rows, and intervals of differences."""

from __future__ import annotations

from collections.abc import Sequence

from thriftune.records import PairTest, ReportPattern, ReportRecord, ReportVariant
from thriftune.report.agreement import compared
from thriftune.report.cells import BASE
from thriftune.report.plots import NARROW, Figure, Look, figure
from thriftune.report.svg import LETTER, Axis, Drawing, horizontal_axis, number_text, text_width
from thriftune.units import GIB, MIB, format_bytes

# The planner's eight parts in five groups: kind in page.css, name, parts.
GROUPS = (
    ("p1", "weights", ("weights",)),
    ("p2", "training state", ("adapter", "gradients", "optimizer")),
    ("p3", "activations", ("activations",)),
    ("p4", "logits, workspace", ("logits", "workspace")),
    ("p5", "driver, libraries", ("runtime",)),
)
BAR, BLOCK = 15.0, 58.0
MOST_BEYOND = 1.5  # a plan that never ran may go this far beyond what was measured; more is cut, with an arrow
MOST_PATTERNS = 10


def memory_figure(report: ReportRecord, looks_of: dict[str, Look]) -> Figure | None:
    variants = [variant for variant in report.variants if variant.planned_memory or variant.allocated_bytes]
    if not variants:
        return None
    most = max(map(_largest, variants))
    measured_most = max((_largest(variant) for variant in variants if variant.allocated_bytes), default=most)
    most = min(most, MOST_BEYOND * measured_most)
    unit, unit_name = (GIB, "GiB") if most >= GIB else (MIB, "MiB")
    on_gpu = any(variant.reserved_bytes for variant in variants)

    def draw(width: float) -> Drawing:
        drawing = Drawing(width, BLOCK * len(variants) + 46)
        axis = Axis(0, most / unit, 2, width - 14)
        for place, variant in enumerate(variants):
            _memory_block(drawing, variant, looks_of[variant.name], BLOCK * place, axis, unit, on_gpu)
        horizontal_axis(drawing, axis, BLOCK * len(variants) + 6, number_text, f"{unit_name} at the peak")
        return drawing

    measured = "the allocator's peak, the pale end what it had reserved" if on_gpu else "the process's resident memory"
    parts = ", ".join(f"{name} ({' + '.join(parts)})" if len(parts) > 1 else name for _, name, parts in GROUPS)
    caption = f"Upper bar planned, by part: {parts}. Lower bar measured: {measured}."
    told = "; ".join(
        f"{variant.label} planned {format_bytes(sum(variant.planned_memory.values()))}, "
        f"measured {format_bytes(variant.allocated_bytes) if variant.allocated_bytes else 'nothing'}"
        for variant in variants
    )
    return figure("Memory by part, planned against measured", caption, draw, told, False)


def _largest(variant: ReportVariant) -> float:
    return max(sum(variant.planned_memory.values()), variant.reserved_bytes or 0, variant.allocated_bytes or 0)


def _memory_block(
    drawing: Drawing, variant: ReportVariant, look: Look, top: float, axis: Axis, unit: float, on_gpu: bool
) -> None:
    planned = sum(variant.planned_memory.values())
    measured = variant.reserved_bytes or variant.allocated_bytes
    words = [f"planned {format_bytes(planned)}" if planned else "no plan"]
    if variant.allocated_bytes:
        words.append(f"measured {format_bytes(variant.allocated_bytes)}")
    if variant.reserved_bytes and on_gpu and drawing.width > NARROW:
        words.append(f"reserved {format_bytes(variant.reserved_bytes)}")
    tail = ", ".join(words)
    room = int((drawing.width - text_width(tail) - 16) / LETTER)
    name = look.label if len(look.label) <= room else look.tag if len(look.tag) <= room else look.label[:room]
    drawing.text(2, top + 12, name, "t strong")
    drawing.text(drawing.width - 2, top + 12, tail, "t mute", "end")
    x = axis.start
    for kind, group, parts in GROUPS:
        size = sum(variant.planned_memory.get(part, 0) for part in parts)
        wide = min(axis(size / unit) - axis.start, axis.end - x)
        if size and wide > 0:
            drawing.box(x, top + 18, wide, BAR, f"part {kind}", f"{group}: {format_bytes(size)}")
            if text_width(group) + 8 < wide:
                drawing.text(x + 4, top + 18 + BAR - 4, group, f"t in {kind}")
        x += max(0.0, wide)
    if planned > axis.high * unit * 1.001:
        drawing.text(axis.end + 3, top + 18 + BAR - 3, "\u2192", "t mute")
    if measured:
        wide = axis(measured / unit) - axis.start
        drawing.box(axis.start, top + 20 + BAR, wide, BAR, "part reserved", "reserved")
    if variant.allocated_bytes:
        wide = axis(variant.allocated_bytes / unit) - axis.start
        drawing.box(axis.start, top + 20 + BAR, wide, BAR, "part measured", "measured")
        if text_width("measured") + 8 < wide:
            drawing.text(axis.start + 4, top + 20 + 2 * BAR - 4, "measured", "t in measured")


def agreement_figure(report: ReportRecord, looks_of: dict[str, Look]) -> Figure | None:
    """One line for each set of variants that is right on the same rows."""
    if not report.patterns:
        return None
    scored = {row.key: row for row in report.table}["score"]
    names = [v.name for v, value in zip(report.variants, scored.values, strict=True) if value.mean is not None]
    names = compared(names)
    patterns, rest = report.patterns[:MOST_PATTERNS], report.patterns[MOST_PATTERNS:]
    largest = max(pattern.rows for pattern in patterns)
    total = sum(pattern.rows for pattern in report.patterns)
    tags = [looks_of[name].tag for name in names]
    longest = max(map(text_width, tags))

    def column_of(width: float) -> float:
        return min(max(24.0, longest + 10), (width - 130) / len(names))

    key = ""
    if longest + 4 > column_of(NARROW):
        tags = [_letter(report, name) for name in names]
        key = f" {', '.join(f'{tag}: {looks_of[name].label}' for tag, name in zip(tags, names, strict=True))}."

    def draw(width: float) -> Drawing:
        lines = len(patterns) + (1 if rest else 0)
        drawing = Drawing(width, 40 + 24 * lines)
        column = column_of(width)
        for place, tag in enumerate(tags):
            drawing.text(column * (place + 0.5), 14, tag, f"t label {looks_of[names[place]].colour}", "middle")
        bars = Axis(0, largest, column * len(names) + 12, width - 96)
        drawing.text(bars.start, 14, "test rows", "t mute")
        for place, pattern in enumerate(patterns):
            _pattern_line(drawing, pattern, names, looks_of, column, 40 + 24 * place, bars, total)
        if rest:
            more = f"{len(rest)} other sets: {sum(pattern.rows for pattern in rest):,} rows"
            drawing.text(bars.start, 40 + 24 * len(patterns) + 4, more, "t mute")
        return drawing

    right = [", ".join(looks_of[name].label for name in pattern.right) or "none" for pattern in patterns]
    told = "; ".join(f"{names}: {pattern.rows:,}" for names, pattern in zip(right, patterns, strict=True))
    caption = (
        f"Each line is a set of methods that are right on the same rows, of {total:,} in all. A filled dot: right, in "
        f"most of its seeds.{key}"
    )
    return figure("Who is right on which rows", caption, draw, told, True)


def _letter(report: ReportRecord, name: str) -> str:
    return chr(ord("A") + next(place for place, variant in enumerate(report.variants) if variant.name == name))


def _pattern_line(
    drawing: Drawing,
    pattern: ReportPattern,
    names: Sequence[str],
    looks_of: dict[str, Look],
    column: float,
    y: float,
    bars: Axis,
    total: int,
) -> None:
    drawing.line(column * 0.5, y, column * (len(names) - 0.5), y, "grid")
    for place, name in enumerate(names):
        kind = f"mark {looks_of[name].colour}" if name in pattern.right else "empty"
        drawing.dot(column * (place + 0.5), y, min(6.0, 0.4 * column), kind)
    drawing.box(bars.start, y - 8, max(1.0, bars(pattern.rows) - bars.start), 16, "part measured")
    share = f"{100 * pattern.rows / total:.1f} %"
    drawing.text(bars(pattern.rows) + 6, y + 4, f"{pattern.rows:,} ({share})", "t mute")


def difference_marks(report: ReportRecord) -> list[str]:
    """A small drawing for each pair: its interval on one common scale, with a line at no difference.

    The scale is that of trained variants; a difference to the base, which is often far larger, ends in an arrow.
    """
    base = {variant.name for variant in report.variants if variant.method == BASE}
    trained = [pair for pair in report.pairs if not base & {pair.first, pair.second}]
    ends = [abs(end) for pair in trained or report.pairs for end in (pair.low, pair.high) if end is not None]
    return [_difference_mark(pair, max(ends, default=0.0) or 1.0) for pair in report.pairs]


def _difference_mark(pair: PairTest, reach: float) -> str:
    if pair.low is None or pair.high is None or pair.difference is None:
        return ""
    drawing = Drawing(120, 20)
    axis = Axis(-reach, reach, 10, 110)
    drawing.line(axis(0), 1, axis(0), 19, "axis")
    kind = "s-shown" if pair.shown else "s-equal"
    if abs(pair.difference) > reach:
        end, tip = (112.0, 118.0) if pair.difference > 0 else (8.0, 2.0)
        drawing.line(axis(0), 10, tip, 10, f"bar {kind}")
        drawing.path([(end, 6), (tip, 10), (end, 14)], f"bar {kind}")
    else:
        drawing.line(axis(max(-reach, pair.low)), 10, axis(min(reach, pair.high)), 10, f"bar {kind}")
        drawing.dot(axis(pair.difference), 10, 3.5, f"mark {kind}")
    return drawing.render("difference", f"{pair.difference:+.3g}, {pair.low:+.3g} to {pair.high:+.3g}", "small")
