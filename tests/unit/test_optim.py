"""The learning rate of every step against transformers' own schedules; the optimizer, and its state on disk."""

from __future__ import annotations

import json
import math
from typing import get_args

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from thriftune.errors import CheckpointError, InputError
from thriftune.recipe import Recipe, TrainRecipe
from thriftune.train.optim import (
    LAYOUT_FILE,
    STATE_FILE,
    LearningRate,
    build_optimizer,
    load_optimizer,
    save_optimizer,
    set_learning_rate,
)

KINDS = get_args(TrainRecipe.model_fields["lr_scheduler_type"].annotation)
CPU = torch.device("cpu")


def settings(**changes) -> TrainRecipe:
    return TrainRecipe(**{"warmup_ratio": 0.0, **changes})


def rates(num_steps: int, peak: float, **changes) -> list[float]:
    schedule = LearningRate(settings(**changes), peak, num_steps)
    return [schedule.at(step) for step in range(num_steps)]


def transformers_rates(kind: str, num_steps: int, peak: float, warmup: int = 0) -> list[float]:
    """What each step of a loop trains with that steps the optimizer first and the schedule after it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("num_steps", [1, 2, 33])
@pytest.mark.parametrize("peak", [3e-4, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_without_warmup_every_schedule_is_that_of_transformers(kind, peak, num_steps):
    assert rates(num_steps, peak, lr_scheduler_type=kind) == transformers_rates(kind, num_steps, peak)


@pytest.mark.parametrize("warmup", [1, 4, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_warmup_starts_above_zero_and_ends_at_the_peak(kind, warmup):
    found = rates(20, 2e-4, lr_scheduler_type=kind, warmup_steps=warmup)
    assert found[:warmup] == pytest.approx([2e-4 * (step + 1) / warmup for step in range(warmup)], rel=1e-12)
    assert found[warmup - 1] == max(found) == 2e-4
    if kind != "constant":  # in transformers it has no warm-up at all
        assert found[warmup:] == transformers_rates(kind, 20, 2e-4, warmup)[warmup:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_warmup_as_long_as_the_run_ends_at_the_peak(kind, num_steps):
    """One step with the default warm-up of 3 % is such a run: its only step must not train with nothing."""
    for changes in ({"warmup_ratio": 1.0}, {"warmup_steps": 50}, {"warmup_ratio": 0.03} if num_steps == 1 else {}):
        found = rates(num_steps, 1e-3, lr_scheduler_type=kind, **changes)
        assert all(rate > 0 for rate in found[:1]) and max(found) == pytest.approx(1e-3, rel=1e-12)


def test_the_share_of_warmup_is_rounded_up_and_steps_win_over_it():
    assert LearningRate(settings(warmup_ratio=0.03), 1.0, 34).warmup_steps == 2
    assert LearningRate(settings(warmup_ratio=0.03, warmup_steps=5), 1.0, 34).warmup_steps == 5
    assert LearningRate(settings(warmup_ratio=0.03, lr_scheduler_type="constant"), 1.0, 34).warmup_steps == 0
    assert LearningRate(settings(warmup_steps=5, lr_scheduler_type="constant"), 1.0, 34).warmup_steps == 5


def test_a_peak_below_the_polynomials_end_is_refused_in_our_words():
    with pytest.raises(InputError, match="polynomial, which ends at 1e-07"):
        LearningRate(settings(lr_scheduler_type="polynomial"), 1e-7, 10)


# -- the optimizer ----------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.norm(self.inner(x)))


def recipe(method: str = "lora", **train) -> Recipe:
    return Recipe.build({"method": method, "train": {"learning_rate": 0.1, **train}}, source="the test's recipe")


def trained(steps: int = 3, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None):
    torch.manual_seed(0)
    model = model or Small()
    optimizer = optimizer or build_optimizer(model, recipe(weight_decay=0.1), CPU)[0]
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_it_is_adamw_with_the_recipes_numbers_and_decays_matrices_only():
    model = Small()
    train = {"weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    optimizer, name, remark = build_optimizer(model, recipe(**train), CPU)
    assert isinstance(optimizer, torch.optim.AdamW) and (name, remark) == ("adamw_torch", "")
    decayed, plain = optimizer.param_groups
    assert [decayed["weight_decay"], plain["weight_decay"]] == [0.3, 0.0]
    assert [id(p) for p in decayed["params"]] == [id(model.inner.weight)]
    assert {id(p) for p in plain["params"]} == {id(model.inner.bias), id(model.norm.weight), id(model.norm.bias)}
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.95), 1e-6, 0.1)


def test_a_group_without_parameters_is_left_out():
    model = nn.Linear(3, 4, bias=False)
    optimizer, _, _ = build_optimizer(model, recipe(), CPU)
    assert len(optimizer.param_groups) == 1


def test_qlora_on_a_cpu_says_that_it_takes_plain_adamw():
    _, name, remark = build_optimizer(Small(), recipe("qlora"), CPU)
    assert name == "adamw_torch"
    assert "plain AdamW" in remark and "GPU" in remark
    assert build_optimizer(Small(), recipe("qlora", optim="adamw_torch"), CPU)[2] == ""


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_for_gpus_are_refused_on_a_cpu(optim):
    with pytest.raises(InputError, match=f"train.optim={optim} on cpu") as caught:
        build_optimizer(Small(), recipe(optim=optim), CPU)
    assert "auto" in caught.value.do


def test_the_rate_is_set_for_every_group():
    _, optimizer = trained(0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_a_saved_state_goes_on_bit_for_bit_and_is_no_pickle(tmp_path):
    whole, _ = trained(6)
    half, optimizer = trained(3)
    save_optimizer(optimizer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([STATE_FILE, LAYOUT_FILE])
    fresh, _, _ = build_optimizer(half, recipe(weight_decay=0.1), CPU)
    load_optimizer(fresh, tmp_path)
    for step in range(3, 6):
        torch.manual_seed(step)
        half(torch.randn(5, 3)).square().mean().backward()
        fresh.step()
        fresh.zero_grad()
    for one, two in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_state_lies_as_one_that_was_never_saved(tmp_path):
    """A file's tensors lie at multiples of 8 bytes, and products of MKL round by where their numbers lie."""
    save_optimizer(trained(3)[1], tmp_path)
    optimizer = trained(0)[1]
    load_optimizer(optimizer, tmp_path)
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    assert states and all(value.data_ptr() % 64 == 0 for value in states)


def test_numbers_among_the_state_are_kept_too(tmp_path):
    """bitsandbytes keeps its step count as a number where torch keeps a tensor."""
    _, optimizer = trained(2)
    for state in optimizer.state.values():
        state["count"] = 2
    save_optimizer(optimizer, tmp_path)
    _, other = trained(0)
    load_optimizer(other, tmp_path)
    assert [state["count"] for state in other.state.values()] == [2, 2, 2, 2]
    assert {state["step"].item() for state in other.state.values()} == {2.0}


def test_a_state_before_the_first_step_is_empty_and_loads(tmp_path):
    _, optimizer = trained(0)
    save_optimizer(optimizer, tmp_path)
    load_optimizer(trained(0)[1], tmp_path)
    assert json.loads((tmp_path / LAYOUT_FILE).read_text())["numbers"] == {}


def test_a_state_of_other_parameters_or_a_damaged_one_is_refused(tmp_path):
    _, optimizer = trained(1)
    save_optimizer(optimizer, tmp_path)
    other, _, _ = build_optimizer(nn.Linear(3, 4), recipe(), CPU)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        load_optimizer(other, tmp_path)
    for name, content in ((LAYOUT_FILE, b"{"), (STATE_FILE, b"\x08\x00"), (LAYOUT_FILE, b"{}")):
        save_optimizer(optimizer, tmp_path)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="does not fit this run"):
            load_optimizer(trained(0)[1], tmp_path)
    (tmp_path / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match="does not fit this run"):
        load_optimizer(trained(0)[1], tmp_path)


def test_the_rate_never_is_not_a_number():
    for kind in KINDS:
        assert all(math.isfinite(rate) for rate in rates(7, 1e-2, lr_scheduler_type=kind, warmup_steps=3))


def test_states_of_bitsandbytes_are_saved_and_go_on(tmp_path):
    """From 0.50 on its state_dict has quantised tensors in a mapping of their own."""
    from bitsandbytes.optim import AdamW8bit

    def stepped(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            torch.manual_seed(step)
            parameter.grad = torch.randn(parameter.shape)
            optimizer.step()

    whole, half = (nn.Parameter(torch.ones(64, 80)) for _ in range(2))
    stepped(whole, AdamW8bit([whole], lr=1e-2), 0, 5)
    optimizer = AdamW8bit([half], lr=1e-2)
    stepped(half, optimizer, 0, 3)
    save_optimizer(optimizer, tmp_path)
    fresh = AdamW8bit([half], lr=1e-2)
    load_optimizer(fresh, tmp_path)
    assert fresh.state[half]["state1"].dtype == torch.uint8 and fresh.state[half]["step"] == 3
    stepped(half, fresh, 3, 5)
    assert torch.equal(whole, half)
