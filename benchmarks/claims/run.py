"""The numbers of docs/claims.md: an article's claims about fine-tuning beside counts, arithmetic and measurements.

    python benchmarks/claims/run.py            prints every table of the page
    python benchmarks/claims/run.py --write    puts them into docs/claims.md, and leaves its prose as it is

Needs no GPU and no torch. tests/unit/test_claims.py holds the page to what is computed here.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from counting import (
    ADAM_8BIT,
    GSM8K_ROWS,
    GSM8K_TOKENS,
    IMDB_ROWS,
    IMDB_TOKENS,
    NF4,
    NF4_SINGLE,
    REPOSITORY,
    adapter,
    built_in,
    catalogue_shapes,
    flops_a_token,
    gsm8k,
    imdb,
    models_with,
    nearest_adapter,
    nf4_bytes,
    on_demand,
    planned,
    recorded_peak,
    recorded_tokens_per_s,
    shape_of,
    sources_of_total,
    ways_to_count,
)
from streamed import measured_and_planned

from thriftune.catalog.prices import electricity_price
from thriftune.catalog.rows import Gpu
from thriftune.catalog.user import UserRows
from thriftune.units import GIB

PAGE = REPOSITORY / "docs" / "claims.md"
LLAMA_7B, LLAMA_8B, LLAMA_70B = "Llama-2-7B", "Llama-3-8B", "Llama-3.1-70B"
Q_V = ["q_proj", "v_proj"]

# What the article prints.
CLAIMED_TRAINABLE, CLAIMED_ALL = 8_388_608, 4_295_004_160

# QLoRA of Llama-3-70B shapes with random weights, r=16 on all linears, TRL 1.15 with Liger and recomputation, on one
# H200, 2026-11-23: tokens a step -> GiB allocated at the peak, and tokens/s at the first. No record is in results/.
QLORA_70B_GIB = {2048: 40.8, 4096: 44.0}
QLORA_70B_TOKENS_PER_S = 1_062
PEAK_SHARE = 0.4  # of a GPU's bfloat16 rate: what well-made training on several GPUs reaches; assumed, not measured


@dataclass(frozen=True)
class Row:
    """One line of a table. `how` begins with where the number comes from: counted, arithmetic, measured, catalogue,
    predicted."""

    what: str
    number: str
    how: str

    def __str__(self) -> str:
        return f"| {self.what} | {self.number} | {self.how} |"


def gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes < 99.95e9 else f"{size_bytes / 1e9:,.0f} GB"


def mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.0f} MB"


def gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB"


def both(size_bytes: float) -> str:
    return f"{gib(size_bytes)} ({gb(size_bytes)})"


def minutes(duration_s: float) -> str:
    return f"{duration_s / 60:.1f} min"


def percent(part: float, whole: float) -> str:
    share = 100 * part / whole
    return f"{share:.2g} %" if share < 1 else f"{share:.1f} %"


def less(part: float, whole: float) -> str:
    return f"{100 - 100 * part / whole:.1f} % less"


def count_and_share(model: str, r: int, targets: str | list[str] = "all-linear") -> str:
    trained = adapter(model, r, targets)
    return f"{trained:,} ({percent(trained, shape_of(model).total_parameters + trained)})"


def fits(size_bytes: float, card: Gpu) -> str:
    return "fits" if size_bytes <= card.usable_bytes else "does not fit"


def rent(hours: float, gpu: str) -> str:
    prices = [price.usd_per_hour * hours for price in on_demand(gpu)]
    digits = 2 if max(prices) < 10 else 0
    return f"${min(prices):,.{digits}f} to ${max(prices):,.{digits}f}"


def offers(gpu: str) -> str:
    days = sorted(price.date for price in on_demand(gpu))
    return f"catalogue: {len(days)} on-demand offers, seen {days[0]} to {days[-1]}"


def full_70b() -> list[Row]:
    shape, card = shape_of(LLAMA_70B), built_in("a100-80gb")
    states, hours = 16 * shape.total_parameters, 8 * 20
    tokens = 8 * (card.flops_bf16 or 0) * PEAK_SHARE * 20 * 3600 / flops_a_token(shape, frozen=False)
    lean = 4 + ADAM_8BIT
    return [
        Row("parameters of Llama 3.1 70B", f"{shape.total_parameters:,}", "counted"),
        Row("weights, gradients and AdamW's moments", gb(states), "arithmetic: 16 bytes a parameter"),
        Row("memory of the 8 cards", gb(8 * card.usable_bytes), "catalogue: usable, not nominal"),
        Row("cards that hold them", f"{-(-states // card.usable_bytes)}", "arithmetic: no activations yet"),
        Row(
            "16-bit weights and gradients, 8-bit moments",
            gb(lean * shape.total_parameters),
            f"arithmetic: {lean:.2f} bytes",
        ),
        Row("price behind $640", f"${640 / hours:.2f} a GPU-hour", f"arithmetic: {hours} GPU-hours"),
        Row(f"{hours} hours of an A100 80 GB", rent(hours, "a100-80gb"), offers("a100-80gb")),
        Row(
            "tokens in 20 h",
            f"{tokens / 1e6:.0f} M",
            f"arithmetic, if {100 * PEAK_SHARE:.0f} % of the peak rate is reached",
        ),
        Row("the same in epochs of GSM8K", f"{tokens / GSM8K_TOKENS:.0f}", f"arithmetic: {GSM8K_TOKENS:,} tokens each"),
    ]


def lora_8b_parameters() -> list[Row]:
    return [
        Row("Llama 3 8B, r=16, all seven linears", count_and_share(LLAMA_8B, 16), "counted"),
        Row("Llama 3 8B, r=16, q and v", count_and_share(LLAMA_8B, 16, Q_V), "counted"),
        Row("Llama 3 8B, r=16, q alone", count_and_share(LLAMA_8B, 16, ["q_proj"]), "counted"),
        Row("Llama 2 7B, r=8, q and v", count_and_share(LLAMA_7B, 8, Q_V), "counted"),
    ]


def lora_8b_run() -> list[Row]:
    card, energy, cheapest = built_in("rtx-4090"), electricity_price(UserRows()), on_demand("rtx-4090")
    a_token = flops_a_token(shape_of(LLAMA_8B), frozen=True)
    claimed = GSM8K_TOKENS / (45 * 60)
    ours, trl = recorded_tokens_per_s("thriftune", "lora", "on"), recorded_tokens_per_s("trl", "lora", "on")
    memory, time, work = planned(LLAMA_8B, "lora", "rtx-4090", gsm8k())
    kept, _, _ = planned(LLAMA_8B, "lora", "rtx-4090", gsm8k(), recompute=False)
    return [
        Row(
            "peak, thriftune on an H200",
            both(recorded_peak("lora-on-64mib-chunks")),
            "measured: lora-on-64mib-chunks.json",
        ),
        Row("peak, TRL on an H200", both(recorded_peak("trl-lora")), "measured: trl-lora.json"),
        Row("peak, thriftune, nothing recomputed", gib(recorded_peak("lora-off")), "measured: lora-off.json"),
        Row("peak on an RTX 4090", both(memory.peak_bytes), f"predicted, of {gib(card.usable_bytes)} usable"),
        Row("the same, nothing recomputed", gib(kept.peak_bytes), f"predicted: {fits(kept.peak_bytes, card)}"),
        Row("peak, torchtune on an RTX 4090", "16.2 GiB", "published: torchtune's README"),
        Row("an epoch of GSM8K", f"{GSM8K_TOKENS:,} tokens", f"counted: {GSM8K_ROWS:,} rows, Llama 3's tokenizer"),
        Row("speed behind 45 min", f"{claimed:.0f} tokens/s", "arithmetic"),
        Row(
            "the same with every row padded to 512 tokens",
            f"{GSM8K_ROWS * 512 / (45 * 60):,.0f} tokens/s",
            f"arithmetic: {GSM8K_ROWS * 512:,} tokens an epoch",
        ),
        Row(
            "share of an RTX 4090's peak rate, without padding",
            percent(claimed * a_token, card.flops_bf16 or 1),
            f"arithmetic: {a_token / 1e9:.1f} GFLOP a token",
        ),
        Row(
            "an epoch, thriftune on an H200",
            minutes(GSM8K_TOKENS / ours),
            f"measured: {ours:,.0f} tokens/s, table.json",
        ),
        Row("an epoch, TRL on an H200", minutes(GSM8K_TOKENS / trl), f"measured: {trl:,.0f} tokens/s, table.json"),
        Row(
            "an epoch on an RTX 4090",
            minutes(work.steps * time.step_s),
            f"predicted: {time.tokens_per_s:,.0f} tokens/s",
        ),
        Row(
            "electricity of 45 min",
            f"${card.power_w * 0.00075 * energy.usd_per_kwh:.2f}",
            f"arithmetic: {card.power_w:.0f} W, ${energy.usd_per_kwh:.3f} a kWh ({energy.date})",
        ),
        Row(
            "hours of electricity for $0.80",
            f"{0.8 / energy.usd_per_kwh / card.power_w * 1000:.1f}",
            "arithmetic: the card alone",
        ),
        Row("45 min of a rented RTX 4090", rent(0.75, "rtx-4090"), offers("rtx-4090")),
        Row(
            "hours of one for $12",
            f"{12 / cheapest[-1].usd_per_hour:.0f} to {12 / cheapest[0].usd_per_hour:.0f}",
            "arithmetic: the same offers",
        ),
    ]


def qlora_70b() -> list[Row]:
    shape, small, middle, large = shape_of(LLAMA_70B), *map(built_in, ("rtx-4090", "a100-40gb", "a6000"))
    (fewer, at_fewer), (more, at_more) = QLORA_70B_GIB.items()
    a_token = (at_more - at_fewer) / (more - fewer)
    fitting = fewer + (middle.usable_bytes / GIB - at_fewer) / a_token
    rate = QLORA_70B_TOKENS_PER_S
    near, targets, rank = nearest_adapter(LLAMA_70B, CLAIMED_TRAINABLE)
    one_row, _, _ = planned(LLAMA_70B, "qlora", "a100-40gb", gsm8k(), ["per_device_train_batch_size=1"])
    four_rows, _, _ = planned(LLAMA_70B, "qlora", large.key, gsm8k())
    _, time, work = planned(LLAMA_70B, "qlora", "h200", gsm8k())
    return [
        Row("Llama 3.1 70B, r=16, all seven linears", count_and_share(LLAMA_70B, 16), "counted"),
        Row("Llama 3.1 70B, r=16, q and v", count_and_share(LLAMA_70B, 16, Q_V), "counted"),
        Row(
            "its adapter nearest to 8.4 M", f"{near:,}", f"counted, ranks 1 to 256: r={rank} on {' and '.join(targets)}"
        ),
        Row("Llama 2 7B, r=16, q and v", count_and_share(LLAMA_7B, 16, Q_V), "counted"),
        Row("4-bit weights", both(nf4_bytes(shape)), "counted; TRL allocated 36.8 GiB"),
        Row(f"peak, a step of {fewer:,} tokens", f"{at_fewer} GiB", "measured: TRL on an H200"),
        Row(f"peak, a step of {more:,} tokens", f"{at_more:.1f} GiB", "measured: TRL on an H200"),
        Row("usable memory of an A100 40 GB", gib(middle.usable_bytes), "catalogue"),
        Row("left of it beside the weights", gib(middle.usable_bytes - nf4_bytes(shape)), "arithmetic"),
        Row("tokens a step that fit it", f"{fitting:,.0f} at most", "arithmetic: the line through both peaks"),
        Row(
            "peak on it, one GSM8K row at a time",
            gib(one_row.peak_bytes),
            f"predicted for thriftune, which keeps adapters in float32: {fits(one_row.peak_bytes, middle)}",
        ),
        Row(
            "peak on an A6000 of 48 GB, four rows at a time",
            gib(four_rows.peak_bytes),
            f"predicted, of {gib(large.usable_bytes)} usable: {fits(four_rows.peak_bytes, large)}",
        ),
        Row("usable memory of an RTX 4090", gib(small.usable_bytes), "catalogue"),
        Row(
            "peak on each of two RTX 4090, weights streamed",
            "14.9 GiB",
            "published: fsdp_qlora, Llama 2 70B, 2,048 tokens x 2, March 2024",
        ),
        *(Row(*line) for line in measured_and_planned(LLAMA_70B, "70B", GSM8K_TOKENS)),
        Row("8-bit optimizer states: all that paging moves", gb(adapter(LLAMA_70B, 16) * ADAM_8BIT), "counted"),
        Row(
            "tokens in 6 h on an H200",
            f"{rate * 6 * 3600 / 1e6:.1f} M",
            f"measured: TRL, {rate:,} tokens/s, rows of {fewer:,}",
        ),
        Row("the same in epochs of GSM8K", f"{rate * 6 * 3600 / GSM8K_TOKENS:.1f}", "arithmetic"),
        Row("an epoch of GSM8K on an H200", minutes(work.steps * time.step_s), "predicted: four rows at a time"),
        Row("6 h of an H200", rent(6, "h200"), offers("h200")),
    ]


def four_bits() -> list[Row]:
    shape = shape_of(LLAMA_70B)
    others = shape.total_parameters - shape.linear_weights
    return [
        Row("16-bit weights", gb(2 * shape.total_parameters), "counted: 2 bytes a parameter"),
        Row("half a byte for everything", gb(0.5 * shape.total_parameters), "counted: the article's way"),
        Row(
            "the layers' linears in NF4",
            gb(shape.linear_weights * NF4),
            f"counted: {NF4:.4f} bytes a weight, scales included",
        ),
        Row("embedding, head and norms in 16 bits", gb(2 * others), f"counted: {others:,} parameters"),
        Row("together", gb(nf4_bytes(shape)), "counted"),
        Row(
            "without double quantisation", gb(nf4_bytes(shape, NF4_SINGLE)), f"counted: {NF4_SINGLE:.4f} bytes a weight"
        ),
    ]


def printed_line() -> list[Row]:
    eight, seven = shape_of(LLAMA_8B), shape_of(LLAMA_7B)
    found = sources_of_total(CLAIMED_ALL)
    models = len(catalogue_shapes())
    ways = f"counted: {models} models x every target list x ranks 1 to 256, 4-bit weights whole or two to an element"
    near = ways_to_count(eight)["packed with the head"]
    return [
        Row("Llama 2 7B, r=16, q and v", f"{adapter(LLAMA_7B, 16, Q_V):,}", "counted"),
        Row("Llama 3 8B, r=16, q and o", f"{adapter(LLAMA_8B, 16, ['q_proj', 'o_proj']):,}", "counted"),
        Row("models with some adapter of that size", f"{len(models_with(CLAIMED_TRAINABLE))} of {models}", "counted"),
        Row(f"combinations that make {CLAIMED_ALL:,}", f"{len(found)}", ways),
        Row("nearest: Llama 3 8B, linears and head packed", f"{near + CLAIMED_TRAINABLE:,}", "counted"),
        Row(
            "PEFT's line for Llama 2 7B ends in",
            f"{seven.total_parameters + CLAIMED_TRAINABLE:,}",
            "counted; in 4 bits the same",
        ),
        Row(
            "PEFT's line for Llama 3 8B ends in",
            f"{eight.total_parameters + CLAIMED_TRAINABLE:,}",
            "counted; in 4 bits the same",
        ),
        Row("the printed total, above 2^32", f"{CLAIMED_ALL - 2**32:,}", "arithmetic: 9 x 4,096"),
    ]


def shares() -> list[Row]:
    shape, large = shape_of(LLAMA_8B), shape_of(LLAMA_70B)
    total, wide, narrow = shape.total_parameters, adapter(LLAMA_8B, 16), adapter(LLAMA_8B, 16, Q_V)
    largest = max(r for r in range(1, 65) if adapter(LLAMA_8B, r) < 0.001 * total)
    peak = recorded_peak("lora-on-64mib-chunks")
    return [
        Row("8B, r=16, q and v", percent(narrow, total), "counted"),
        Row("8B, r=16, all seven linears", percent(wide, total), "counted"),
        Row("70B, r=16, all seven linears", percent(adapter(LLAMA_70B, 16), large.total_parameters), "counted"),
        Row("largest rank on all of 8B's linears under 0.1 %", f"{largest}", "counted"),
        Row("gradients, 8B, full", gb(4 * total), "counted: float32"),
        Row("gradients, r=16, q and v", f"{mb(4 * narrow)}, {less(narrow, total)}", "counted"),
        Row("gradients, r=16, all seven linears", f"{mb(4 * wide)}, {less(wide, total)}", "counted"),
        Row("whole run, 8B, full, before activations", gb(16 * total), "arithmetic: 16 bytes a parameter"),
        Row(
            "whole run, 8B, LoRA on all linears",
            f"{gb(peak)}, {less(peak, 16 * total)}",
            "measured: lora-on-64mib-chunks.json",
        ),
    ]


def paged_optimizer() -> list[Row]:
    trained = adapter(LLAMA_8B, 16)

    def peaks(model: str, method: str, gpu: str) -> tuple[int, int]:
        wide, _, _ = planned(model, method, gpu, gsm8k(), ["optim=adamw_torch"])
        paged, _, _ = planned(model, method, gpu, gsm8k(), ["optim=paged_adamw_8bit"])
        return wide.peak_bytes, paged.peak_bytes

    rows = [
        Row("AdamW's moments, LoRA 8B r=16", mb(8 * trained), "counted: 8 bytes a trained parameter"),
        Row("the frozen 8B beside them", gib(2 * shape_of(LLAMA_8B).total_parameters), "counted"),
        Row("the moments in 8 bits", mb(ADAM_8BIT * trained), f"counted: {ADAM_8BIT:.2f} bytes, scales included"),
        Row(
            "of full fine-tuning's weights, gradients, moments",
            less(8 + ADAM_8BIT, 16),
            "arithmetic: 16 bytes a parameter",
        ),
    ]
    for what, model, method, gpu in (
        ("LoRA 8B", LLAMA_8B, "lora", "rtx-4090"),
        ("QLoRA 70B", LLAMA_70B, "qlora", "h200"),
        ("full 8B", LLAMA_8B, "full", "h200"),
    ):
        wide, paged = peaks(model, method, gpu)
        rows.append(
            Row(
                f"peak of {what}",
                f"{gib(wide)}, then {less(paged, wide)}",
                "predicted: GSM8K, with all states still on the GPU",
            )
        )
    return rows


def imdb_run() -> list[Row]:
    mean = IMDB_TOKENS / IMDB_ROWS
    claimed = mean * 1000 / (12 * 60)
    shape, card, small = shape_of(LLAMA_8B), built_in("rtx-4090"), built_in("rtx-4060-ti-16gb")
    rows = []
    for method in ("lora", "qlora"):
        memory, time, work = planned(LLAMA_8B, method, "rtx-4090", imdb(1000))
        rows.append(
            Row(
                f"8B by {method} on an RTX 4090",
                minutes(work.steps * time.step_s),
                f"predicted: {time.tokens_per_s:,.0f} tokens/s",
            )
        )
        rows.append(Row("its peak", gib(memory.peak_bytes), "predicted: reviews cut to 1,024 tokens"))
    return [
        Row("tokens a review", f"{mean:.0f}", f"counted: {IMDB_ROWS:,} training rows, Llama 3's tokenizer"),
        Row("speed behind 12 min", f"{claimed:.0f} tokens/s", "arithmetic: 1,000 rows once"),
        Row(
            "its share of an RTX 4090's peak rate, 8B",
            percent(claimed * flops_a_token(shape, frozen=True), card.flops_bf16 or 1),
            "arithmetic",
        ),
        *rows,
        Row("8B's 16-bit weights alone", gib(2 * shape.total_parameters), "counted"),
        Row("usable memory of a card of 16 GB", gib(small.usable_bytes), f"catalogue: {small.name}"),
        Row(
            "QLoRA 8B's peak on an H200, GSM8K",
            gib(recorded_peak("qlora-on-64mib-chunks")),
            "measured: qlora-on-64mib-chunks.json",
        ),
    ]


def giants() -> list[Row]:
    dense, experts, card = shape_of("Mistral-Large-Instruct-2407"), shape_of("gpt-oss-120b"), built_in("rtx-4090")
    moved = 2 * dense.linear_weights * NF4
    return [
        Row("Mistral Large, 123B dense, in NF4", gb(nf4_bytes(dense)), "counted"),
        Row("gpt-oss-120b at half a byte a parameter", gb(0.5 * experts.total_parameters), "counted"),
        Row("usable memory of an RTX 4090", gb(card.usable_bytes), "catalogue"),
        Row("the dense model, in such cards", f"{nf4_bytes(dense) / card.usable_bytes:.1f}", "arithmetic"),
        Row(
            "copying its layers to the card twice a step",
            f"{moved / card.link_bytes_per_s:.1f} s",
            f"arithmetic: {card.link_bytes_per_s / 1e9:.0f} GB/s from host memory",
        ),
        *(Row(*line) for line in measured_and_planned("Mistral-Large-Instruct-2407", "123B", GSM8K_TOKENS)),
    ]


def costs() -> list[Row]:
    shape, card = shape_of(LLAMA_70B), built_in("a100-80gb")
    full, frozen = flops_a_token(shape, frozen=False), flops_a_token(shape, frozen=True)
    full_rate, qlora_rate = 8 * (card.flops_bf16 or 0) * PEAK_SHARE / full, QLORA_70B_TOKENS_PER_S
    of_full, of_qlora = on_demand("a100-80gb")[0].usd_per_hour, on_demand("h200")[0].usd_per_hour
    full_usd, qlora_usd = 8 * of_full / full_rate / 3600e-6, of_qlora / qlora_rate / 3600e-6
    return [
        Row("the article's $30 and $640", less(30, 640), "arithmetic"),
        Row("full, FLOPs a token", f"{full / 1e9:.0f} GFLOP", "counted, with recomputation"),
        Row("QLoRA, FLOPs a token", f"{frozen / 1e9:.0f} GFLOP, {less(frozen, full)}", "counted, with recomputation"),
        Row(
            "full on 8 A100s, a million tokens",
            f"${full_usd:.2f}",
            f"arithmetic: {full_rate:,.0f} tokens/s at {100 * PEAK_SHARE:.0f} % of the peak, ${of_full:.2f} a GPU-hour",
        ),
        Row(
            "QLoRA on one H200, a million tokens",
            f"${qlora_usd:.2f}",
            f"measured: TRL, {qlora_rate:,} tokens/s; ${of_qlora:.2f} an hour",
        ),
        Row("QLoRA for the same tokens", less(qlora_usd, full_usd), "arithmetic: cheapest on-demand offers"),
    ]


SECTIONS = (
    *(full_70b, lora_8b_parameters, lora_8b_run, qlora_70b, four_bits, printed_line),
    *(shares, paged_optimizer, imdb_run, giants, costs),
)


def tables() -> dict[int, str]:
    """Number of the page's section -> its table."""
    head = "| What | Number | How |\n|---|---|---|\n"
    return {number: head + "\n".join(map(str, rows())) for number, rows in enumerate(SECTIONS, start=1)}


def with_tables(page: str) -> str:
    """The page with the table under each numbered heading replaced; where there is none it is added at the end."""
    found = tables()
    sections = re.split(r"(?m)^(?=## )", page)
    for index, section in enumerate(sections):
        title = re.match(r"## (\d+)\. ", section)
        if title is None:
            continue
        prose = re.sub(r"(?m)^\|.*\n?", "", section).strip("\n")
        sections[index] = f"{prose}\n\n{found[int(title.group(1))]}\n\n"
    return "".join(sections).rstrip("\n") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/claims.md")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    print("\n\n".join(f"{number}.\n{table}" for number, table in tables().items()))


if __name__ == "__main__":
    main()
