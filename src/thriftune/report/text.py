"""The table and the verdict for a terminal of 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from thriftune.records import PairTest, ReportRecord, ReportRow, ReportValue, ReportVariant
from thriftune.report.variants import Metric
from thriftune.report.wording import DASH, STATUS_WORDS, difference_range, difference_text, p_text
from thriftune.units import format_bytes

WIDTH = 100
GAP = "  "
MOST_PAIRS = 12


def report_text(report: ReportRecord) -> str:
    """Verdict, table, differences, and cells that are not done."""
    lines = [*_wrapped(report.title), *_wrapped(about(report)), ""]
    lines += [*_wrapped(report.verdict), ""]
    for block in _blocks(report):
        lines += [*block, ""]
    missing = missing_lines(report)
    if missing:
        lines += [f"{DASH} stands where there is nothing to tell:", *_listed(missing), ""]
    pairs = pair_lines(report)
    if pairs:
        lines += ["differences on the same rows:", *_listed(pairs), ""]
    undone = undone_lines(report)
    if undone:
        lines += ["not done:", *_listed(undone), ""]
    if report.notes:
        lines += ["notes:", *_listed(report.notes), ""]
    return "\n".join(lines[:-1])


def about(report: ReportRecord) -> str:
    """'reader-16m on imdb; trained on imdb train, ...; scored on imdb test, ...', as far as it is known."""
    parts = [
        " on ".join(name for name in (report.model, report.task) if name),
        f"trained on {report.train_data}" if report.train_data else "nothing was trained",
        f"scored on {report.test_data}" if report.test_data else "nothing was scored",
    ]
    return "; ".join(part for part in parts if part)


def metric_as_shown(report: ReportRecord) -> Metric:
    logarithmic = "perplexity" in report.metric.lower()
    return Metric(report.metric, report.higher_is_better, report.as_percent, logarithmic)


def labels(report: ReportRecord) -> dict[str, str]:
    return {variant.name: variant.label for variant in report.variants}


def machine_in_words(report: ReportRecord) -> dict[str, str]:
    """What the records say of the machine, sizes in words."""
    return {
        name.removesuffix("_bytes").replace("_", " "): format_bytes(value) if name.endswith("_bytes") else str(value)
        for name, value in report.hardware.items()
    }


def heading(variant: ReportVariant) -> str:
    """'3 seeds' under a variant's label; what came of it where no seed is done."""
    count = len(variant.seeds)
    return f"{count} seed{'s' if count > 1 else ''}" if count else ""


def pair_lines(report: ReportRecord) -> list[str]:
    names = labels(report)
    shown = [pair for pair in report.pairs if in_short(pair, report)]
    lines = [f"{names[pair.first]} - {names[pair.second]}: {pair_words(pair, report)}" for pair in shown]
    folded = len(report.pairs) - len(shown)
    return [*lines, f"{folded} other pairs are in report.html and report.md"] if folded else lines


def in_short(pair: PairTest, report: ReportRecord) -> bool:
    """Of many pairs a short list has those with the variant to take."""
    few = len(report.pairs) <= MOST_PAIRS or report.chosen is None
    return few or report.chosen in (pair.first, pair.second)


def pair_words(pair: PairTest, report: ReportRecord) -> str:
    """'+0.4 points (-0.2 to +1.0), p = 0.21: no difference shown'."""
    if pair.difference is None or pair.p_value is None or pair.low is None or pair.high is None:
        return pair.test
    metric = metric_as_shown(report)
    p_value = p_text(pair.adjusted_p_value if pair.adjusted_p_value is not None else pair.p_value)
    equals = "" if p_value.startswith("below") else "= "
    words = "a difference is shown" if pair.shown else "no difference shown"
    return (
        f"{difference_text(pair.difference, metric)} ({difference_range(pair.low, pair.high, metric)}), "
        f"p {equals}{p_value}: {words}"
    )


def undone_lines(report: ReportRecord) -> list[str]:
    return [undone_words(report, number) for number, cell in enumerate(report.cells) if cell.status != "done"]


def undone_words(report: ReportRecord, number: int) -> str:
    """'full-seed1 ran out of memory; planned 85.3 GiB of 79.1 GiB; CUDA out of memory ...'."""
    cell = report.cells[number]
    parts = [f"{cell.name} {STATUS_WORDS.get(cell.status, cell.status)}"]
    if cell.planned_peak_bytes and cell.usable_bytes:
        parts.append(f"planned {format_bytes(cell.planned_peak_bytes)} of {format_bytes(cell.usable_bytes)}")
    return "; ".join([*parts, *([cell.reason] if cell.reason else [])])


def missing_lines(report: ReportRecord) -> list[str]:
    """'not timed: First token, merged (LoRA, QLoRA)': every reason once, with its rows and columns."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in report.table:
        for variant, value in zip(report.variants, row.values, strict=True):
            if value.missing:
                found.setdefault(value.missing, {}).setdefault(row.label, []).append(variant.label)
    lines = []
    for reason, rows in found.items():
        columns = list(dict.fromkeys(label for names in rows.values() for label in names))
        where = ", ".join(rows) if len(rows) <= 4 else f"{len(rows)} rows"
        lines.append(f"{reason}: {where} ({', '.join(columns)})")
    return lines


def value_words(value: ReportValue) -> str:
    return f"{value.text} {value.spread_text}".rstrip()


def _blocks(report: ReportRecord) -> Iterator[list[str]]:
    """The table in as many parts side by side as a terminal needs below each other."""
    first = max(2 + len(row.label) for row in report.table)
    columns = [_column(report, number, spreads=True) for number in range(len(report.variants))]
    if first + sum(len(GAP) + max(map(len, column)) for column in columns) > WIDTH:
        columns = [_column(report, number, spreads=False) for number in range(len(report.variants))]
    widths = [max(map(len, column)) for column in columns]
    start = 0
    while start < len(columns):
        end, used = start, first
        while end < len(columns) and (end == start or used + len(GAP) + widths[end] <= WIDTH):
            used += len(GAP) + widths[end]
            end += 1
        yield list(_block(report.table, first, columns[start:end], widths[start:end]))
        start = end


def _column(report: ReportRecord, number: int, spreads: bool) -> list[str]:
    """Without `spreads` only the score has its own: the page has them all."""
    variant = report.variants[number]
    cells = [
        value_words(row.values[number]) if spreads or row.key == "score" else row.values[number].text
        for row in report.table
    ]
    return [variant.label, heading(variant), *cells]


def _block(
    rows: Sequence[ReportRow], first: int, columns: Sequence[Sequence[str]], widths: Sequence[int]
) -> Iterator[str]:
    def line(label: str, number: int) -> str:
        cells = [column[number].rjust(width) for column, width in zip(columns, widths, strict=True)]
        return GAP.join([label.ljust(first), *cells]).rstrip()

    yield line("", 0)
    if any(column[1] for column in columns):
        yield line("", 1)
    group = ""
    for number, row in enumerate(rows, start=2):
        if row.group != group:
            group = row.group
            yield group
        yield line(f"  {row.label}", number)


def _listed(texts: Sequence[str]) -> list[str]:
    wrapped = (textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ") for text in texts)
    return [line for lines in wrapped for line in lines]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
