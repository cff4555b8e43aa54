"""Pages about runs: cells read back, checked to be comparable, tested against chance, and shown. No torch."""

from thriftune.report.build import build_report
from thriftune.report.cells import Cell, read_cells
from thriftune.report.text import report_text
from thriftune.report.write import write_report

__all__ = ["Cell", "build_report", "read_cells", "report_text", "write_report"]
