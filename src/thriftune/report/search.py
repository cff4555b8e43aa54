"""The learning-rate search as rows: what was tried for each method, what it gave, which was taken."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from thriftune.report.variants import Metric, label_of
from thriftune.report.wording import DASH, metric_name, range_text, score_text


@dataclass(frozen=True, slots=True)
class SearchRow:
    method: str
    rate: str
    value: str
    interval: str
    note: str
    chosen: bool


@dataclass(frozen=True, slots=True)
class SearchTable:
    """`text` is the whole search as JSON where it is not of the shape that the rows are read from."""

    metric: str
    words: str
    rows: list[SearchRow] = field(default_factory=list)
    text: str = ""


def search_table(search: dict[str, Any] | None) -> SearchTable | None:
    """Of {"metric", "higher_is_better", "split" or "rows", "methods": {METHOD: {"chosen": rate, "tried": [{
    "learning_rate", "value", "low", "high", "reason"}, ...]}}}; None without a search."""
    if not search:
        return None
    try:
        return _read(search)
    except (KeyError, TypeError, ValueError, AttributeError):
        return SearchTable("", "", text=json.dumps(search, indent=2, default=str))


def _read(search: dict[str, Any]) -> SearchTable:
    tried = [one for method in search["methods"].values() for one in method["tried"]]
    values = [float(one["value"]) for one in tried if one.get("value") is not None]
    higher = bool(search.get("higher_is_better", True))
    shares = higher and all(0 <= value <= 1 for value in values)
    metric = Metric(str(search.get("metric", "score")), higher, shares, False)
    rows = [
        _row(label_of(name, name), one, found.get("chosen"), metric)
        for name, found in search["methods"].items()
        for one in sorted(found["tried"], key=lambda one: float(one["learning_rate"]))
    ]
    place = search.get("split") or f"{search.get('rows', 'some')} rows held out of the training split"
    better = "" if higher else "; lower is better"
    return SearchTable(metric_name(metric).capitalize(), f"Scored on {place}{better}; never on the test rows.", rows)


def _row(method: str, one: dict[str, Any], chosen: Any, metric: Metric) -> SearchRow:
    rate, value, low, high = float(one["learning_rate"]), one.get("value"), one.get("low"), one.get("high")
    taken = chosen is not None and float(chosen) == rate
    return SearchRow(
        method=method,
        rate=f"{rate:.3g}",
        value=DASH if value is None else score_text(float(value), metric),
        interval=DASH if low is None or high is None else range_text(float(low), float(high), metric),
        note="taken" if taken else str(one.get("reason") or ""),
        chosen=taken,
    )
