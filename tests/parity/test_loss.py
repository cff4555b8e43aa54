"""The summed cross-entropy against torch's own, and the batch's loss against one row at a time with all logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM

from thriftune.data import Batch, Example, micro_batches
from thriftune.train import loss as loss_module
from thriftune.train.loss import IGNORE, ROWS_AT_ONCE, SumCrossEntropy, accepts_logits_to_keep, loss_sum
from tiny import tiny_model

# Relative. bfloat16 keeps 8 bits: one rounding changes a number by up to 2**-8, and the gradient is rounded twice, when
# it is stored and when it is scaled.
LOSS_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-7}
SHAPES = [(1, 1), (1, 7), (5, 2), (3, 331), (ROWS_AT_ONCE, 5), (ROWS_AT_ONCE + 1, 5), (2 * ROWS_AT_ONCE + 77, 19)]
FACTOR = 1 / 37  # what the loop multiplies the sum with: not a number that bfloat16 holds


def reference(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the gradient of FACTOR times it, by torch in float64."""
    logits_NV = logits_NV.detach().double().requires_grad_()
    loss = functional.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")
    (gradient_NV,) = torch.autograd.grad(loss * FACTOR, logits_NV)
    return loss.detach(), gradient_NV


def ours(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits_NV = logits_NV.detach().requires_grad_()
    loss = SumCrossEntropy.apply(logits_NV, targets_N)
    (gradient_NV,) = torch.autograd.grad(loss * FACTOR, logits_NV)
    return loss.detach(), gradient_NV


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_are_those_of_torch(seeded, shape, dtype):
    logits_NV = (4 * torch.randn(shape)).to(dtype)
    targets_N = torch.randint(shape[1], (shape[0],))
    targets_N[torch.rand(shape[0]) < 0.3] = IGNORE
    targets_N[0] = shape[1] - 1
    loss, gradient_NV = ours(logits_NV, targets_N)
    expected_loss, expected_gradient_NV = reference(logits_NV, targets_N)
    assert loss.dtype == torch.float64
    assert gradient_NV.dtype == dtype
    scale = max(1.0, float(expected_loss))
    assert abs(float(loss - expected_loss)) <= LOSS_TOLERANCE[dtype] * scale
    rtol, atol = GRADIENT_TOLERANCE[dtype], LOSS_TOLERANCE[dtype] * FACTOR  # softmax - 1 cancels near 0
    torch.testing.assert_close(gradient_NV.double(), expected_gradient_NV, rtol=rtol, atol=atol)


def test_all_positions_ignored_gives_zero_and_no_gradient():
    loss, gradient_NV = ours(torch.randn(9, 5), torch.full((9,), IGNORE))
    assert float(loss) == 0.0
    assert not gradient_NV.any()


def test_no_positions_at_all_give_zero():
    loss, gradient_NV = ours(torch.randn(0, 5), torch.zeros(0, dtype=torch.long))
    assert float(loss) == 0.0
    assert gradient_NV.shape == (0, 5)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_stands_at_ignored_positions_does_not_matter(seeded, value):
    logits_NV, targets_N = torch.randn(6, 11), torch.randint(11, (6,))
    targets_N[[1, 4]] = IGNORE
    loss, gradient_NV = ours(logits_NV, targets_N)
    spoilt_NV = logits_NV.clone()
    spoilt_NV[1], spoilt_NV[4, 3] = value, value
    spoilt_loss, spoilt_gradient_NV = ours(spoilt_NV, targets_N)
    assert torch.equal(loss, spoilt_loss)
    assert torch.equal(gradient_NV, spoilt_gradient_NV)


def test_a_vocabulary_entry_that_is_ruled_out_has_no_gradient(seeded):
    logits_NV, targets_N = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    logits_NV[:, 5] = -math.inf
    loss, gradient_NV = ours(logits_NV, targets_N)
    expected_loss, expected_gradient_NV = reference(logits_NV, targets_N)
    assert abs(float(loss - expected_loss)) < 1e-6
    torch.testing.assert_close(gradient_NV.double(), expected_gradient_NV, rtol=1e-6, atol=1e-8)
    assert not gradient_NV[:, 5].any()


def test_an_impossible_target_costs_infinity_and_is_not_hidden():
    logits_NV = torch.zeros(2, 3)
    logits_NV[1, 2] = -math.inf
    assert float(SumCrossEntropy.apply(logits_NV, torch.tensor([0, 2]))) == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_logits_are_left_as_they_were(seeded, dtype):
    logits_NV = torch.randn(5, 7).to(dtype)
    before_NV = logits_NV.clone()
    SumCrossEntropy.apply(logits_NV.requires_grad_(), torch.tensor([1, IGNORE, 3, 0, 6])).backward()
    assert torch.equal(logits_NV, before_NV)


def test_nothing_is_kept_for_a_backward_pass_that_will_not_come():
    logits_NV = torch.randn(5, 7)
    total = SumCrossEntropy.apply(logits_NV, torch.zeros(5, dtype=torch.long))
    assert total.grad_fn is None
    with torch.no_grad():
        assert SumCrossEntropy.apply(logits_NV.requires_grad_(), torch.zeros(5, dtype=torch.long)).grad_fn is None


def test_a_second_backward_pass_is_refused_and_not_wrong():
    logits_NV = torch.randn(5, 7, requires_grad=True)
    total = SumCrossEntropy.apply(logits_NV, torch.zeros(5, dtype=torch.long)) * 0.5
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_the_factor_is_not_rounded_to_the_logits_type():
    """Four equal logits: the gradient before the factor, 1/4 - 1, is exact in bfloat16: one rounding is left."""
    targets = torch.arange(3, 200)
    found = []
    for count in targets.tolist():
        logits_NV = torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)
        (SumCrossEntropy.apply(logits_NV, torch.tensor([2])) / count).backward()
        found.append(logits_NV.grad[0, 2])
    assert torch.equal(torch.stack(found), (-0.75 / targets.double()).bfloat16())
    rounded_first = -0.75 * (1 / targets.double()).bfloat16()
    assert not torch.equal(torch.stack(found), rounded_first), "the test needs factors that bfloat16 rounds"


@settings(max_examples=40)
@given(rows=st.integers(1, 40), at_once=st.integers(1, 41), seed=st.integers(0, 1000), by_elements=st.booleans())
def test_chunks_change_nothing(rows, at_once, seed, by_elements):
    """Whether their size comes from the number of positions or, with a large vocabulary, from that of logits."""
    draw = torch.Generator().manual_seed(seed)
    logits_NV, targets_N = torch.randn(rows, 6, generator=draw), torch.randint(-1, 6, (rows,), generator=draw)
    targets_N[targets_N < 0] = IGNORE
    found = []
    limits = [{}, {"CHUNK_ELEMENTS": at_once * 6 + 5} if by_elements else {"ROWS_AT_ONCE": at_once}]
    for limit in limits:
        with pytest.MonkeyPatch.context() as patched:
            for name, value in limit.items():
                patched.setattr(loss_module, name, value)
            leaf_NV = logits_NV.clone().requires_grad_()
            total = SumCrossEntropy.apply(leaf_NV, targets_N)
            total.backward()
        found.append((total.item(), leaf_NV.grad))
    assert abs(found[0][0] - found[1][0]) < 1e-12 * max(1.0, found[0][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path_factory.mktemp("tiny") / "model")).train()


def examples_with_gaps(count: int = 7) -> list[Example]:
    """Rows of 3 to 20 tokens, trained in one or two stretches, so that positions without a target lie in between."""
    draw = np.random.default_rng(3)
    found = []
    for row in range(count):
        tokens = draw.integers(3, 300, size=int(draw.integers(3, 21))).astype(np.int32)
        trained = draw.random(len(tokens)) < 0.4
        trained[-1] = True
        found.append(Example(tokens, trained, row))
    return found


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def one_row_at_a_time(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """The definition: no padding, all logits, torch's cross-entropy; the token at t is predicted from those before."""
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        tokens_T = torch.from_numpy(example.tokens).long()
        targets_T = tokens_T.where(torch.from_numpy(example.trained), IGNORE)
        logits_TV = model(input_ids=tokens_T[None]).logits[0]
        total = total + functional.cross_entropy(
            logits_TV[:-1].double(), targets_T[1:], ignore_index=IGNORE, reduction="sum"
        )
    return total


def test_a_batchs_loss_is_that_of_its_rows_one_at_a_time(model):
    examples = examples_with_gaps()
    expected = one_row_at_a_time(model, examples)
    expected_gradients = gradients(model, expected)
    for for_targets_only in (True, False):
        (batch,) = micro_batches(examples, len(examples))
        loss = loss_sum(model, batch, for_targets_only)
        assert abs((loss - expected).item()) < 1e-5 * expected.item()
        for found, wanted in zip(gradients(model, loss), expected_gradients, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))


def test_logits_for_targets_only_change_neither_loss_nor_gradient(model):
    (batch,) = micro_batches(examples_with_gaps(), 7)
    asked = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs), with_kwargs=True)
    some, every = loss_sum(model, batch, True), loss_sum(model, batch, False)
    handle.remove()
    assert "logits_to_keep" in asked[0] and "logits_to_keep" not in asked[1]
    assert len(asked[0]["logits_to_keep"]) < batch.tokens_BT.shape[1] - 1, "the rows need positions without targets"
    assert abs((some - every).item()) < 1e-9 * every.item()
    for found, wanted in zip(gradients(model, some), gradients(model, every), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_what_the_padding_holds_does_not_matter(model):
    (batch,) = micro_batches(examples_with_gaps(), 7)
    padding = batch.mask_BT == 0
    assert padding.any()
    other = Batch(
        batch.tokens_BT.masked_fill(padding, 299), batch.labels_BT, batch.mask_BT, batch.num_tokens, batch.num_targets
    )
    first, second = loss_sum(model, batch, True), loss_sum(model, other, True)
    assert torch.equal(first, second)
    # The embedding's gradient is where padding could leak in: rows 0 and 299 of it.
    for one, two in zip(gradients(model, first), gradients(model, second), strict=True):
        assert torch.equal(one, two)


def test_a_batch_without_any_target_costs_nothing(model):
    tokens = np.arange(5, 12, dtype=np.int32)
    (batch,) = micro_batches([Example(tokens, np.zeros(7, np.bool_))], 1)
    for for_targets_only in (True, False):
        loss = loss_sum(model, batch, for_targets_only)
        assert loss.item() == 0.0
        assert not any(gradient.any() for gradient in gradients(model, loss))


def test_models_say_whether_they_can_keep_some_logits(model):
    from peft import LoraConfig, get_peft_model

    class Plain(torch.nn.Module):
        def forward(self, input_ids, use_cache=False):
            raise NotImplementedError

    assert accepts_logits_to_keep(model)
    assert not accepts_logits_to_keep(Plain())
    wrapped = get_peft_model(
        AutoModelForCausalLM.from_config(model.config), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert accepts_logits_to_keep(wrapped)
