"""Scores with their intervals: tasks with right answers, a user's own, the harness's, and the loss on a text."""

from thriftune.evaluate.evaluate import NAMES, check_rows, check_task, evaluate, file_label
from thriftune.evaluate.few_shot import GSM8K_FEW_SHOT
from thriftune.evaluate.general import GENERAL
from thriftune.evaluate.harness import HARNESS
from thriftune.evaluate.own import is_own
from thriftune.evaluate.perplexity import PERPLEXITY
from thriftune.evaluate.tasks import TASKS, Task

__all__ = [
    "GENERAL",
    "GSM8K_FEW_SHOT",
    "HARNESS",
    "NAMES",
    "PERPLEXITY",
    "TASKS",
    "Task",
    "check_rows",
    "check_task",
    "evaluate",
    "file_label",
    "is_own",
]
