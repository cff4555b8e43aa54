"""One command that settles which method is right for a model and data: a fair grid of runs, and its report."""

from thriftune.compare.compare import Compared, compare, show_grid
from thriftune.compare.jobs import Asked
from thriftune.compare.pages import report_folders

__all__ = ["Asked", "Compared", "compare", "report_folders", "show_grid"]
