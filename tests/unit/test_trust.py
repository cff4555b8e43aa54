"""An attention kernel that gives other gradients than the judge is found out, and said."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from test_engine_gradients import build

from thriftune.engine.attention import ReferenceAttention
from thriftune.engine.read import read_program
from thriftune.engine.trust import why_not_trusted

CPU = torch.device("cpu")


class Wrong(ReferenceAttention):
    """Right but for one of the results."""

    name = "wrong"

    def __init__(self, which: int) -> None:
        self.which = which

    def forward(self, q: Any, k: Any, v: Any, segments: Any, kind: Any, out: Any) -> Any:
        kept = super().forward(q, k, v, segments, kind, out)
        if self.which == 0:
            out[-1] += 1.0
        return kept

    def backward(self, *arguments: Any) -> None:
        super().backward(*arguments)
        if self.which > 0:
            arguments[-1][self.which - 1].mul_(1.05)


class Refusing(ReferenceAttention):
    name = "refusing"

    def forward(self, *arguments: Any) -> Any:
        raise RuntimeError("no plan for this layout\nand more")


@pytest.mark.parametrize("family", ["llama", "qwen3, window"])
def test_a_right_kernel_is_trusted_and_a_wrong_one_named(family: str) -> None:
    layers = read_program(build(family, torch.float32), 64, 8, fp8=False).layers
    assert why_not_trusted(ReferenceAttention(), layers, CPU) is None
    for which, name in enumerate(("the result", "dq", "dk", "dv")):
        remark = why_not_trusted(Wrong(which), layers, CPU)
        assert remark is not None and remark.startswith("wrong is") and f"off in {name}" in remark
    assert why_not_trusted(Refusing(), layers, CPU) == "refusing refuses this layout: no plan for this layout"
