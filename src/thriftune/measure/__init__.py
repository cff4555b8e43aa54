"""Times of a plan measured on this machine: a few layers of the model, with random weights, through the loop's step."""

from thriftune.measure.layers import random_model
from thriftune.measure.step import Step, StepTime, measure_step
from thriftune.measure.words import measure_words

__all__ = ["Step", "StepTime", "measure_step", "measure_words", "random_model"]
