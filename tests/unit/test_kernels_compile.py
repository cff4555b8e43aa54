"""Every Triton kernel becomes machine code for Ampere and Hopper, with the types that a GPU's run has. Needs no GPU."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

F32, BF16, FP8, I32, I64, BYTES = "*fp32", "*bf16", "*fp8e4nv", "i32", "*i64", "*u8"
PACKED = {"packed_ptr": BYTES, "values_ptr": F32, "scales_ptr": BYTES, "scale_values_ptr": F32,
          "scale_scales_ptr": F32, "scale_offset_ptr": F32}  # fmt: skip
HEADS = {f"{name}_{way}": BF16 for name in "qkv" for way in ("from", "to")}
# module, kernel, types that are no bfloat16 pointers (`_ptr`) and no 32-bit numbers, values known when it is compiled
KERNELS: list[tuple[str, str, dict[str, str], dict[str, Any]]] = [
    ("rms_norm", "forward", {"rstd_ptr": F32, "epsilon": "fp32"}, {"BLOCK": 4096}),
    ("rms_norm", "backward", {"rstd_ptr": F32}, {"HAS_RESIDUAL": True, "BLOCK": 4096}),
    ("rope", "turn", {**HEADS, "positions_ptr": I64},
     {"HALF": 64, "BLOCK_HALF": 64, "HEADS": 32, "INVERSE": True}),
    ("swiglu", "forward", {}, {"BLOCK": 1024}),
    ("swiglu", "backward", {}, {"WRITE_H": True, "BLOCK": 1024}),
    ("cross_entropy", "in_place", {"targets_ptr": I64, "loss_ptr": F32, "scale": "fp32"},
     {"VOCABULARY": 128256, "BLOCK": 8192}),
    ("copies", "copy_all", {"table_ptr": I64, "factors_ptr": F32, "source_example": F32, "place_example": BF16},
     {"BLOCK": 4096}),
    ("four_bit", "unpack", {**PACKED, "over_ptr": F32},
     {"NESTED": True, "OVER": False, "WEIGHTS": 64, "BLOCKS": 32}),
    ("four_bit", "unpack", {**PACKED, "over_ptr": F32, "out_ptr": FP8},
     {"NESTED": True, "OVER": True, "WEIGHTS": 64, "BLOCKS": 32}),
    ("fp8", "quantise", {"side_scales_ptr": F32, "out_ptr": FP8, "scales_ptr": F32, "largest": "fp32"},
     {"HAS_SIDE": True, "BLOCK": 8192, "SIDE": 64}),
    ("fp8", "largest_over_scales", {"table_ptr": I64, "factors_ptr": F32, "found_ptr": F32, "source_example": F32},
     {"N": 256, "R": 16}),
    ("fp8", "place", {"table_ptr": I64, "factors_ptr": F32, "found_ptr": F32, "source_example": F32,
                      "place_example": FP8, "wanted": "fp32"}, {"N": 256, "R": 16}),
    ("fp8", "unpack_transposed", {**PACKED, "row_scales_ptr": F32, "out_ptr": FP8},
     {"NESTED": True, "WEIGHTS": 64, "ROWS": 128}),
    ("dropout", "apply", {"rows_ptr": I64, "positions_ptr": I64, "factor": "fp32"}, {"ADD": True, "BLOCK": 512}),
    ("dropout", "apply", {"rows_ptr": I64, "positions_ptr": I64, "factor": "fp32"}, {"ADD": False, "BLOCK": 512}),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "types", "known"), KERNELS)
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles(module: str, name: str, types: dict[str, str], known: dict[str, Any], capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if capability < 89 and FP8 in types.values():
        pytest.skip("8-bit floats are used from Ada on")
    kernel = getattr(importlib.import_module(f"thriftune.kernels.{module}_triton"), name)
    signature = {
        argument: "constexpr" if argument in known else types.get(argument, BF16 if argument.endswith("_ptr") else I32)
        for argument in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constexprs={(kernel.arg_names.index(key),): v for key, v in known.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert len(compiled.asm["cubin"]) > 1000


def test_no_kernel_is_left_out() -> None:
    for module in {module for module, *_ in KERNELS}:
        found = vars(importlib.import_module(f"thriftune.kernels.{module}_triton"))
        kernels = {name: value for name, value in found.items() if isinstance(value, triton.JITFunction)}
        own = {name for name, kernel in kernels.items() if kernel.fn.__module__.endswith(f"{module}_triton")}
        called = {"_move", "weights_of_blocks", "_write"}  # by other kernels
        assert own - called == {name for at, name, *_ in KERNELS if at == module}
