"""LoRA's dropout on a CUDA device at real sizes: masks, gradients against float32, and masks that are drawn again."""

from __future__ import annotations

import pytest
import torch
from test_engine_on_gpu import BF16, LENGTHS, device, examples, gradients, network, rows
from torch import Tensor, nn

from dropout_masks import with_masks
from thriftune.data.batches import micro_batches
from thriftune.engine.attention import ReferenceAttention
from thriftune.engine.layer import Keep
from thriftune.engine.packing import pack
from thriftune.engine.program import Program
from thriftune.engine.read import read_program
from thriftune.kernels import dropout
from thriftune.train.loss import loss_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KEY = (5, 2**31 - 1)


@pytest.mark.parametrize("size", [4096, 14336, 28672, 1000, 7])
@pytest.mark.parametrize(("linear", "rate"), [(0, 0.05), (1, 0.5), (223, 0.1)])
def test_masks_are_those_of_the_reference_on_either_device(size: int, linear: int, rate: float) -> None:
    on_host = (torch.randint(10**6, (300,)), torch.randint(8192, (300,)))
    draw = dropout.Draw(KEY, *(part.to(device()) for part in on_host))
    kept = dropout.kept_reference(draw, linear, rate, size)
    assert torch.equal(kept.cpu(), dropout.kept_reference(dropout.Draw(KEY, *on_host), linear, rate, size))
    x, found, wanted = rows(300, size), rows(300, size), rows(300, size)
    x.abs_().add_(0.1)
    dropout.drop(x, draw, linear, rate, found)
    dropout.apply_reference(x, draw, linear, rate, wanted, add=False)
    assert torch.equal(found != 0, kept) and torch.equal(found, wanted)
    dropout.add_dropped(x, draw, linear, rate, found)
    dropout.apply_reference(x, draw, linear, rate, wanted, add=True)
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=0)
    dropout.drop(x, draw, linear, rate, x)
    assert torch.equal(x != 0, kept)


def test_keys_and_linears_make_no_kernel_of_their_own() -> None:
    from thriftune.kernels.dropout_triton import apply

    x = rows(16, 4096)
    tokens = torch.arange(16, device=device())

    def compiled() -> int:
        return sum(len(found[0]) for found in apply.device_caches.values())

    dropout.drop(x, dropout.Draw((3, 5), tokens, tokens), 2, 0.1, x)
    before = compiled()
    for key in ((0, 1), (1, 0), (16, 32), (2**31 - 1, 2**31 - 16)):
        for linear in (0, 1, 16, 223):
            dropout.drop(x, dropout.Draw(key, tokens, tokens), linear, 0.1, x)
    assert before and compiled() == before


def by_autograd(model: nn.Module, bfloat16: bool) -> dict[str, Tensor]:
    now = with_masks(model, KEY)
    for row in examples(LENGTHS):
        now["row"] = row.row
        (batch,) = micro_batches([row], 1)
        with torch.autocast("cuda", dtype=BF16, enabled=bfloat16, cache_enabled=False):
            loss = loss_sum(model, batch.to(device()), True)
        if batch.num_targets:
            (loss / 1000).backward()
    return gradients(model)


def by_engine(program: Program, model: nn.Module, keep: Keep) -> dict[str, Tensor]:
    """With the attention whose backward pass adds in a fixed order."""
    program.add_gradients(pack(examples(LENGTHS), device()), 1 / 1000, [keep], ReferenceAttention(), KEY)
    return gradients(model)


@pytest.mark.parametrize(("size", "kind"), [("8b", "llama"), ("8b", "qwen3")])
def test_gradients_are_as_near_to_float32_as_autograds_in_bfloat16(size: str, kind: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = by_autograd(network(size, kind, torch.float32, dropout=0.1), False)
    usual = by_autograd(network(size, kind, BF16, dropout=0.1), True)
    model = network(size, kind, BF16, dropout=0.1)
    program = read_program(model, 1024, 64, fp8=False)
    program.copy_masters()
    ours = by_engine(program, model, Keep.ALL)
    for name, gradient in exact.items():
        mine, theirs = (float((found[name] - gradient).norm() / gradient.norm()) for found in (ours, usual))
        assert mine <= 1.2 * theirs, (name, mine, theirs)
    for keep in (Keep.NO_MLP, Keep.RESIDUALS, Keep.INPUT):
        again = by_engine(program, model, keep)
        assert all(torch.equal(again[name], gradient) for name, gradient in ours.items()), keep
