"""Run by tests/unit/test_kernels.py with TRITON_INTERPRET=1: every kernel against its reference, with odd sizes, rows
that lie apart and NaN between them. Prints the name of each that agrees."""

from __future__ import annotations

import torch
from torch import Tensor

from thriftune.kernels import cross_entropy, dropout, four_bit, fp8, rms_norm, rope, swiglu
from thriftune.kernels.launch import runs_triton

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # two roundings to 8 bits may fall apart


def apart(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    whole = torch.full((rows, columns + 5), float("nan"), dtype=dtype)
    whole[:, :columns] = torch.randn(rows, columns).to(dtype)
    return whole[:, :columns]


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE[wanted.dtype], atol=TOLERANCE[wanted.dtype])


def check_rms_norm(dtype: torch.dtype) -> None:
    for rows, groups, size in ((3, 1, 7), (2, 3, 64), (1, 1, 600)):
        x, dy, residual = (apart(rows, groups * size, dtype) for _ in range(3))
        weight = torch.randn(size).to(dtype)
        found, wanted = apart(rows, groups * size, dtype), apart(rows, groups * size, dtype)
        rstd = rms_norm.rms_norm(x, weight, 1e-5, found, groups)
        rstd_wanted = rms_norm.rms_norm_reference(x, weight, 1e-5, wanted, groups)
        torch.testing.assert_close(rstd, rstd_wanted, rtol=2e-6, atol=2e-6)
        same(found, wanted)
        for beside in (residual, None):
            rms_norm.rms_norm_backward(dy, x, weight, rstd, beside, found)
            rms_norm.rms_norm_backward_reference(dy, x, weight, rstd, beside, wanted)
            same(found, wanted)


def check_rope(dtype: torch.dtype) -> None:
    for heads, groups, size in ((3, 1, 8), (1, 1, 6), (9, 3, 128)):
        angles, positions = torch.rand(7, size // 2) * 6, torch.tensor([0, 6, 1, 1])
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        for inverse in (False, True):
            sources, found, wanted = (
                tuple(apart(4, count * size, dtype).unflatten(1, (count, size)) for count in (heads, groups, groups))
                for _ in range(3)
            )
            rope.turn_reference(sources, wanted, cos, sin, positions, inverse)
            for targets in (found, sources):
                rope.turn(sources, targets, cos, sin, positions, inverse)
                for ours, theirs in zip(targets, wanted, strict=True):
                    same(ours, theirs)


def check_swiglu(dtype: torch.dtype) -> None:
    for rows, width in ((3, 5), (2, 1030)):
        gate_up, dh = apart(rows, 2 * width, dtype), apart(rows, width, dtype)
        h, h_wanted = apart(rows, width, dtype), apart(rows, width, dtype)
        swiglu.swiglu(gate_up, h)
        swiglu.swiglu_reference(gate_up, h_wanted)
        same(h, h_wanted)
        d, d_wanted = apart(rows, 2 * width, dtype), apart(rows, 2 * width, dtype)
        swiglu.swiglu_backward_reference(gate_up, dh, d_wanted, None)
        swiglu.swiglu_backward(gate_up, dh, d, None)
        same(d, d_wanted)
        swiglu.swiglu_backward(gate_up, dh, gate_up, dh)
        same(gate_up, d_wanted)
        same(dh, h_wanted)


def check_cross_entropy(dtype: torch.dtype) -> None:
    for rows, vocabulary in ((3, 11), (2, 8200)):
        found, targets = apart(rows, vocabulary, dtype), torch.randint(vocabulary, (rows,))
        found[0, int(targets[0]) - 1] = -torch.inf
        wanted = found.clone()
        losses = cross_entropy.cross_entropy_(found, targets, 0.5)
        losses_wanted = cross_entropy.cross_entropy_reference_(wanted, targets, 0.5)
        torch.testing.assert_close(losses, losses_wanted, rtol=1e-5, atol=1e-5)
        same(found, wanted)


def check_four_bit(dtype: torch.dtype) -> None:
    import bitsandbytes

    for rows, columns in ((3, 64), (5, 6), (2, 2112)):
        for nested in (True, False):
            packed = bitsandbytes.nn.Params4bit(
                torch.randn(rows, columns), requires_grad=False, compress_statistics=nested, quant_type="nf4"
            )._quantize(torch.device("cpu"))
            weight = four_bit.FourBit.of(packed)
            found, wanted = apart(rows, columns, dtype), apart(rows, columns, dtype)
            four_bit.unpack_four_bit(weight, found)
            four_bit.unpack_four_bit_reference(weight, wanted)
            if dtype == torch.float32:
                assert torch.equal(found, wanted), (rows, columns, nested)
            same(found, wanted)  # the interpreter cuts bfloat16 off where a GPU rounds


def check_fp8(dtype: torch.dtype) -> None:
    """Into float32 instead of 8 bits, which the interpreter rounds wrongly where a mantissa overflows."""
    for rows, size, rank in ((3, 64, 16), (2, 600, 5), (1, 7, 0)):
        x, side, scales = apart(rows, size, dtype), apart(rows, rank, dtype), torch.rand(rank)
        found, wanted = torch.zeros(rows, size + 3 * rank), torch.zeros(rows, size + 3 * rank)
        x[0] = 0
        beside = side if rank else None
        same(fp8.quantise_rows(x, beside, scales, found), fp8.quantise_rows_reference(x, beside, scales, wanted))
        same(found, wanted)
    scales, adapters = torch.rand(130, 1) + 0.1, (torch.randn(130, 5).to(dtype), torch.randn(3, 130).to(dtype).T)
    found, wanted, of_found, of_wanted = torch.zeros(130, 24), torch.zeros(130, 24), torch.ones(8), torch.ones(8)
    places = ((slice(0, 5), adapters[0]), (slice(5, 8), adapters[1]))

    def sides(place: Tensor, of_place: Tensor) -> list[fp8.Side]:
        return [fp8.Side(a, 0.3, scales, place[:, columns], 8, of_place[columns]) for columns, a in places]

    fp8.Sides(sides(found, of_found))()
    for side in sides(wanted, of_wanted):
        fp8.write_side_reference(side)
    same(found, wanted)
    same(of_found, of_wanted)


def check_four_bit_in_8(dtype: torch.dtype) -> None:
    import bitsandbytes

    for rows, columns in ((3, 64), (5, 6), (130, 192)):
        for nested in (True, False):
            packed = bitsandbytes.nn.Params4bit(
                torch.randn(rows, columns), requires_grad=False, compress_statistics=nested, quant_type="nf4"
            )._quantize(torch.device("cpu"))
            weight = four_bit.FourBit.of(packed)
            whole = torch.empty(rows, columns)
            four_bit.unpack_four_bit_reference(weight, whole)
            for unpack, exact in ((fp8.unpack_to_rows, whole), (fp8.unpack_to_columns, whole.T)):
                scales, found = torch.rand(len(exact), 1) + 0.5, apart(*exact.shape, dtype)
                unpack(weight, scales, found)
                same(found, (exact / scales).to(dtype))


def check_dropout(dtype: torch.dtype) -> None:
    """The same elements stay, to the last one; in float32 the same bits come out."""
    for rows, size in ((3, 7), (5, 64), (2, 5000)):
        places = (torch.randint(10**6, (rows,)), torch.randint(4096, (rows,)))
        for linear, rate, key in ((0, 0.05, (1, 0)), (1, 0.3, (2**31 - 1, 16)), (223, 0.9, (7, 2**31 - 1))):
            draw, x = dropout.Draw(key, *places), apart(rows, size, dtype)
            found, wanted = apart(rows, size, dtype), apart(rows, size, dtype)
            dropout.drop(x, draw, linear, rate, found)
            dropout.apply_reference(x, draw, linear, rate, wanted, add=False)
            assert torch.equal(found == 0, ~dropout.kept_reference(draw, linear, rate, size))
            same(found, wanted)
            assert dtype != torch.float32 or torch.equal(found, wanted)
            dropout.add_dropped(x, draw, linear, rate, found)
            dropout.apply_reference(x, draw, linear, rate, wanted, add=True)
            same(found, wanted)
            assert dtype != torch.float32 or torch.equal(found, wanted)
            dropout.drop(x, draw, linear, rate, x)
            dropout.add_dropped(x, draw, linear + 1, 0.0, x)
            assert torch.equal(x == 0, ~dropout.kept_reference(draw, linear, rate, size))


CHECKS = (check_rms_norm, check_rope, check_swiglu, check_cross_entropy, check_four_bit, check_fp8, check_four_bit_in_8,
          check_dropout)  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    assert runs_triton(torch.zeros(1)), "TRITON_INTERPRET=1 is not set"
    for check in CHECKS:
        for dtype in TOLERANCE:
            check(dtype)
        print(check.__name__.removeprefix("check_"))


if __name__ == "__main__":
    main()
