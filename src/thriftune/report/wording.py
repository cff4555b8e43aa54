"""Numbers and states as the report's texts write them."""

from __future__ import annotations

from collections.abc import Sequence

from thriftune.report.variants import Metric

DASH = "-"
STATUS_WORDS = {
    "done": "done",
    "out_of_memory": "ran out of memory",
    "refused": "would not fit by the plan",
    "failed": "failed",
    "skipped": "was left out",
}


def score_text(value: float, metric: Metric) -> str:
    return f"{100 * value:.1f} %" if metric.as_percent else f"{value:.4g}"


def spread_text(value: float, metric: Metric) -> str:
    number = 100 * value if metric.as_percent else value
    if abs(number) < 1e-9:  # equal but for the rounding of the mean
        return "± 0"
    return f"± {number:.1f}" if metric.as_percent and number >= 0.095 else f"± {number:.2g}"


def range_text(low: float, high: float, metric: Metric) -> str:
    if metric.as_percent:
        return f"{100 * low:.1f} to {100 * high:.1f} %"
    return f"{low:.4g} to {high:.4g}"


def cell_words(value: float | None, low: float | None, high: float | None, metric: Metric) -> str:
    """'87.0 % (84.2 to 89.3 %)': one cell's score with the interval of its test rows; '' where it has none."""
    if value is None:
        return ""
    between = f" ({range_text(low, high, metric)})" if low is not None and high is not None else ""
    return score_text(value, metric) + between


def difference_text(value: float, metric: Metric) -> str:
    """'+0.4 points', '-0.012 nats a token': what a pair's difference is measured in."""
    if metric.as_percent:
        return f"{100 * value:+.1f} points"
    return f"{value:+.3g} nats a token" if metric.logarithmic else f"{value:+.3g}"


def difference_range(low: float, high: float, metric: Metric) -> str:
    scale, form = (100, "+.1f") if metric.as_percent else (1, "+.3g")
    return f"{scale * low:{form}} to {scale * high:{form}}"


def p_text(value: float) -> str:
    return f"{value:.2g}" if value >= 0.001 else "below 0.001"


def listed(names: Sequence[str], most: int = 3) -> str:
    """'LoRA', 'LoRA and QLoRA', 'a, b, c and 4 more'."""
    if len(names) > most:
        return ", ".join(names[:most]) + f" and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def metric_name(metric: Metric) -> str:
    return metric.name.replace("_", " ")
