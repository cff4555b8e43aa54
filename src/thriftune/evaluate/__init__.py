"""Scores with their intervals: tasks with right answers, and perplexity of a text."""

from thriftune.evaluate.evaluate import PERPLEXITY, evaluate
from thriftune.evaluate.tasks import TASKS, Task

__all__ = ["PERPLEXITY", "TASKS", "Task", "evaluate"]
