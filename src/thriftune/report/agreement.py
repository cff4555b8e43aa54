"""Which variants answer which rows right, and rows that show how they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from thriftune.records import ReportAnswer, ReportExample, ReportPattern
from thriftune.report.cells import BASE
from thriftune.report.pairs import RowScores
from thriftune.report.variants import Variant

Named = TypeVar("Named")
EXAMPLES = 10
MOST_COMPARED = 16
LONGEST_PROMPT, LONGEST_ANSWER = 900, 400  # characters shown of each
CUT = " [...] "


def patterns(variants: Sequence[Variant], rows: dict[str, RowScores]) -> list[ReportPattern]:
    """Each set of variants that is right on the same rows, with how many rows, most rows first.

    A variant is right on a row when it is in more than half of its seeds. [] where answers are neither right nor wrong,
    or are missing for a variant that is done.
    """
    done = compared([variant for variant in variants if variant.done])
    right = {variant.name: _mostly_right(variant, rows) for variant in done}
    if len(done) < 2 or any(table is None for table in right.values()):
        return []
    tables = {name: table for name, table in right.items() if table is not None}
    shared = set.intersection(*(set(table) for table in tables.values()))
    counts = Counter(tuple(name for name, table in tables.items() if table[row]) for row in shared)
    return [ReportPattern(right=list(names), rows=count) for names, count in counts.most_common()]


def compared(variants: Sequence[Named]) -> list[Named]:
    """The variants whose agreement is counted: all, or of very many the first and the last, which is the base."""
    return list(variants) if len(variants) <= MOST_COMPARED else [*variants[: MOST_COMPARED - 1], variants[-1]]


def _mostly_right(variant: Variant, rows: dict[str, RowScores]) -> dict[int, bool] | None:
    tables = [rows[cell.key] for cell in variant.done]
    if any(not table or any(score not in (0.0, 1.0) for score, _ in table.values()) for table in tables):
        return None
    return {row: 2 * sum(table.get(row, (0.0, 1.0))[0] for table in tables) > len(tables) for row in tables[0]}


def examples(variants: Sequence[Variant], rows: dict[str, RowScores]) -> list[ReportExample]:
    """Up to ten rows on which trained variants differ (else: on which they differ from the base), each with what the
    first seed of every variant answered. Rows that split the variants most evenly come first, then by number."""
    done = [variant for variant in variants if variant.done and rows[variant.done[0].key]]
    trained = [variant for variant in done if variant.method != BASE]
    numbers = _split_rows(trained, rows) or _split_rows(done, rows)
    chosen = numbers[:EXAMPLES]
    wanted = set(chosen)
    answers = {
        variant.name: {answer["row"]: answer for answer in variant.done[0].answers if answer["row"] in wanted}
        for variant in done
    }
    return [_example(number, done, answers) for number in chosen]


def _split_rows(variants: Sequence[Variant], rows: dict[str, RowScores]) -> list[int]:
    if len(variants) < 2:
        return []
    tables = [rows[variant.done[0].key] for variant in variants]
    uneven: list[tuple[float, int]] = []
    for row in tables[0]:
        found = [table[row][0] for table in tables if row in table]
        if all(score in (0.0, 1.0) for score in found) and len(set(found)) > 1:
            uneven.append((abs(2 * sum(found) - len(found)), row))
    return [row for _, row in sorted(uneven)]


def _example(row: int, done: Sequence[Variant], answers: dict[str, dict[int, dict[str, object]]]) -> ReportExample:
    first = answers[done[0].name][row]
    given = []
    for variant in done:
        answer = answers[variant.name].get(row)
        if answer is not None:
            given.append(
                ReportAnswer(
                    variant=variant.name,
                    seed=variant.done[0].record.seed,
                    answer=shortened(_text(answer.get("answer")), LONGEST_ANSWER),
                    read_as=shortened(_text(answer.get("prediction")), LONGEST_ANSWER),
                    correct=bool(answer.get("correct")),
                )
            )
    prompt, target = _text(first.get("prompt")), _text(first.get("target"))
    return ReportExample(
        row=row,
        prompt=shortened(prompt, LONGEST_PROMPT),
        target=shortened(target, LONGEST_ANSWER),
        answers=given,
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)


def shortened(text: str, longest: int) -> str:
    """Both ends of a text that is too long: prompts ask at their end."""
    if len(text) <= longest:
        return text
    half = (longest - len(CUT)) // 2
    return text[:half] + CUT + text[-half:]
