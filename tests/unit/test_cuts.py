"""The mathematics of a cut: turned factors, what stays, and moments carried through the change of basis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from thriftune.lowrank import lowrank_svd
from thriftune.methods.base import Replacement
from thriftune.methods.cuts import directions_to_keep, energy, turned
from thriftune.recipe import DynamicRecipe, cut_schedule
from thriftune.train.moments import held_bytes, replace_parameters

SHAPES = [(40, 24, 6), (24, 40, 6), (5, 40, 9), (40, 5, 9)]  # out, in, rank; the last two have more rank than a side


def factors(size_out: int, size_in: int, rank: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(size_out + 7 * size_in + 31 * rank)
    return torch.randn(size_out, rank, generator=draw), 3 * torch.randn(rank, size_in, generator=draw)


def cut(b: Tensor, a: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outward, inward = turned(b, a).kept(list(range(kept)))
    return b.double() @ outward, inward @ a.double(), outward, inward


@pytest.mark.parametrize("shape", SHAPES)
def test_all_directions_together_are_the_same_function(shape):
    b, a = factors(*shape)
    new_b, new_a, _, _ = cut(b, a, min(shape))
    torch.testing.assert_close(new_b @ new_a, b.double() @ a.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_are_the_nearest_product_of_that_rank(shape):
    b, a = factors(*shape)
    new_b, new_a, _, _ = cut(b, a, 3)
    found = lowrank_svd(b.double(), a.double())
    nearest = (found.left_OR[:, :3] * found.values_R[:3]) @ found.right_RI[:3]
    torch.testing.assert_close(new_b @ new_a, nearest, rtol=0, atol=1e-9)
    values = turned(b, a).values_K
    torch.testing.assert_close(values, found.values_R, rtol=0, atol=1e-6 * float(values[0]))


@pytest.mark.parametrize("shape", [(40, 24, 8), (24, 40, 8)])
def test_of_factors_that_lack_rank(shape):
    """Columns of B and rows of A that repeat others or are zero: the same values, and what stays is still the
    nearest."""
    b, a = factors(*shape)
    b[:, 5:] = 2 * b[:, :3]
    a[6:] = 0
    dense = b.double() @ a.double()
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    found = turned(b, a).values_K
    assert int((values > 1e-10).sum()) == 5
    torch.testing.assert_close(found, values[:8], rtol=0, atol=1e-6 * float(values[0]))
    for kept in (3, 5, 8):
        new_b, new_a, _, _ = cut(b, a, kept)
        nearest = (left[:, :kept] * values[:kept]) @ right[:kept]
        torch.testing.assert_close(new_b @ new_a, nearest, rtol=0, atol=1e-8 * float(values[0]))
        assert bool(torch.isfinite(new_b).all() and torch.isfinite(new_a).all())


def test_the_turned_a_is_as_large_as_a_was_and_its_rows_are_orthogonal():
    b, a = factors(40, 24, 6)
    _, new_a, _, _ = cut(b, a, 4)
    gram = new_a @ new_a.T
    torch.testing.assert_close(gram, torch.eye(4, dtype=torch.float64) * a.double().norm(dim=1).mean() ** 2)


def test_factors_that_do_nothing_stay_finite():
    b, a = factors(12, 10, 4)
    for one, other in ((torch.zeros_like(b), a), (b, torch.zeros_like(a)), (torch.zeros_like(b), torch.zeros_like(a))):
        new_b, new_a, _, _ = cut(one, other, 2)
        assert bool(torch.isfinite(new_b).all() and torch.isfinite(new_a).all())
        assert float((new_b @ new_a).abs().max()) == 0.0


def test_a_gradient_goes_through_the_maps_exactly():
    b, a = factors(12, 10, 4)
    target = torch.randn(12, 10, generator=torch.Generator().manual_seed(1)).double()
    new_b, new_a, outward, inward = cut(b, a, 4)
    gradients = []
    for one, other in ((b.double(), a.double()), (new_b, new_a)):
        one, other = one.clone().requires_grad_(True), other.clone().requires_grad_(True)
        (one @ other - target).square().sum().backward()
        gradients += [one.grad, other.grad]
    torch.testing.assert_close(gradients[2], gradients[0] @ inward.T)
    torch.testing.assert_close(gradients[3], outward.T @ gradients[1])


# -- what stays -------------------------------------------------------------------------------------------------------


def test_the_budget_goes_where_the_energy_is():
    worth = {"rich": torch.tensor([9.0, 8.0, 7.0, 6.0]), "poor": torch.tensor([5.0, 0.1, 0.1, 0.1])}
    sizes = {"rich": 10, "poor": 10}
    kept = directions_to_keep(worth, sizes, budget=40, block=1, least=0)
    assert {name: len(directions) for name, directions in kept.items()} == {"rich": 4, "poor": 0}
    kept = directions_to_keep(worth, sizes, budget=50, block=1, least=0)
    assert {name: len(directions) for name, directions in kept.items()} == {"rich": 4, "poor": 1}
    kept = directions_to_keep(worth, sizes, budget=40, block=1, least=1)
    assert {name: len(directions) for name, directions in kept.items()} == {"rich": 3, "poor": 1}


def test_energy_is_counted_for_each_parameter():
    """A direction of a module that is ten times as wide must be worth ten times as much."""
    values = torch.tensor([2.0])
    worth = {"wide": energy(values, 100), "narrow": energy(values, 10)}
    kept = directions_to_keep(worth, {"wide": 100, "narrow": 10}, budget=105, block=1, least=0)
    assert kept == {"wide": [], "narrow": [0]}


def test_the_best_stay_in_any_order_and_what_does_not_fit_ends_its_module_only():
    worth = {"a": torch.tensor([1.0, 9.0, 5.0]), "b": torch.tensor([4.0, 3.0])}
    kept = directions_to_keep(worth, {"a": 10, "b": 4}, budget=18, block=1, least=0)
    assert kept == {"a": [1], "b": [0, 1]}


@pytest.mark.parametrize("block", [1, 4, 8])
def test_ranks_are_whole_blocks_and_fill_the_budget(block):
    draw = torch.Generator().manual_seed(3)
    worth = {f"m{number}": torch.rand(32, generator=draw).square().sort(descending=True).values for number in range(20)}
    sizes = {name: 50 + 13 * number for number, name in enumerate(worth)}
    total = 32 * sum(sizes.values())
    for share in (0.9, 0.6, 0.5, 0.2, 0.05):
        budget = int(share * total)
        ranks = {name: len(found) for name, found in directions_to_keep(worth, sizes, budget, block, 0).items()}
        assert all(rank % block == 0 for rank in ranks.values())
        used = sum(rank * sizes[name] for name, rank in ranks.items())
        assert budget - block * max(sizes.values()) < used <= budget


def test_the_schedule_ends_with_what_is_asked_for():
    schedule = cut_schedule(DynamicRecipe(), 1000)
    assert list(schedule) == [100, 233, 367, 500]
    shares = list(schedule.values())
    assert shares[-1] == 0.5 and shares == sorted(shares, reverse=True) and shares[0] < 0.75
    assert cut_schedule(DynamicRecipe(n_cuts=1, first_cut=0.25), 8) == {2: 0.5}
    assert list(cut_schedule(DynamicRecipe(), 1).values()) == [0.5], "the shortest run is cut too, at its end"
    assert cut_schedule(DynamicRecipe(n_cuts=40), 10)[5] == 0.5


# -- the optimizer ----------------------------------------------------------------------------------------------------


def after_steps(optimizer_class, parameters: list[nn.Parameter], steps: int, **options):
    optimizer = optimizer_class(parameters, lr=1e-3, **options)
    draw = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=draw) * 0.1
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def replaced(b: nn.Parameter, a: nn.Parameter, kept: int) -> list[Replacement]:
    new_b, new_a, outward, inward = cut(b.detach(), a.detach(), kept)
    return [
        Replacement(b, nn.Parameter(new_b.float()), right=inward.T),
        Replacement(a, nn.Parameter(new_a.float()), left=outward.T),
    ]


def test_moments_and_step_count_are_carried_and_the_old_ones_let_go():
    b, a = (nn.Parameter(factor) for factor in factors(40, 24, 6))
    other = nn.Parameter(torch.ones(3, 3))
    optimizer = after_steps(torch.optim.AdamW, [b, other, a], 3)
    old_b, old_a = dict(optimizer.state[b]), dict(optimizer.state[a])
    bytes_before = held_bytes([b, other, a], optimizer)
    replacements = replaced(b, a, 3)
    replace_parameters(optimizer, replacements)
    new_b, new_a = replacements[0].new, replacements[1].new
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(new_b), id(other), id(new_a)]
    assert set(map(id, optimizer.state)) == {id(new_b), id(other), id(new_a)}
    right, left = replacements[0].right.float(), replacements[1].left.float()
    for new, carried_m, carried_v in (
        (new_b, old_b["exp_avg"] @ right, old_b["exp_avg_sq"] @ right.square()),
        (new_a, left @ old_a["exp_avg"], left.square() @ old_a["exp_avg_sq"]),
    ):
        state = optimizer.state[new]
        torch.testing.assert_close(state["exp_avg"], carried_m)
        torch.testing.assert_close(state["exp_avg_sq"], carried_v)
        assert float(state["step"]) == 3 and state["exp_avg"].shape == new.shape
    adapter = 16 * (40 + 24)
    assert bytes_before - held_bytes([new_b, other, new_a], optimizer) == 3 * adapter


def test_a_parameter_that_leaves_is_forgotten():
    b, a = (nn.Parameter(factor) for factor in factors(40, 24, 6))
    optimizer = after_steps(torch.optim.AdamW, [b, a], 2)
    replace_parameters(optimizer, [Replacement(b, None)])
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(a)] and list(map(id, optimizer.state)) == [id(a)]


@pytest.mark.parametrize(("kind", "unlike"), [("AdamW8bit", 0.02), ("AdamW", 1e-6)])
def test_states_of_bitsandbytes_are_carried_as_torchs_are(kind, unlike):
    """8-bit ones within what 8 bits can say; the optimizer goes on with them."""
    from bitsandbytes import optim

    b, a = (nn.Parameter(factor) for factor in factors(400, 320, 16))
    twins = [nn.Parameter(b.detach().clone()), nn.Parameter(a.detach().clone())]
    plain = after_steps(torch.optim.AdamW, twins, 3)
    eight = after_steps(getattr(optim, kind), [b, a], 3)
    for optimizer, pair in ((plain, twins), (eight, [b, a])):
        replace_parameters(optimizer, replaced(*pair, 8))
    for new, twin in zip(eight.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        state, wanted = eight.state[new], plain.state[twin]
        assert state["state1"].dtype == (torch.uint8 if kind == "AdamW8bit" else torch.float32)
        assert state["state1"].shape == state["state2"].shape == new.shape and state["step"] == 3
        found = dequantised(state)
        for moment, name in zip(found, ("exp_avg", "exp_avg_sq"), strict=True):
            assert float((moment - wanted[name]).norm() / wanted[name].norm()) < unlike
        new.grad = torch.full_like(new, 0.1)
        before = new.detach().clone()
        eight.step()
        assert not torch.equal(before, new)


def dequantised(state) -> list[Tensor]:
    from bitsandbytes.functional import dequantize_blockwise

    if state["state1"].dtype != torch.uint8:
        return [state["state1"], state["state2"]]
    return [
        dequantize_blockwise(state[f"state{n}"], absmax=state[f"absmax{n}"], code=state[f"qmap{n}"], blocksize=256)
        for n in (1, 2)
    ]
