"""The report of one comparison or of any folders with cells and runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thriftune.compare.rates import FILE as SEARCH_FILE
from thriftune.compare.rates import NOTE, SHARE_OF_STEPS, read_search
from thriftune.planning import read_market
from thriftune.records import ReportRecord
from thriftune.report import build_report, read_cells, write_report


def report_folders(folders: Sequence[Path], output: Path, notes: Sequence[str], gpu: str | None = None) -> ReportRecord:
    """Join what is in these folders into report.html, report.md and report.json in `output`; with the prices of the
    GPU called `gpu`, else of the one that the cells ran on.

    Raises InputError when they cannot stand in one table, with every reason, and for an unknown GPU.
    """
    cells = read_cells(folders)
    searches = {str(folder): read_search(folder / "search") for folder in folders if has_search(folder)}
    search: dict[str, Any] | None = next(iter(searches.values())) if len(searches) == 1 else searches or None
    said = [NOTE.format(share=f"{100 * SHARE_OF_STEPS:.0f} %")] if searches else []
    title = " and ".join(folder.resolve().name for folder in folders[:3]) + (" and more" if len(folders) > 3 else "")
    title = f"Comparison {title}"
    report = build_report(cells, title=title, market=read_market(), search=search, notes=[*said, *notes], gpu=gpu)
    write_report(report, cells, output)
    return report


def has_search(folder: Path) -> bool:
    return (folder / "search" / SEARCH_FILE).is_file()
