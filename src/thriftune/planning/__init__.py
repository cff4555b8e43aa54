"""What a plan is made of, found: the model by its name, the rows' lengths, the GPUs, the prices. No torch."""

from thriftune.planning.devices import cpu_device, list_gpus, own_gpu, read_market, split_count, unknown_gpu
from thriftune.planning.run import RunPlan, plan_run, refuse_other_plans
from thriftune.planning.words import ask, plan_words, refuse_too_long

__all__ = [
    "RunPlan",
    "ask",
    "cpu_device",
    "list_gpus",
    "own_gpu",
    "plan_run",
    "plan_words",
    "read_market",
    "refuse_other_plans",
    "refuse_too_long",
    "split_count",
    "unknown_gpu",
]
