"""Each fused operation: its reference against autograd, and its Triton kernel (interpreted) against the reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from thriftune.kernels.cross_entropy import cross_entropy_
from thriftune.kernels.four_bit import FourBit, unpack_four_bit
from thriftune.kernels.launch import has_triton
from thriftune.kernels.rms_norm import rms_norm, rms_norm_backward
from thriftune.kernels.rope import turn
from thriftune.kernels.swiglu import swiglu, swiglu_backward

NAN = float("nan")


def strided(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows that lie apart, with NaN between them: what is read or written there shows."""
    whole = torch.full((rows, columns + 3), NAN, dtype=dtype)
    whole[:, :columns] = torch.randn(rows, columns, dtype=torch.float64).to(dtype)
    return whole[:, :columns]


def plain_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


@pytest.mark.parametrize(("rows", "groups", "size"), [(5, 1, 7), (1, 1, 64), (4, 3, 6)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_norm_and_its_gradient(rows: int, groups: int, size: int, with_residual: bool) -> None:
    torch.manual_seed(0)
    x, dy, residual = (strided(rows, groups * size) for _ in range(3))
    weight, out = torch.randn(size, dtype=torch.float64), strided(rows, groups * size)
    rstd = rms_norm(x, weight, 1e-5, out, groups)
    leaf = x.clone().requires_grad_()
    wanted = plain_norm(leaf.unflatten(1, (groups, size)), weight, 1e-5).flatten(1)
    torch.testing.assert_close(out, wanted.detach(), rtol=1e-12, atol=1e-12)
    wanted.backward(dy)
    rms_norm_backward(dy, x, weight, rstd, residual if with_residual else None, out)
    expected = leaf.grad + residual if with_residual else leaf.grad
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


def test_rope_turns_and_turns_back() -> None:
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 2, 0, 5])
    angles = torch.rand(6, 4, dtype=torch.float64) * 6
    heads = [strided(5, count * 8).unflatten(1, (count, 8)) for count in (3, 1, 1)]
    before = [part.clone() for part in heads]
    turned = [strided(5, count * 8).unflatten(1, (count, 8)) for count in (3, 1, 1)]
    turn(tuple(heads), tuple(turned), angles.cos(), angles.sin(), positions, inverse=False)
    for part, found in zip(before[:2], turned[:2], strict=True):
        pairs = torch.complex(part[..., :4].contiguous(), part[..., 4:].contiguous())
        wanted = pairs * torch.polar(torch.ones_like(angles), angles)[positions][:, None]
        torch.testing.assert_close(found, torch.cat((wanted.real, wanted.imag), -1), rtol=1e-12, atol=1e-12)
    assert torch.equal(turned[2], before[2])
    assert all(torch.equal(part, same) for part, same in zip(heads, before, strict=True))
    turn(tuple(turned), tuple(turned), angles.cos(), angles.sin(), positions, inverse=True)
    for part, found in zip(before, turned, strict=True):
        torch.testing.assert_close(found, part, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_place", [True, False])
def test_swiglu_and_its_gradient(in_place: bool) -> None:
    torch.manual_seed(0)
    gate_up, dh, out, h = strided(4, 10), strided(4, 5), strided(4, 10), strided(4, 5)
    leaf = gate_up.clone().requires_grad_()
    wanted = torch.nn.functional.silu(leaf[:, :5]) * leaf[:, 5:]
    swiglu(gate_up, h)
    torch.testing.assert_close(h, wanted.detach(), rtol=1e-12, atol=1e-12)
    wanted.backward(dh)
    if in_place:
        out, h = gate_up, dh
    swiglu_backward(gate_up, dh, out, h)
    torch.testing.assert_close(out, leaf.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(h, wanted.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vocabulary", [2, 9, 33])
def test_cross_entropy_writes_its_gradient_over_the_logits(vocabulary: int) -> None:
    torch.manual_seed(0)
    logits, targets = strided(6, vocabulary), torch.randint(vocabulary, (6,))
    logits[0, (int(targets[0]) + 1) % vocabulary] = -torch.inf
    leaf = logits.clone().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
    (0.25 * wanted.sum()).backward()
    losses = cross_entropy_(logits, targets, 0.25)
    torch.testing.assert_close(losses, wanted.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits, leaf.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (3, 7), (20, 1000)])
def test_unpacked_weights_are_those_of_bitsandbytes(kind: str, nested: bool, rows: int, columns: int) -> None:
    import bitsandbytes

    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        values = torch.randn(rows, columns, dtype=dtype)
        packed = bitsandbytes.nn.Params4bit(
            values, requires_grad=False, compress_statistics=nested, quant_type=kind
        )._quantize(torch.device("cpu"))
        out = strided(rows, columns, dtype)
        unpack_four_bit(FourBit.of(packed), out)
        assert torch.equal(out, bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state))


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_triton_kernels_agree_with_their_references() -> None:
    """In a process of its own: the interpreter must be chosen before Triton is imported."""
    script = Path(__file__).parent.parent / "interpreted_kernels.py"
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [
        "rms_norm",
        "rope",
        "swiglu",
        "cross_entropy",
        "four_bit",
        "fp8",
        "four_bit_in_8",
        "dropout",
    ]
