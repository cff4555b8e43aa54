"""The page: one HTML file that needs no network and no script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from thriftune.records import PairTest, ReportRecord
from thriftune.report.bars import GROUPS, agreement_figure, difference_marks, memory_figure
from thriftune.report.plots import Figure, cost_figures, looks, loss_figure
from thriftune.report.ranks import rank_figures
from thriftune.report.search import search_table
from thriftune.report.text import about, heading, in_short, labels, machine_in_words, metric_as_shown, undone_lines
from thriftune.report.wording import STATUS_WORDS, cell_words, difference_range, difference_text, p_text
from thriftune.units import format_bytes


def report_page(report: ReportRecord) -> str:
    """report.html. Every text of the record is escaped: answers and names come from models and people."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["unbroken"] = unbroken
    template = environment.from_string(_file("page.html.jinja"))
    looks_of = looks(report)
    near, rest = _pairs(report)
    tests = list(dict.fromkeys(pair.test for pair in report.pairs))
    lettered = any(look.tag != look.label for look in looks_of.values())
    return template.render(
        report=report,
        css=Markup(_file("page.css")),
        about=about(report),
        machine=_machine(report),
        labels=labels(report),
        looks=looks_of,
        lettered=lettered,
        headings=[heading(variant) for variant in report.variants],
        reasons=_reasons(report),
        spreads=any(value.spread_text for row in report.table for value in row.values),
        several_seeds=any(len(variant.seeds) > 1 for variant in report.variants),
        notes=report.notes,
        figures=[_safe(found) for found in _figures(report)],
        memory_groups=GROUPS,
        pairs=near,
        one_test=tests[0] if len(tests) == 1 else "",
        other_pairs=rest,
        undone=undone_lines(report),
        search=search_table(report.search),
        cell_scores=[cell_words(cell.value, cell.low, cell.high, metric_as_shown(report)) for cell in report.cells],
        hardware=machine_in_words(report),
        status_words=STATUS_WORDS,
    )


def unbroken(text: str) -> str:
    """No line ends between a number and its unit, and none within p = 1."""
    text = re.sub(r"\bp = (?=\d)", "p\u00a0=\u00a0", text)
    return re.sub(r"(?<=\d) (?=(%|x|[KMGT]iB|points|s|min|h)\b|%)", "\u00a0", text)


def _file(name: str) -> str:
    return resources.files("thriftune.report").joinpath(name).read_text(encoding="utf-8")


def _figures(report: ReportRecord) -> Sequence[Figure]:
    looks_of = looks(report)
    found = [
        *cost_figures(report, looks_of),
        loss_figure(report, looks_of),
        agreement_figure(report, looks_of),
        memory_figure(report, looks_of),
        *rank_figures(report, looks_of),
    ]
    return [figure for figure in found if figure is not None]


def _safe(found: Figure) -> dict[str, Any]:
    """Drawings escape their own texts."""
    return {
        "title": found.title,
        "caption": found.caption,
        "legend": found.legend,
        "wide": Markup(found.wide),
        "narrow": Markup(found.narrow),
    }


def _machine(report: ReportRecord) -> str:
    found = report.hardware
    if found.get("gpu"):
        memory = found.get("gpu_memory_bytes")
        return f"Trained on {found['gpu']}" + (f" with {format_bytes(memory)}" if memory else "")
    if found:
        return f"Trained on a CPU with {found.get('cpu_count', '?')} processors"
    return ""


def _reasons(report: ReportRecord) -> dict[str, str]:
    """Why there is a dash -> the letter that stands beside it."""
    reasons = dict.fromkeys(value.missing for row in report.table for value in row.values if value.missing)
    return {reason: chr(ord("a") + place % 26) for place, reason in enumerate(reasons)}


def _pairs(report: ReportRecord) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pairs to show, and those to fold away: of many, the ones without the chosen variant."""
    names = labels(report)
    marks = difference_marks(report)
    shown: list[dict[str, Any]] = []
    folded: list[dict[str, Any]] = []
    for pair, mark in zip(report.pairs, marks, strict=True):
        row = {"first": names[pair.first], "second": names[pair.second], "test": pair.test}
        row |= _tested(pair, report, mark)
        (shown if in_short(pair, report) else folded).append(row)
    return shown, folded


def _tested(pair: PairTest, report: ReportRecord, mark: str) -> dict[str, Any]:
    if pair.difference is None or pair.low is None or pair.high is None or pair.adjusted_p_value is None:
        return {"tested": False}
    metric = metric_as_shown(report)
    return {
        "tested": True,
        "difference": difference_text(pair.difference, metric),
        "interval": difference_range(pair.low, pair.high, metric),
        "mark": Markup(mark),
        "first_better": f"{pair.first_better:,}",
        "second_better": f"{pair.second_better:,}",
        "p": p_text(pair.adjusted_p_value),
        "words": "a difference is shown" if pair.shown else "no difference shown",
    }
