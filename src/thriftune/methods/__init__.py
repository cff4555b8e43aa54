"""Ways to adapt a model, in one explicit table."""

from thriftune.methods.base import Method, trainable_parameters
from thriftune.methods.dynamic_rank import DynamicRankMethod
from thriftune.methods.full import FullMethod
from thriftune.methods.lora import LoraMethod, load_adapter_weights

METHODS: dict[str, Method] = {
    "lora": LoraMethod(name="lora", four_bit=False),
    "qlora": LoraMethod(name="qlora", four_bit=True),
    "dynamic": DynamicRankMethod(),
    "full": FullMethod(),
}

__all__ = ["METHODS", "Method", "load_adapter_weights", "trainable_parameters"]
