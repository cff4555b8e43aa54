"""A picture of how an adapter's ranks fell: each module's rank after every cut, and what the cut did to the loss."""

from __future__ import annotations

import re
from collections.abc import Iterable

from thriftune.records import RankCut, ReportCell, ReportRecord
from thriftune.report.plots import WIDE, Figure, Look, figure
from thriftune.report.svg import LINE, Drawing
from thriftune.units import format_count

LEFT = 92.0  # pixels for the modules' names
ROW = 14.0
LEVELS = 8  # shades in page.css: .rank1 to .rank8
NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.)")
CAPTION = (
    "One row a kind of module, one column a layer, one panel a cut. The darker, the higher the rank (of {start}); an "
    "empty box has lost its adapter. The losses are those of the step's own examples, right before and after the cut."
)


def rank_figures(report: ReportRecord, looks_of: dict[str, Look]) -> list[Figure]:
    """One for each variant whose ranks were cut, of its first seed."""
    first: dict[str, ReportCell] = {}
    for cell in report.cells:
        if cell.cuts:
            first.setdefault(cell.variant, cell)
    return [_figure(cell, looks_of[variant].label) for variant, cell in first.items()]


def _figure(cell: ReportCell, label: str) -> Figure:
    modules = [_place(name) for name in cell.cuts[0].ranks]
    kinds = list(dict.fromkeys(kind for kind, _ in modules))
    layers = 1 + max(layer for _, layer in modules)
    start = cell.start_rank or max(_all_ranks(cell.cuts))
    height = LINE + ROW * len(kinds) + 12

    def draw(width: float) -> Drawing:
        drawing = Drawing(width, height * len(cell.cuts))
        column = (width - LEFT - 4) / layers
        for number, cut in enumerate(cell.cuts):
            top = height * number + LINE + 4
            drawing.text(0, top - 6, _heading(cut, width), "t strong")
            for row, kind in enumerate(kinds):
                drawing.text(LEFT - 6, top + ROW * row + 10, kind, "t mute", "end")
            for name, rank in cut.ranks.items():
                kind, layer = _place(name)
                level = 0 if rank == 0 else max(1, round(LEVELS * rank / start))
                title = f"{name}: rank {rank}" if width == WIDE else ""
                x, y = LEFT + column * layer, top + ROW * kinds.index(kind)
                drawing.box(x, y, column - 1, ROW - 1, f"rank{level}", title)
        return drawing

    seed = f", seed {cell.seed}" if cell.seed is not None else ""
    told = "; ".join(_heading(cut, WIDE) for cut in cell.cuts)
    return figure(f"Ranks of {label}{seed}", CAPTION.format(start=start), draw, told, False)


def _all_ranks(cuts: Iterable[RankCut]) -> list[int]:
    return [rank for cut in cuts for rank in cut.ranks.values()]


def _place(module: str) -> tuple[str, int]:
    """Its kind, the last part of its name, and its layer: the first number in the name."""
    found = NUMBER.search(module)
    return module.rsplit(".", 1)[-1], int(found.group(1)) if found else 0


def _heading(cut: RankCut, width: float) -> str:
    jump = f"loss {cut.loss_before:.4f} \u2192 {cut.loss_after:.4f} ({cut.loss_after - cut.loss_before:+.4f})"
    if width < WIDE:
        return f"step {cut.step:,}: {jump}"
    parameters = f"{format_count(cut.parameters_before)} \u2192 {format_count(cut.parameters_after)} parameters"
    return f"step {cut.step:,}: {parameters}, {jump}"
