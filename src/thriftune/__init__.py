"""thriftune: adapt open language models to a task with the least memory, time and money."""

__version__ = "0.1.0"
