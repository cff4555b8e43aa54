"""The order of steps, how rows are shared out among processes, and the padded tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thriftune.data import Example, StepOrder, micro_batches, shared_out


def order(num_examples: int = 10, examples_per_step: int = 4, **options: object) -> StepOrder:
    settings = {"num_train_epochs": 2.0, "max_steps": -1, "seed": 3, "shuffle": True}
    return StepOrder(num_examples, examples_per_step, **{**settings, **options})


def example(*tokens: int, trained_from: int = 1) -> Example:
    trained = np.arange(len(tokens)) >= trained_from
    return Example(np.array(tokens, np.int32), trained)


def test_without_shuffling_by_hand() -> None:
    steps = order(shuffle=False)
    assert (steps.steps, steps.steps_per_epoch) == (6, 3)
    assert [steps.indices(step) for step in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]
    assert [steps.epoch(step) for step in range(5)] == [0.0, 0.4, 0.8, 1.0, 1.4]


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (0.5, 2), (0.01, 1), (2.4, 8), (1 / 3, 1), (2 / 3, 2)])
def test_fractions_of_epochs(epochs: float, steps: int) -> None:
    assert order(num_train_epochs=epochs).steps == steps


def test_max_steps_decides() -> None:
    assert order(max_steps=2).steps == 2
    assert order(max_steps=100, num_train_epochs=1.0).steps == 100
    assert sorted(order(max_steps=100).indices(99)) == sorted(set(order(max_steps=100).indices(99)))


@given(num_examples=st.integers(1, 60), at_once=st.integers(1, 20), seed=st.integers(0, 2**31), shuffle=st.booleans())
def test_every_epoch_sees_every_example_once(num_examples: int, at_once: int, seed: int, shuffle: bool) -> None:
    steps = order(num_examples, at_once, num_train_epochs=3.0, seed=seed, shuffle=shuffle)
    for epoch in range(3):
        first = epoch * steps.steps_per_epoch
        seen = [index for step in range(first, first + steps.steps_per_epoch) for index in steps.indices(step)]
        assert sorted(seen) == list(range(num_examples))
        assert steps.epoch(first) == epoch
    assert steps.epoch(steps.steps) == 3.0


def test_a_step_is_known_by_its_number_alone() -> None:
    forward = [order(100, 7).indices(step) for step in range(order(100, 7).steps)]
    backward = [order(100, 7).indices(step) for step in reversed(range(order(100, 7).steps))]
    assert forward == backward[::-1]
    assert forward[0] != order(100, 7, seed=4).indices(0)
    assert forward[0] != forward[order(100, 7).steps_per_epoch]  # another order in the next epoch
    permutation = torch.randperm(100, generator=torch.Generator().manual_seed(3)).tolist()
    assert forward[0] == permutation[:7]


def test_steps_outside_are_refused() -> None:
    for step in (-1, 6):
        with pytest.raises(IndexError):
            order().indices(step)
    with pytest.raises(ValueError, match="needs examples"):
        order(0)


@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=40), world=st.integers(1, 8), data=st.data())
def test_shares_are_a_partition_and_balanced(lengths: list[int], world: int, data: st.DataObject) -> None:
    indices = data.draw(st.permutations(range(len(lengths))))
    shares = [shared_out(indices, lengths, rank, world) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == sorted(indices)
    for share in shares:
        assert share == [index for index in indices if index in share]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if len(lengths) % world == 0:
        tokens = [sum(lengths[index] for index in share) for share in shares]
        assert max(tokens) - min(tokens) <= max(lengths)


def test_shares_by_hand() -> None:
    lengths = [10, 1, 9, 2]
    assert shared_out([0, 1, 2, 3], lengths, 0, 2) == [0, 1]
    assert shared_out([0, 1, 2, 3], lengths, 1, 2) == [2, 3]
    assert shared_out([3, 1], lengths, 0, 1) == [3, 1]
    assert shared_out([2], lengths, 1, 2) == []


def test_batches_by_hand() -> None:
    batches = micro_batches([example(5, 6), example(7, 8, 9, 10, trained_from=2), example(4, trained_from=0)], 2)
    assert [batch.tokens_BT.shape for batch in batches] == [(2, 4), (1, 1)]
    first = batches[0]
    assert first.tokens_BT.tolist() == [[7, 8, 9, 10], [5, 6, 0, 0]]
    assert first.labels_BT.tolist() == [[-100, -100, 9, 10], [-100, 6, -100, -100]]
    assert first.mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert (first.num_tokens, first.num_targets) == (6, 3)
    # A row of one token has nothing before it, so nothing is predicted.
    assert (batches[1].num_tokens, batches[1].num_targets) == (1, 0)
    assert batches[1].labels_BT.tolist() == [[4]]
    assert all(part.dtype == torch.int64 for part in (first.tokens_BT, first.labels_BT, first.mask_BT))
    moved = first.to("meta")
    assert (moved.tokens_BT.device.type, moved.num_targets) == ("meta", 3)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), rows_at_once=st.integers(1, 6))
def test_batches_lose_nothing(lengths: list[int], rows_at_once: int) -> None:
    examples = [example(*range(10, 10 + length)) for length in lengths]
    batches = micro_batches(examples, rows_at_once)
    assert sum(batch.num_tokens for batch in batches) == sum(lengths)
    assert sum(batch.num_targets for batch in batches) == sum(length - 1 for length in lengths)
    widths = [batch.tokens_BT.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert max(widths) == max(lengths)
    for batch in batches:
        assert batch.mask_BT.sum(1).tolist() == sorted(batch.mask_BT.sum(1).tolist(), reverse=True)
        assert ((batch.labels_BT == batch.tokens_BT) | (batch.labels_BT == -100)).all()
