"""The engine's dropout masks in the place of PEFT's own, so that autograd meets the same ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from thriftune.engine.takes import LINEARS
from thriftune.kernels.dropout import Draw, Key, kept_reference, threshold_and_factor


class Masked(nn.Module):
    """In the place of one linear's nn.Dropout, for one example at a time."""

    def __init__(self, linear: int, rate: float, now: dict[str, Any]) -> None:
        super().__init__()
        self.linear, self.rate, self.now = linear, rate, now

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        draw = Draw(self.now["key"], torch.full_like(positions, self.now["row"]), positions)
        kept = kept_reference(draw, self.linear, self.rate, x.shape[2])
        return x * kept.to(x.dtype) * threshold_and_factor(self.rate)[1]


def with_masks(model: Any, key: Key) -> dict[str, Any]:
    """Replace every adapter's dropout. What is returned says which example is at hand: set its `row`."""
    now: dict[str, Any] = {"key": key, "row": 0}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_dropout"):
            _, _, layer, _, linear = name.split(".")
            before = module.lora_dropout["default"]
            assert isinstance(before, nn.Dropout)
            module.lora_dropout["default"] = Masked(int(layer) * len(LINEARS) + LINEARS.index(linear), before.p, now)
    return now
