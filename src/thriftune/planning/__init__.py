"""What a plan is made of, found: the model by its name, the rows' lengths, the GPUs, the prices. No torch."""

from thriftune.planning.devices import cpu_device, list_gpus, own_gpu, unknown_gpu
from thriftune.planning.run import RunPlan, plan_run
from thriftune.planning.words import plan_words, refuse_too_long

__all__ = ["RunPlan", "cpu_device", "list_gpus", "own_gpu", "plan_run", "plan_words", "refuse_too_long", "unknown_gpu"]
