"""A small set of drawing words for inline SVG. Sizes are CSS pixels: a figure is drawn for the width it is shown at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

LETTER = 7.2  # pixels that a letter of 12-pixel bold text takes, on the wide side
LINE = 14.0  # pixels between two lines of text
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2 1 2")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "down")
COLOURS = 8  # .s1 to .s8 in page.css; .s0 is the base


@dataclass
class Drawing:
    width: float
    height: float
    parts: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.parts.append(f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>')

    def path(self, points: Sequence[tuple[float, float]], kind: str, dash: str = "") -> None:
        steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<path class="{kind}"{dashed} d="M{steps}"/>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, title: str = "") -> None:
        inside = f"><title>{escape(title)}</title></rect>" if title else "/>"
        self.parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}"{inside}'
        )

    def text(self, x: float, y: float, text: str, kind: str = "t", anchor: str = "start") -> None:
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def dot(self, x: float, y: float, radius: float, kind: str) -> None:
        self.parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>')

    def marker(self, x: float, y: float, shape: str, kind: str, size: float = 5.0) -> None:
        s = size
        outlines = {
            "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
            "triangle": [(0, -1.2 * s), (1.15 * s, s), (-1.15 * s, s)],
            "down": [(0, 1.2 * s), (1.15 * s, -s), (-1.15 * s, -s)],
            "diamond": [(0, -1.35 * s), (1.35 * s, 0), (0, 1.35 * s), (-1.35 * s, 0)],
        }
        if shape == "circle":
            self.dot(x, y, size, kind)
        elif shape == "cross":
            self.parts.append(
                f'<path class="{kind} thick" d="M{x - s:.1f} {y - s:.1f}L{x + s:.1f} {y + s:.1f}'
                f'M{x - s:.1f} {y + s:.1f}L{x + s:.1f} {y - s:.1f}"/>'
            )
        else:
            points = "L".join(f"{x + dx:.1f} {y + dy:.1f}" for dx, dy in outlines[shape])
            self.parts.append(f'<path class="{kind}" d="M{points}Z"/>')

    def render(self, title: str, description: str, kind: str) -> str:
        """The element, with its name and description for those who do not see it."""
        return (
            f'<svg class="plot {kind}" role="img" aria-label="{escape(title)}" viewBox="0 0 {self.width:.0f} '
            f'{self.height:.0f}" width="{self.width:.0f}" height="{self.height:.0f}"><title>{escape(title)}</title>'
            f"<desc>{escape(description)}</desc>{''.join(self.parts)}</svg>"
        )


def text_width(text: str) -> float:
    return LETTER * len(text)


@dataclass(frozen=True, slots=True)
class Axis:
    """From numbers between `low` and `high` to pixels between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within low and high."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(power * step for step in (1, 2, 5, 10) if power * step >= rough * 0.999)
    first = math.ceil(low / apart - 1e-9)
    return [number * apart for number in range(first, math.floor(high / apart + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within low and high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in (1, 2, 5) if low <= step * 10.0**power <= high]


def padded(values: Sequence[float], share: float) -> tuple[float, float]:
    """The range of values with some room on both sides; a range of its own for equal ones."""
    low, high = min(values), max(values)
    room = share * (high - low) if high > low else 0.1 * abs(high) or 1.0
    return low - room, high + room


def horizontal_axis(drawing: Drawing, axis: Axis, y: float, text_of: Callable[[float], str], name: str) -> None:
    """Ticks below y and the axis's name under them."""
    drawing.line(axis.start, y, axis.end, y, "axis")
    words = [(axis(value), text_of(value)) for value in ticks(axis.low, axis.high, int((axis.end - axis.start) / 70))]
    for x, word in words:
        drawing.line(x, y, x, y + 4, "axis")
        drawing.text(x, y + 16, word, "t mute", "middle")
    drawing.text((axis.start + axis.end) / 2, y + 32, name, "t mute", "middle")


def vertical_axis(drawing: Drawing, axis: Axis, x: float, right: float, text_of: Callable[[float], str]) -> None:
    """Ticks left of x, with a thin line across at each."""
    most = int((axis.start - axis.end) / 40)
    values = log_ticks(axis.low, axis.high) if axis.logarithmic else ticks(axis.low, axis.high, most)
    for value in values:
        drawing.line(x, axis(value), right, axis(value), "grid")
        drawing.text(x - 6, axis(value) + 4, text_of(value), "t mute", "end")


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near as possible to the wanted ones, in their order, at least `gap` apart and within low and high."""
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    placed = [0.0] * len(wanted)
    last = low - gap
    for number in order:
        last = max(wanted[number], last + gap)
        placed[number] = last
    limit = high
    for number in reversed(order):
        placed[number] = min(placed[number], limit)
        limit = placed[number] - gap
    return placed


def number_text(value: float) -> str:
    """A tick's number without digits that say nothing."""
    return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.3g}"
