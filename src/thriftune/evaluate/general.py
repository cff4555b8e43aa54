"""What was forgotten: the mean loss on a fixed general text, the same one for every model and method.

The text, `general.txt` in this package, was written for it: a story, a letter, a dialogue, instructions, some science,
arithmetic and code, none of it from anywhere else. A model that was tuned on one task and reads this worse than before
has paid for the task with what it knew. Values compare models with the same tokenizer; between tokenizers compare
`bits_per_byte`.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from thriftune.evaluate.perplexity import measure_text, read_text, window_length
from thriftune.evaluate.score import Asked, Score

GENERAL = "general"

# The window is fixed and not the recipe's `max_length`: what was tuned on long rows and on short ones must be asked the
# same. It leaves enough windows for an interval and fits the smallest models.
GENERAL_WINDOW = 256


def score_general(asked: Asked) -> Score:
    """Mean loss in nats a token, with the interval over windows. `data.path` names another text to read instead."""
    if asked.data.path is None:
        text, source = general_text(), "the general text inside the package"
    else:
        path = Path(asked.data.path).expanduser()
        text, source = read_text(path), str(path)
    length = window_length(asked.model, GENERAL_WINDOW)
    found, answers, details = measure_text(text, length, asked)
    digest = hashlib.sha256(text.encode()).hexdigest()
    details = {"data": source, "sha256": digest, **details, "perplexity": found.value}
    return Score("loss", found.loss, found.loss_low, found.loss_high, answers, details)


def general_text() -> str:
    return resources.files("thriftune.evaluate").joinpath("general.txt").read_text(encoding="utf-8")
