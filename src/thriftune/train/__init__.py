"""The step and what surrounds it: loss, optimizer, loop, checkpoints, meter. Knows neither `models` nor `evaluate`."""

from thriftune.train.job import StopRequest, TrainJob, TrainOutcome
from thriftune.train.loop import train
from thriftune.train.observe import Observer, Observers

__all__ = ["Observer", "Observers", "StopRequest", "TrainJob", "TrainOutcome", "train"]
