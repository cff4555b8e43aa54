"""Streamed layers used on a CUDA device: the answers of the same model with all layers resident, copies delayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from adapter_runs import IDS_BT, distance, make_run
from small_models import make_model
from thriftune.engine.lanes import CudaLane
from thriftune.infer.generate import generate
from thriftune.infer.merge import probe_logits
from thriftune.merging import merge
from thriftune.opening import open_for_use
from thriftune.recipe import GenerationRecipe
from thriftune.target import OpenedTarget, find_target, open_target

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda", 0)
LAYERS = 6
PROMPTS = [[5, 80, 99], [104, 81, 7, 33, 12, 9, 9], [200], [3, 2, 60, 61, 0, 7]]


class SlowLane(CudaLane):
    """Its copies begin late, over rubbish."""

    def send(self, source: Tensor, place: Tensor, free: Any) -> Any:
        if free is not None:
            self.stream.wait_event(free)
        with torch.cuda.stream(self.stream):
            place.fill_(0xFF)
            torch.cuda._sleep(20_000_000)
        return super().send(source, place, None)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS}
    base = make_model(tmp_path / "base", "llama", dtype=torch.bfloat16, **sizes)
    return make_run(tmp_path / "run", base, "qlora", size=0.02)


def streamed(run: Path, resident: int) -> OpenedTarget:
    target = find_target(str(run))
    recipe = target.recipe.replace(offload={"resident_layers": resident})
    return open_for_use(target, recipe, GPU, alone=False, say=print)


def answers(found: OpenedTarget) -> list[list[int]]:
    settings = GenerationRecipe(max_new_tokens=24, batch_size=4)
    return generate(found.model, PROMPTS, settings, [0], 1, seed=3, on_progress=lambda _: None)


def test_logits_and_answers_are_those_with_all_layers_resident(run) -> None:
    """The same kernels on the same numbers, wherever a layer's bytes came from: bit for bit."""
    resident = streamed(run, LAYERS)
    wanted_logits, wanted = probe_logits(resident.model, IDS_BT.tolist()), answers(resident)
    for count in (0, 2):
        found = streamed(run, count)
        streaming = found.rows_at_once.__self__.streaming  # type: ignore[union-attr]
        assert len(streaming.resident) == count and len(streaming.streamed) == LAYERS - count
        for _ in range(2):
            assert torch.equal(probe_logits(found.model, IDS_BT.tolist()), wanted_logits)
            assert answers(found) == wanted
            streaming.lane.times()
            streaming.lane = SlowLane(GPU)
    assert found.rows_at_once is not None and found.rows_at_once(256) > 1


def in_float32(model: nn.Module) -> nn.Module:
    """The same model, its 4-bit weights unpacked: changed in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear4bit):
                linear = nn.Linear(child.in_features, child.out_features, bias=False, device=GPU)
                linear.weight.data = dequantize_4bit(child.weight.data, child.weight.quant_state).float()
                setattr(module, name, linear)
    return model.float()


def test_they_are_near_those_of_the_whole_model(run) -> None:
    """Which multiplies with another kernel: both round to 16 bits, at different places."""
    whole = open_target(find_target(str(run)), GPU)
    ours, theirs = (probe_logits(one.model, IDS_BT.tolist()) for one in (streamed(run, 2), whole))
    with whole.model.disable_adapter():
        effect = distance(probe_logits(whole.model, IDS_BT.tolist()), theirs)
    exact = probe_logits(in_float32(whole.model), IDS_BT.tolist())
    assert distance(ours, exact) < min(1.5 * distance(theirs, exact), effect / 3)


def test_a_merge_of_files_is_the_tuned_model(run, tmp_path) -> None:
    result = merge(str(run), tmp_path / "merged", GPU)
    assert result["loaded_whole"] is None and result["difference"] < result["effect"] / 3
    assert result["kept"] == pytest.approx(1, abs=0.05)
