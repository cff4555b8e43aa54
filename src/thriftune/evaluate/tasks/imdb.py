"""Is a film review positive or negative? (Maas et al. 2011, "Learning Word Vectors for Sentiment Analysis")

The main score takes the likelier of the two words after the prompt, so every model has an opinion on every row. The
details have the score of what the model writes by itself.
"""

from __future__ import annotations

import re

from thriftune.evaluate.tasks.task import Task

LABELS = ("positive", "negative")

_LABEL_FIRST = re.compile(r"\W*(positive|negative)(?!\w)", re.IGNORECASE)


def parse_label(answer: str) -> str | None:
    """'positive' or 'negative' when the answer starts with that word, in any case; marks and spaces before it do not
    count. None otherwise: 'It is positive' and 'positively' are no label.
    """
    match = _LABEL_FIRST.match(answer)
    return match[1].lower() if match else None


TASK = Task(
    name="imdb",
    data="imdb",
    split="test",
    metric="accuracy",
    max_new_tokens=8,
    choices=LABELS,
    parse=parse_label,
)
