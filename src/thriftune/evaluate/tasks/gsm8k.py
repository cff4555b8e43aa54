"""Grade school word problems (Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems").

The answer is reasoning, then a line '#### 42'. As in the paper a prediction is the number after the marks and nothing
else: an answer without marks is wrong, even when it names the right number.
"""

from __future__ import annotations

import re
from decimal import Decimal

from thriftune.evaluate.tasks.task import Task

MARKS = "####"

# A sign and a currency sign in either order, digits with commas, decimals; not part of a fraction, a time or a power.
_NUMBER = re.compile(
    r"\s*(?P<sign>[-+\u2212])?\s?\$?(?P<inner>[-\u2212])?\s?"
    r"(?P<digits>[0-9][0-9,]*+(?:\.[0-9]++)?+|\.[0-9]++)"
    r"(?![/:^][0-9])(?![eE][-+]?[0-9])"
)


def parse_number(answer: str) -> str | None:
    """The number after the last '####', in normal form: '$1,200.50.' -> '1200.5', '5.0' -> '5', '-0' -> '0'."""
    _, marks, rest = answer.rpartition(MARKS)
    match = _NUMBER.match(rest) if marks else None
    if match is None:
        return None
    number = Decimal(match["digits"].replace(",", ""))
    if match["sign"] in ("-", "\u2212") or match["inner"]:
        number = -number
    text = f"{number:f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


TASK = Task(
    name="gsm8k",
    data="gsm8k",
    split="test",
    metric="accuracy",
    max_new_tokens=512,
    choices=None,
    parse=parse_number,
)
