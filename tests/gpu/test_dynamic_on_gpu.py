"""Cuts on a CUDA device: 8-bit and paged moments, the allocator's bytes, the engine after a cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from thriftune.methods.base import Replacement
from thriftune.methods.cuts import turned
from thriftune.train.moments import replace_parameters
from tiny import losses_of, record_of, tiny_model, tiny_recipe, tiny_rows, train_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def stepped(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> None:
    draw = torch.Generator("cuda").manual_seed(5)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = 0.1 * torch.randn(parameter.shape, generator=draw, device="cuda")
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def pair() -> list[nn.Parameter]:
    """Large enough to be paged after a cut to half as well."""
    draw = torch.Generator("cuda").manual_seed(1)
    sizes = ((4096, 64), (64, 4096))
    return [nn.Parameter(torch.randn(size, generator=draw, device="cuda")) for size in sizes]


def plain(state: dict[str, Tensor]) -> list[Tensor]:
    from bitsandbytes.functional import dequantize_blockwise

    stored = [state[name].to("cuda") for name in ("state1", "state2")]
    if stored[0].dtype != torch.uint8:
        return stored
    return [
        dequantize_blockwise(moment, absmax=state[f"absmax{n}"], code=state[f"qmap{n}"], blocksize=256)
        for n, moment in enumerate(stored, start=1)
    ]


@pytest.mark.parametrize(
    ("kind", "unlike"),
    [("AdamW8bit", 0.02), ("PagedAdamW8bit", 0.02), ("PagedAdamW32bit", 1e-5), ("AdamW", 1e-5)],
)
def test_moments_of_every_optimizer_are_carried_and_go_on(kind: str, unlike: float) -> None:
    from bitsandbytes import optim

    found, wanted = pair(), pair()
    optimizers = [getattr(optim, kind)(found, lr=1e-3), torch.optim.AdamW(wanted, lr=1e-3, fused=True)]
    for optimizer, (b, a) in zip(optimizers, (found, wanted), strict=True):
        stepped(optimizer, [b, a], 3)
        outward, inward = turned(b.detach(), a.detach()).kept(list(range(32)))
        new_b = nn.Parameter((b.detach().double() @ outward).float())
        new_a = nn.Parameter((inward @ a.detach().double()).float())
        replace_parameters(optimizer, [Replacement(b, new_b, right=inward.T), Replacement(a, new_a, left=outward.T)])
    ours, torchs = optimizers
    news = list(zip(ours.param_groups[0]["params"], torchs.param_groups[0]["params"], strict=True))
    for new, twin in news:
        state = ours.state[new]
        assert getattr(state["state1"], "is_paged", False) == kind.startswith("Paged")
        for moment, name in zip(plain(state), ("exp_avg", "exp_avg_sq"), strict=True):
            carried = torchs.state[twin][name]
            assert float((moment - carried).norm() / carried.norm()) < unlike
    before = [new.detach().clone() for new, _ in news]
    stepped(ours, [new for new, _ in news], 2)
    stepped(torchs, [twin for _, twin in news], 2)
    for (new, twin), old in zip(news, before, strict=True):
        moved = (twin - old).norm()
        assert float(moved) > 0 and float((new - twin).norm()) < 0.2 * float(moved)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_a_run_goes_on_after_its_cuts_and_holds_less(tmp_path: Path, optim: str) -> None:
    model = tiny_model(tmp_path / "model", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512)
    rows = tiny_rows(tmp_path / "rows.jsonl", 60)
    changes = {
        "method": "dynamic",
        "dynamic": {"r_start": 64, "round_to": 8, "first_cut": 0.2, "last_cut": 0.5, "n_cuts": 2, "keep": 0.4},
        "train": {"max_steps": 20, "optim": optim, "learning_rate": 3e-3},
    }
    for engine in ("auto", "off"):
        train_tiny(tiny_recipe(model, rows, tmp_path / engine, engine=engine, **changes))
    ours, generic = record_of(tmp_path / "auto"), record_of(tmp_path / "off")
    assert (ours.path, generic.path) == ("engine", "generic")
    losses = losses_of(tmp_path / "auto")
    assert losses[-1] < losses[0] - 0.5
    assert losses == pytest.approx(losses_of(tmp_path / "off"), abs=0.1)
    for cut in (*ours.cuts, *generic.cuts):
        assert cut.parameters_after < cut.parameters_before and cut.held_bytes_after < cut.held_bytes_before
        assert cut.allocated_bytes_before is not None and cut.allocated_bytes_after is not None
        assert cut.allocated_bytes_after < cut.allocated_bytes_before
