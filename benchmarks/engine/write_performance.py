"""docs/performance.md from the records of run.py and profile_step.py.

    python benchmarks/engine/write_performance.py            prints the page
    python benchmarks/engine/write_performance.py --write    puts it into docs/performance.md

The words are here, the numbers in benchmarks/results/; tests/unit/test_performance_page.py holds the page to them.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from curves import table as curves
from rows_compared import ROWS

from thriftune.units import format_bytes

REPOSITORY = Path(__file__).resolve().parents[2]
TABLE = REPOSITORY / "benchmarks" / "results" / "engine-h200"
CURVES = REPOSITORY / "benchmarks" / "results" / "engine-curves"
LONG_RUN = REPOSITORY / "benchmarks" / "results" / "engine-long-run.json"
PROFILES = REPOSITORY / "benchmarks" / "results" / "engine-profile"
PAGE = REPOSITORY / "docs" / "performance.md"
# Tokens/s that the same products and attention would allow if nothing else took time, at the rates that an H200 keeps
# up at these shapes (669 TFLOP/s in bfloat16, 1,263 in fp8; attention forward and backward 1.3 ms a layer at 8,192
# tokens; the head 26 ms).
LIMITS = {
    "lora": 20_200, "lora-tight": 15_200, "lora-fp8": 33_000, "qlora": 20_200, "qlora-tight": 15_200,
    "lora-gsm8k": 18_000, "qlora-70b": 2_350, "qlora-70b-fp8": 4_100,
}  # fmt: skip
TRACED = {
    "lora-8b-h100": "8B LoRA in bfloat16, 4 x 2,048 tokens",
    "qlora-8b-h100": "8B QLoRA, 4 x 2,048 tokens, every layer unpacked once and kept, paged 8-bit AdamW",
    "fp8-8b-h100": "8B LoRA with fp8 products, 4 x 2,048 tokens",
    "qlora-fp8-70b-h100": "70B QLoRA, NF4 to fp8, 2 x 2,048 tokens, the MLP's first products computed again",
}
KINDS = {
    "frozen": "products with frozen weights",
    "head": "the head's products",
    "narrow": "the adapters' narrow products",
    "attention": "attention (cuDNN)",
    "elementwise": "norms, gate, rotation, quantising, cross-entropy, copies of adapters",
    "unpacking": "4-bit weights unpacked",
    "optimizer": "optimizer and gradient norm",
    "copies": "copies",
}
H100_BYTES_PER_S = 3.0e12  # a copy of 1 GiB on the traced card, bytes read and written

INTRODUCTION = """\
# Performance

Written by `benchmarks/engine/write_performance.py` from the records in `benchmarks/results/`. Llama shapes with random
weights, LoRA r=16 on all seven linears of a layer, PyTorch 2.11; tokens are counted without padding.

## Beside the peers

One H200, every row in turn on the same machine (`benchmarks/engine/run.py`): Unsloth 2026.10.9, TRL 1.15 with PEFT 0.21
and, where it says so, Liger 0.8.5. "Limit" is what the products with frozen weights and attention alone would take at
the rates that this GPU keeps up; "of it" is the share that was reached. The memory is PyTorch's allocated peak. First
steps are those after the weights are loaded."""

NOTES = """\
- Unsloth's and TRL's QLoRA step with the paged 8-bit AdamW, as their users do. Ours steps with PyTorch's AdamW where
  memory is free, because the plan chooses so (`optim=auto`), and with the paged one at 7.8 GiB.
- The rows of GSM8K's lengths are 16 a step for all: 4 at once, 4 times, for the peers; side by side in one row here.
- 70B: ours keeps everything that it computes, which takes the whole card; TRL computes everything again in 44 GiB.
- Two of the aims are met (GSM8K rows, and the first step), and all of the least speeds that the project set itself."""

SAME = """\
## Does it train the same?

`benchmarks/engine/curves.py`: LoRA over a 16 M-parameter Llama on IMDb, 750 steps of 32 rows, on H100s and H200s; the
loss at the end is the mean of the last third of the steps. Differences are means over seeds, each seed against autograd
on the same rows in the same order, with 95 % intervals. Two runs that round in another order drift apart, so single
seeds differ by up to 2 %. "Autograd in halves" is autograd with two micro-batches a step, the same mathematics: no
difference smaller than that row's means anything. In bfloat16 and from NF4 the engine ends where autograd does. With
fp8 products the loss is 0.4 to 0.5 % higher, which is not told apart from nothing and not from 1 %: so `precision=fp8`
is never chosen unasked."""

LONG = """\
`benchmarks/engine/long_run.py` on an H100 that other processes shared, so its speed says nothing: {steps:,} steps of a
Llama 3.2 1B with four rows of 1 to 4,096 tokens, {tokens:,} tokens. The bytes in use were the same at every look,
{allocated}; Triton compiled {variants} kernels before the first look and none after it. cuDNN makes a plan for each
rounded size of a step and keeps it: {first} at the first look, {last} at the last. What the allocator had reserved grew
with the largest step so far, from {reserved_first} to {reserved_last}."""

REST = """\
## Where the rest goes

Traced with `benchmarks/engine/profile_step.py` on an H100 80 GB, whose products are as fast as an H200's and whose
memory has 70 % of its bandwidth. The first two were traced before the gate's gradient was written over its product, all
before queries, keys and values were packed for attention: both were for memory. FLOPs and bytes of products follow from
their shapes; the share is of 989 TFLOP/s (1,979 in fp8), the rate that is printed for this card, or of the 3.0 TB/s
that a copy reached."""

READING = """\
## Reading it

- **Frozen products** are two thirds of a step in bfloat16 and run at three quarters of the printed rate: under load the
  card lowers its clock, and short tests show more. Nothing helps but fewer of them (`fp8`, or keeping more).
- **Narrow products** read each layer's inputs and gradients once more for 16 columns; they run at the memory's speed.
  Making them where those tensors are written (in the norm and the gate) would spare reading them again: 11 of 476 ms by
  the bytes. Not done yet.
- **Quantising** for fp8 reads what was just written. A row's scale needs the whole row, the adapter's columns included,
  so it is a pass of its own.
- **Between the kernels** 2 to 4 % of a step is lost: the clipping of the gradient waits for the backward pass, and
  thousands of launches have small gaps.
- **Paged 8-bit AdamW** works for 3 ms and takes 30: it steps every tensor by itself. That is why the plan takes
  PyTorch's where memory allows.

What was tried and did not pay is in [log.md](log.md)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")


def page() -> str:
    traces = [traced(name) for name in TRACED]
    parts = [INTRODUCTION, table(), NOTES, SAME, curves(CURVES), long_run(), REST, *traces, READING]
    return "\n\n".join(parts) + "\n"


def read(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


def table() -> str:
    lines = ["| work | who | tokens/s | limit | of it | peak GiB | first step, s |", "|---|---|---|---|---|---|---|"]
    for name, row in ROWS.items():
        limit = LIMITS[name]
        ours = read(TABLE / f"{name}.thriftune.json")
        first, speed = ours["first_step_s"], ours["tokens_per_s"]
        lines.append(
            f"| {row.title} | **thriftune** | **{speed:,}** | {limit:,} | {speed / limit:.0%} | {ours['peak_gib']:.1f} "
            f"| {first:.1f} |"
        )
        for index, (who, _, _) in enumerate(row.peers):
            peer = read(TABLE / f"{name}.peer{index}.json")
            first_s = f"{peer['first_s']:.1f}" if "first_s" in peer else "-"
            times = f"{peer['tok_s']:,} (ours {speed / peer['tok_s']:.2f} times)"
            lines.append(f"| | {who} | {times} | | | {peer['peak_gib']:.1f} | {first_s} |")
    return "\n".join(lines)


def long_run() -> str:
    found = read(LONG_RUN)
    first, last = found["seen"][0], found["seen"][-1]
    assert {look["allocated"] for look in found["seen"]} == {first["allocated"]}, "memory drifted"
    assert {look["variants"] for look in found["seen"]} == {first["variants"]}, "kernels were compiled again"
    text = LONG.format(
        steps=found["steps"], tokens=found["tokens"], allocated=format_bytes(first["allocated"]),
        variants=first["variants"], first=first["plans"], last=last["plans"],
        reserved_first=format_bytes(first["reserved"]), reserved_last=format_bytes(last["reserved"]),
    )  # fmt: skip
    return "## Long runs\n\n" + textwrap.fill(text, 120)


def traced(name: str) -> str:
    """A table of the kinds of kernels, and of the ten longest of them."""
    found = read(PROFILES / f"{name}.json")
    step_ms = 1000 * found["step_s"]
    lines = [f"### {TRACED[name]}: {step_ms:.0f} ms", "", "| kind | ms | of the step |", "|---|---|---|"]
    for kind, ms in found["kinds_ms"].items():
        lines.append(f"| {KINDS[kind]} | {ms:.1f} | {ms / step_ms:.1%} |")
    rest_ms = step_ms - found["kernels_ms"]
    lines.append(f"| between the kernels | {rest_ms:.1f} | {rest_ms / step_ms:.1%} |")
    lines += ["", "| the longest kernels | calls | ms | TFLOP/s | GB/s | share |", "|---|---|---|---|---|---|"]
    for row in found["rows"][:10]:
        lines.append(f"| {_name(row)} | {row['count']} | {row['ms']:.1f} | {_rates(row, 'fp8' in name)} |")
    return "\n".join(lines)


def _name(row: dict[str, Any]) -> str:
    if row["kind"] in ("frozen", "head", "narrow"):
        return f"{row['kind']} {row['name']}"
    words = {"cudnn_generated": "cuDNN", "void cudnn": "cuDNN"}
    start = next((word for begin, word in words.items() if row["name"].startswith(begin)), "")
    if "bprop" in row["name"]:
        return f"{start} attention, backward"
    if "fprop" in row["name"]:
        return f"{start} attention, forward"
    return f"{row['kind']}: {row['name'].split('<')[0][:40]}"


def _rates(row: dict[str, Any], fp8: bool) -> str:
    if not row["flops"]:
        return " | | "
    flops, moved = row["flops"] / row["ms"] * 1000, row["bytes"] / row["ms"] * 1000
    peak = 1979e12 if fp8 and row["kind"] == "frozen" else 989e12
    share = max(flops / peak, moved / H100_BYTES_PER_S)
    return f"{flops / 1e12:,.0f} | {moved / 1e9:,.0f} | {share:.0%}"


if __name__ == "__main__":
    main()
