"""What models are made of, computed from their config.json: sizes, parameters, adapters. No weights, no torch."""

from thriftune.shapes.adapters import Adapted, adapted_linears, lora_parameters, saved_parameters
from thriftune.shapes.families import FAMILIES, from_config
from thriftune.shapes.shape import Attention, AttentionKind, Layer, Linear, ModelShape

__all__ = [
    "FAMILIES",
    "Adapted",
    "Attention",
    "AttentionKind",
    "Layer",
    "Linear",
    "ModelShape",
    "adapted_linears",
    "from_config",
    "lora_parameters",
    "saved_parameters",
]
