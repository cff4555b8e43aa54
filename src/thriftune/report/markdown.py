"""The report as Markdown: the same verdict, table, tests, cells and recipes, without the plots."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from thriftune.records import ReportRecord
from thriftune.report.search import search_table
from thriftune.report.text import (
    about,
    heading,
    labels,
    machine_in_words,
    metric_as_shown,
    missing_lines,
    pair_words,
    undone_lines,
    value_words,
)
from thriftune.report.wording import DASH, cell_words
from thriftune.units import format_bytes

PLACES = 4  # of a loss curve, besides its start


def report_markdown(report: ReportRecord) -> str:
    missing = missing_lines(report)
    parts = [
        f"# {plain(report.title)}",
        plain(about(report)),
        f"**{plain(report.verdict)}**",
        _list(report.certainty),
        "## The table",
        _table(report),
        *(["A dash stands where there is nothing to tell:", _list(missing)] if missing else []),
        *_pairs(report),
        *_section("Memory by part, planned against measured", _memory(report)),
        *_section("Training loss by tokens", _losses(report)),
        *_patterns(report),
        *_examples(report),
        *_section("Not done", _list(undone_lines(report))),
        *_section("The learning-rate search", _search(report)),
        *_section("Notes", _list(report.notes)),
        *_section("How to make it again", _fenced("\n".join(report.commands)) if report.commands else ""),
        *_section("Made on", _list(made_on(report))),
        *_recipes(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no table border, one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))


def made_on(report: ReportRecord) -> list[str]:
    machine = [f"{name}: {value}" for name, value in machine_in_words(report).items()]
    return machine + [f"{name} {' and '.join(versions)}" for name, versions in report.versions.items()]


def _section(title: str, body: str) -> list[str]:
    return [f"## {title}", body] if body else []


def _list(texts: Sequence[str]) -> str:
    return "\n".join(f"- {plain(text)}" for text in texts)


def _fenced(text: str, language: str = "") -> str:
    """A block whose fence is longer than any inside it."""
    longest = max((len(found) for found in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _rows(cells: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its heading, and numbers stand to the right."""
    lines = [f"| {' | '.join(row)} |" for row in cells]
    lines.insert(1, "|" + "---|" + "---:|" * (len(cells[0]) - 1))
    return "\n".join(lines)


def _table(report: ReportRecord) -> str:
    cells = [["", *(plain(variant.label) for variant in report.variants)]]
    if any(heading(variant) for variant in report.variants):
        cells.append(["", *(heading(variant) for variant in report.variants)])
    group = ""
    for row in report.table:
        if row.group != group:
            group = row.group
            cells.append([f"**{plain(group)}**", *("" for _ in report.variants)])
        note = f" ({plain(row.note)})" if row.note else ""
        cells.append([plain(row.label) + note, *(plain(value_words(value)) for value in row.values)])
    return _rows(cells)


def _pairs(report: ReportRecord) -> list[str]:
    if not report.pairs:
        return []
    names = labels(report)
    cells = [["difference", "rows only the first has", "only the second", "found", "test"]]
    cells += [
        [
            plain(f"{names[pair.first]} - {names[pair.second]}"),
            f"{pair.first_better:,}",
            f"{pair.second_better:,}",
            plain(pair_words(pair, report)),
            plain(pair.test),
        ]
        for pair in report.pairs
    ]
    return ["## Differences on the same rows", _rows(cells)]


def _memory(report: ReportRecord) -> str:
    variants = [variant for variant in report.variants if variant.planned_memory or variant.allocated_bytes]
    if not variants:
        return ""
    parts = list(dict.fromkeys(part for variant in variants for part in variant.planned_memory))

    def size(count_bytes: float | None) -> str:
        return format_bytes(count_bytes) if count_bytes else DASH

    rows = [["", *(plain(variant.label) for variant in variants)]]
    rows += [[f"{part}, planned", *(size(variant.planned_memory.get(part)) for variant in variants)] for part in parts]
    rows.append(["all, planned", *(size(sum(variant.planned_memory.values())) for variant in variants)])
    rows.append(["allocated, measured", *(size(variant.allocated_bytes) for variant in variants)])
    rows.append(["reserved, measured", *(size(variant.reserved_bytes) for variant in variants)])
    return _rows(rows)


def _losses(report: ReportRecord) -> str:
    """Each curve at five places; report.json has all of it."""
    rows = [["cell", *(f"{100 * part // PLACES} % of the tokens" for part in range(PLACES + 1))]]
    for cell in report.cells:
        if cell.curve_loss:
            last = len(cell.curve_loss) - 1
            losses = [cell.curve_loss[part * last // PLACES] for part in range(PLACES + 1)]
            rows.append([plain(cell.name), *(f"{loss:.3g}" for loss in losses)])
    return _rows(rows) if len(rows) > 1 else ""


def _patterns(report: ReportRecord) -> list[str]:
    if not report.patterns:
        return []
    names = labels(report)
    cells = [["right", "rows"]]
    for pattern in report.patterns:
        cells.append([plain(", ".join(names[name] for name in pattern.right) or "none"), f"{pattern.rows:,}"])
    return ["## Who is right on how many rows", _rows(cells)]


def _examples(report: ReportRecord) -> list[str]:
    if not report.examples:
        return []
    names = labels(report)
    parts = ["## Rows where they differ"]
    for example in report.examples:
        answers = [
            f"{names[answer.variant]} ({'right' if answer.correct else 'wrong'}): {answer.answer}"
            for answer in example.answers
        ]
        parts += [f"### Row {example.row}", _fenced(example.prompt), plain(f"wanted: {example.target}"), _list(answers)]
    return parts


def _search(report: ReportRecord) -> str:
    found = search_table(report.search)
    if found is None:
        return ""
    if found.text:
        return _fenced(found.text, "json")
    rows = [[plain(row.method), row.rate, row.value, row.interval, plain(row.note)] for row in found.rows]
    return f"{plain(found.words)}\n\n{_rows([['', 'learning rate', plain(found.metric), '95 % interval', ''], *rows])}"


def _recipes(report: ReportRecord) -> Iterator[str]:
    metric = metric_as_shown(report)
    for number, cell in enumerate(cell for cell in report.cells if cell.recipe):
        if number == 0:
            yield "## Every recipe"
        words = cell_words(cell.value, cell.low, cell.high, metric) or DASH
        yield f"### {plain(cell.name)}: {words}"
        yield _fenced(cell.recipe, "yaml")
