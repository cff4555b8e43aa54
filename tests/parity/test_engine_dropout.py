"""LoRA's dropout in the engine: against autograd with the same masks, and that masks drawn anew are the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from test_engine_fp8 import build as build_wide
from test_engine_fp8 import furthest, put_wide_numbers_in, qlora
from test_engine_gradients import assert_close, build, examples, gradients
from torch import Tensor, nn

from dropout_masks import with_masks
from thriftune.data import Example
from thriftune.data.batches import micro_batches
from thriftune.engine.attention import ReferenceAttention
from thriftune.engine.packing import cut_by_tokens, pack
from thriftune.engine.program import Program
from thriftune.engine.read import follow_adapters, read_program, why_not
from thriftune.engine.sizes import Keep
from thriftune.engine.takes import LINEARS
from thriftune.kernels import dropout
from thriftune.kernels.dropout import Draw, Key
from thriftune.train.loss import loss_sum

CPU = torch.device("cpu")
KEY = (123, 2**31 - 1)
RATE = 0.3
LENGTHS = (9, 2, 17, 5, 30, 1, 3)


def by_autograd(model: nn.Module, now: dict[str, Any], rows: Sequence[Example]) -> tuple[float, dict[str, Tensor]]:
    total = 0.0
    for row in rows:
        now["row"] = row.row
        (batch,) = micro_batches([row], 1)
        loss = loss_sum(model, batch, True)
        (loss * 0.1).backward()
        total += float(loss.detach())
    return total, gradients(model)


def step(
    program: Program,
    model: nn.Module,
    keep: Keep = Keep.ALL,
    most_tokens: int = 100,
    key: Key = KEY,
    rows: Sequence[Example] | None = None,
) -> tuple[float, dict[str, Tensor]]:
    program.copy_masters()
    total, kept = 0.0, [keep] * len(program.layers)
    for group in cut_by_tokens(rows or examples(LENGTHS), most_tokens):
        total += float(program.add_gradients(pack(group, CPU), 0.1, kept, ReferenceAttention(), key))
    return total, gradients(model)


def differ(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return any(not torch.equal(found[name], gradient) for name, gradient in wanted.items())


@pytest.mark.parametrize("most_tokens", [100, 30])
@pytest.mark.parametrize("family", ["llama", "llama tied, biases", "mistral, window", "qwen2", "qwen3"])
def test_loss_and_every_gradient(family: str, most_tokens: int) -> None:
    """Of one part and of three; each with its examples in another order and at other places."""
    model = build(family, lora_dropout=RATE)
    assert why_not(model) is None
    program = read_program(model, longest=64, rank_multiple=8, fp8=False)
    found_loss, found = step(program, model, most_tokens=most_tokens)
    loss, wanted = by_autograd(model, with_masks(model, KEY), examples(LENGTHS))
    assert found_loss == pytest.approx(loss, rel=1e-12)
    assert_close(found, wanted, 1e-9)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj"]},
        {"target_modules": ["o_proj", "gate_proj"]},
        {"r": 4, "rank_pattern": {"k_proj": 1, "layers.1.mlp.up_proj": 9}, "alpha_pattern": {"v_proj": 3}},
        {"layers_to_transform": [0, 2]},
    ],
    ids=lambda lora: " ".join(lora),
)
@pytest.mark.parametrize("keep", [Keep.ALL, Keep.RESIDUALS])
def test_adapters_of_every_form(lora: dict[str, Any], keep: Keep) -> None:
    """torch fills new tensors with NaN here, so that what is read before it is written shows."""
    model = build("qwen3", lora_dropout=RATE, **lora)
    torch.use_deterministic_algorithms(True)
    try:
        found_loss, found = step(read_program(model, longest=64, rank_multiple=8, fp8=False), model, keep)
    finally:
        torch.use_deterministic_algorithms(False)
    loss, wanted = by_autograd(model, with_masks(model, KEY), examples(LENGTHS))
    assert found_loss == pytest.approx(loss, rel=1e-12)
    assert_close(found, wanted, 1e-9)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("keep", [Keep.NO_MLP, Keep.RESIDUALS, Keep.INPUT])
def test_what_is_computed_again_meets_the_same_masks(family: str, keep: Keep, eight_bits: bool) -> None:
    model = build_wide(family, lora_dropout=RATE)
    program = read_program(model, 64, 16, fp8=eight_bits)
    loss, wanted = step(program, model)
    found_loss, found = step(program, model, keep)
    assert found_loss == loss and not differ(found, wanted)


def test_masks_are_others_in_another_step_row_layer_and_linear(monkeypatch) -> None:
    """By what reaches the gradients: no two masks of a step are one, and another key changes every gradient."""
    model = build("llama", lora_dropout=RATE)
    program = read_program(model, longest=64, rank_multiple=8, fp8=False)
    asked: list[tuple[int, tuple[int, ...]]] = []
    kept = dropout.kept_reference

    def noted(draw: Draw, linear: int, rate: float, size: int) -> Tensor:
        asked.append((linear, tuple(draw.rows_T.unique().tolist())))
        return kept(draw, linear, rate, size)

    with monkeypatch.context() as patched:
        patched.setattr(dropout, "kept_reference", noted)
        _, first = step(program, model)
    linears = 3 * len(LINEARS)
    assert {linear for linear, _ in asked} == set(range(linears)) and len(
        asked
    ) == 3 * linears - 3  # no dx at the start
    assert {rows for _, rows in asked} == {tuple(range(len(LENGTHS)))}
    _, other = step(program, model, key=(124, KEY[1]))
    assert all(not torch.equal(first[name], other[name]) for name in first)
    moved = [Example(row.tokens, row.trained, row.row + 100) for row in examples(LENGTHS)]
    assert differ(step(program, model, rows=moved)[1], first)


def test_a_step_is_the_same_however_it_is_cut() -> None:
    model = build("qwen2", lora_dropout=RATE)
    program = read_program(model, longest=64, rank_multiple=8, fp8=False)
    loss, wanted = step(program, model)
    found_loss, found = step(program, model, most_tokens=20)
    assert found_loss == pytest.approx(loss, rel=1e-12)
    assert_close(found, wanted, 1e-11)


def test_a_loss_alone_has_no_dropout() -> None:
    model, rows = build("llama", lora_dropout=RATE), examples(LENGTHS)
    program = read_program(model, longest=64, rank_multiple=8, fp8=False)
    program.copy_masters()
    batch = pack(rows, CPU)
    wanted = sum(float(loss_sum(model, micro_batches([row], 1)[0], True).detach()) for row in rows)  # in eval mode
    assert float(program.loss(batch, ReferenceAttention())) == pytest.approx(wanted, rel=1e-12)
    trained = program.add_gradients(batch, 0.1, [Keep.ALL] * 3, ReferenceAttention(), KEY)
    assert abs(float(trained) - wanted) > 1e-3
    with pytest.raises(ValueError, match="needs the key"):
        program.add_gradients(batch, 0.1, [Keep.ALL] * 3, ReferenceAttention())


def test_without_dropout_nothing_is_drawn_and_no_bit_changes() -> None:
    model = build("llama", dtype=torch.float32)
    program = read_program(model, longest=64, rank_multiple=8, fp8=False)
    before = torch.get_rng_state()
    assert not program.drops and program.key_of_step() is None
    assert torch.equal(torch.get_rng_state(), before)
    assert not differ(step(program, model, key=(1, 2))[1], step(program, model)[1])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_with_wide_numbers_in_the_place_of_8_bits_it_is_exact(family, monkeypatch) -> None:
    model = build_wide(family, lora_dropout=RATE)
    loss, wanted = step(read_program(model, 64, 16, fp8=False), model)
    put_wide_numbers_in(monkeypatch)
    found_loss, found = step(read_program(model, 64, 16, fp8=True), model)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert furthest(found, wanted) < 2e-5


@pytest.mark.parametrize("words", [[], ["lora.options={rank_pattern: {layers.1.mlp.up_proj: 20, k_proj: 3}}"]])
def test_4_bit_weights_unpacked_anew_or_once_give_the_same_bits(words) -> None:
    _, _, model = qlora([*words, "lora.dropout=0.3"])
    for eight_bits in (False, True):
        program = read_program(model, 64, 16, fp8=eight_bits)
        loss, wanted = step(program, model)
        for layer in program.layers[1:]:
            layer.hold()
        for keep in Keep:
            found_loss, found = step(program, model, keep)
            assert found_loss == loss and not differ(found, wanted)


def test_adapters_of_another_rank_meet_their_linears_masks() -> None:
    """As method dynamic changes them: the program follows, and masks stay those of the linears."""
    model = build("llama", lora_dropout=RATE)
    program = read_program(model, longest=64, rank_multiple=8, fp8=False)
    with torch.no_grad():
        for name, module in model.get_base_model().named_modules():
            if hasattr(module, "lora_A") and "layers.1" in name:
                a, b = module.lora_A["default"], module.lora_B["default"]
                a.weight, b.weight = nn.Parameter(a.weight[:1].clone()), nn.Parameter(b.weight[:, :1].clone())
    follow_adapters(program)
    found_loss, found = step(program, model, Keep.NO_MLP)
    loss, wanted = by_autograd(model, with_masks(model, KEY), examples(LENGTHS))
    assert found_loss == pytest.approx(loss, rel=1e-12)
    assert_close(found, wanted, 1e-9)


def test_only_dropout_itself_is_taken() -> None:
    model = build("llama", lora_dropout=RATE)
    model.get_base_model().model.layers[0].mlp.up_proj.lora_dropout["default"] = nn.AlphaDropout(0.1)
    assert "dropout of another kind (AlphaDropout) on model.layers.0.mlp.up_proj" in (why_not(model) or "")


def test_rows_are_those_of_the_data() -> None:
    rows = [Example(np.arange(length, dtype=np.int32), np.ones(length, bool), row) for length, row in ((2, 9), (3, 4))]
    batch = pack(rows, CPU)
    assert batch.rows_T.tolist() == [9, 9, 4, 4, 4] and batch.positions_T.tolist() == [0, 1, 0, 1, 2]
