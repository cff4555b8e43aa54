"""The tasks. A new one is a file with a `TASK` and a row in `TASKS`."""

from thriftune.evaluate.tasks import gsm8k, imdb, reviews, sums
from thriftune.evaluate.tasks.task import Task

TASKS: dict[str, Task] = {
    "gsm8k": gsm8k.TASK,
    "imdb": imdb.TASK,
    "reviews": reviews.TASK,
    "sums": sums.TASK,
}

__all__ = ["TASKS", "Task"]
