"""The report's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thriftune.records import ReportRecord, write_record, write_text_atomically
from thriftune.report.cells import Cell
from thriftune.report.markdown import report_markdown
from thriftune.report.page import report_page


def write_report(report: ReportRecord, cells: Sequence[Cell], folder: Path) -> None:
    """report.html, report.md and report.json in `folder`, each whole or as it was before."""
    write_text_atomically(folder / "report.html", report_page(report))
    write_text_atomically(folder / "report.md", report_markdown(report))
    write_record(folder / "report.json", report)
