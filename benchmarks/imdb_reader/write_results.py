"""docs/results.md from the records that run.py has kept: what an article claims, what came out, how sure that is.

    python benchmarks/imdb_reader/write_results.py            prints the page
    python benchmarks/imdb_reader/write_results.py --write    puts it into docs/results.md

Refuses records that are not there or not whole. tests/unit/test_results_page.py holds the page to the records.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from thriftune.records import CellRecord, PairTest, ReportRecord, ReportValue, RunRecord, read_record
from thriftune.units import format_seconds

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results" / "reader"
PAGE = REPOSITORY / "docs" / "results.md"
BASE_CLAIMED, TUNED_CLAIMED, WITHIN_POINTS = 88, 92, 2  # percent, percent, points
METHODS = ("base", "full", "lora", "qlora")
TRAINED = METHODS[1:]
SEEDS = 3
LEFT_OUT = ("interval",)  # rows of the table that the scores' section has

INTRODUCTION = """\
# Results: base, full, LoRA and QLoRA on IMDb

Written by `benchmarks/imdb_reader/write_results.py` from the records in `benchmarks/results/reader/`; the same numbers,
with every plot and recipe, are in [its report](../benchmarks/results/reader/imdb/report.md). The model is a Llama of
16 M parameters, pretrained on reviews among other texts; the article's is an 8B. So this shows what the methods do to
one model and data set, with how much certainty, and not what an 8B would score."""

GSM8K_WORDS = """\
A model of this size solves next to no word problem. What is shown is that training, asking, parsing and marking work
on all rows, and how long that takes. That the marks are right is shown without a model, in `tests/unit/test_tasks.py`:
of the data's own solutions all 1,319 are marked right, of the same solutions shuffled about none."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="put the page into docs/results.md")
    arguments = parser.parse_args()
    text = page(arguments.results)
    if arguments.write:
        PAGE.write_text(text, encoding="utf-8")
        return
    print(text, end="")


def page(results: Path) -> str:
    """The whole page. Exits for records that are missing or not whole, since a number without a record is not told."""
    imdb, gsm8k = (whole_report(results / part, seeds) for part, seeds in (("imdb", SEEDS), ("gsm8k", 1)))
    parts = [
        INTRODUCTION,
        "## The verdict",
        f"**{imdb.verdict}**",
        listed(imdb.certainty),
        "## The article's claims",
        table(["The article", "What came out", "How sure"], claims(imdb)),
        "## The scores",
        table(["", "Accuracy", "95 % interval", "By seed"], scores(imdb)),
        *rates(imdb),
        "## The table",
        table(["", *(variant.label for variant in imdb.variants)], measures(imdb)),
        "## GSM8K, end to end",
        GSM8K_WORDS,
        table(["", "Right", "Without a number", "Trained in", "Asked in"], gsm8k_rows(results / "gsm8k")),
        "## How it was made",
        listed([*made(imdb), *(note for note in imdb.notes if "path" in note or "at once" in note)]),
        "\n".join(f"    {command}" for command in (*imdb.commands, *gsm8k.commands)),
    ]
    return "\n\n".join(parts) + "\n"


def whole_report(folder: Path, seeds: int) -> ReportRecord:
    path = folder / "report.json"
    if not path.is_file():
        sys.exit(f"{path} is not there: run benchmarks/imdb_reader/run.py first")
    report = read_record(path, ReportRecord)
    done = {variant.method: len(variant.seeds) for variant in report.variants}
    missing = [method for method in METHODS if done.get(method, -1) < (0 if method == "base" else seeds)]
    undone = [cell.name for cell in report.cells if cell.status != "done"]
    if missing or undone:
        sys.exit(f"{path} is not whole: {', '.join([*missing, *undone])}; run benchmarks/imdb_reader/run.py again")
    return report


def claims(report: ReportRecord) -> list[list[str]]:
    base = value(report, "base", "score")
    found = [
        [
            f"the base scores {BASE_CLAIMED} %",
            f"{percent(base.mean)}",
            f"{against(base, BASE_CLAIMED)}; another base than the article's, so the claim stays open",
        ]
    ]
    for method in TRAINED:
        score = value(report, method, "score")
        found.append(
            [
                f"tuned, it scores {TUNED_CLAIMED} %",
                f"{label(report, method)} {text_of(score)}",
                against(score, TUNED_CLAIMED),
            ]
        )
    pair = pair_of(report, "full", "qlora")
    found.append([f"QLoRA is within {WITHIN_POINTS} points of full", *within(pair)])
    return found


def against(score: ReportValue, claimed: float) -> str:
    """Whether the 95 % interval lies above, below or around a claimed percentage."""
    low, high = 100 * number(score.low), 100 * number(score.high)
    interval = f"95 % interval {low:.1f} to {high:.1f} %"
    if low > claimed:
        return f"above {claimed} %: {interval}"
    if high < claimed:
        return f"below {claimed} %: {interval}"
    return f"not told apart from {claimed} %: {interval}"


def within(pair: PairTest) -> list[str]:
    """What came out and how sure it is that QLoRA loses no more than the points allowed; `pair` is full - QLoRA."""
    difference, low, high = (100 * number(part) for part in (pair.difference, pair.low, pair.high))
    came = f"full less QLoRA: {difference:+.2f} points"
    interval = f"95 % interval {low:+.2f} to {high:+.2f} points, on the same rows over {len(pair.seeds)} seeds"
    if low > -WITHIN_POINTS and high < WITHIN_POINTS:
        sure = "shown"
    elif low > WITHIN_POINTS or high < -WITHIN_POINTS:
        sure = "refuted"
    else:
        sure = "neither shown nor refuted"
    shown = "a difference is shown" if pair.shown else "no difference shown"
    return [came, f"{sure}: {interval}; {shown} (p = {number(pair.p_value):.2g})"]


def scores(report: ReportRecord) -> list[list[str]]:
    rows = []
    for variant in report.variants:
        score = value(report, variant.method, "score")
        seeds = ", ".join(f"{100 * one:.2f}" for one in score.by_seed.values()) if variant.seeds else "-"
        interval = f"{100 * number(score.low):.1f} to {100 * number(score.high):.1f} %"
        rows.append([variant.label, text_of(score), interval, seeds])
    return rows


def rates(report: ReportRecord) -> list[str]:
    """The search, where there was one."""
    if not report.search:
        return []
    rows = []
    for method, found in report.search["methods"].items():
        tried = sorted(found["tried"], key=lambda one: float(one["learning_rate"]))
        words = [
            f"{one['learning_rate']:.3g}: " + (f"{one['value']:.4f}" if one["value"] is not None else one["reason"])
            for one in tried
        ]
        rows.append([label(report, method), f"{found['chosen']:.3g}", ", ".join(words)])
    words = f"Searched on {report.search['split']}, with runs of {report.search['steps']:,} steps where a cell has "
    words += f"{report.search['steps_of_a_cell']:,}; never on test rows. Loss on the rows that were held out:"
    return ["## The learning rates", words, table(["", "Taken", "Tried"], rows)]


def measures(report: ReportRecord) -> list[list[str]]:
    rows = []
    for row in report.table:
        if row.key in LEFT_OUT:
            continue
        note = f" ({row.note})" if row.note else ""
        rows.append([f"{row.label}{note}", *(text_of(found) for found in row.values)])
    return rows


def gsm8k_rows(folder: Path) -> list[list[str]]:
    rows = []
    for path in sorted(folder.glob("cells/*/cell.json")):
        cell = read_record(path, CellRecord)
        if cell.result is None:
            sys.exit(f"{path} has no result")
        run = path.parent / "record.json"
        trained = format_seconds(read_record(run, RunRecord).train_s) if run.is_file() else "-"
        right = round(cell.result.value * cell.result.rows)
        unparsed = cell.result.details["unparsed"]
        asked = format_seconds(cell.result.wall_s)
        rows.append([path.parent.name, f"{right:,} of {cell.result.rows:,}", f"{unparsed:,}", trained, asked])
    return rows


def made(report: ReportRecord) -> list[str]:
    versions = ", ".join(f"{name} {' and '.join(found)}" for name, found in report.versions.items())
    return [f"GPU: {report.hardware.get('gpu', 'none')}", versions, report.train_data, report.test_data]


def value(report: ReportRecord, method: str, key: str) -> ReportValue:
    row = next(row for row in report.table if row.key == key)
    place = next(place for place, variant in enumerate(report.variants) if variant.method == method)
    return row.values[place]


def pair_of(report: ReportRecord, first: str, second: str) -> PairTest:
    pair = next(pair for pair in report.pairs if {pair.first, pair.second} == {first, second})
    if pair.first == first:
        return pair
    turned = {"first": first, "second": second, "difference": -number(pair.difference)}
    return pair.model_copy(update={**turned, "low": -number(pair.high), "high": -number(pair.low)})


def label(report: ReportRecord, method: str) -> str:
    return next(variant.label for variant in report.variants if variant.method == method)


def number(found: float | None) -> float:
    """Raises ValueError for a record that lacks it."""
    if found is None:
        raise ValueError("the report lacks a number that the page tells")
    return found


def percent(share: float | None) -> str:
    return f"{100 * number(share):.2f} %"


def text_of(found: ReportValue) -> str:
    return " ".join(part for part in (found.text, found.spread_text) if part)


def listed(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
