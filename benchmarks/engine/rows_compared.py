"""What run.py measures: rows of ours and of peers, with the tokens/s that the project asks of itself on an H200."""

from __future__ import annotations

from dataclasses import dataclass

GSM8K = ["--batch", "4", "--accum", "4", "--seq", "2048"]
FULL = ["--batch", "4", "--seq", "2048"]


@dataclass(frozen=True)
class Row:
    """`must` and `aim` are tokens/s on an H200; peers are (name in the table, name in the script, its words)."""

    title: str
    ours: list[str]
    peers: list[tuple[str, str, list[str]]]
    must: int
    aim: int


def unsloth(name: str, method: str, checkpointing: str, words: list[str]) -> tuple[str, str, list[str]]:
    return name, "unsloth", ["--method", method, "--ckpt", checkpointing, *words]


ROWS: dict[str, Row] = {
    "lora": Row(
        "8B LoRA, 4 x 2048, memory free",
        ["--method", "lora", "--batch", "4x2048", "--steps", "14"],
        [unsloth("Unsloth, no recompute", "lora", "0", FULL)],
        17_500, 18_500,
    ),
    "lora-tight": Row(
        "8B LoRA, 4 x 2048, 17.7 GiB",
        ["--method", "lora", "--batch", "4x2048", "--limit-gib", "17.7", "--steps", "10"],
        [unsloth("Unsloth, recompute", "lora", "2", FULL)],
        12_300, 13_500,
    ),
    "lora-fp8": Row(
        "8B LoRA, fp8 products, 4 x 2048",
        ["--method", "lora", "--batch", "4x2048", "--steps", "14", "--extra", "precision=fp8"],
        [],
        23_000, 26_000,
    ),
    "qlora": Row(
        "8B QLoRA, 4 x 2048, memory free",
        ["--method", "qlora", "--batch", "4x2048", "--steps", "12", "--extra", "optim=adamw_torch"],
        [unsloth("Unsloth, no recompute", "qlora", "0", FULL)],
        17_000, 18_300,
    ),
    "qlora-tight": Row(
        "8B QLoRA, 4 x 2048, 7.8 GiB",
        ["--method", "qlora", "--batch", "4x2048", "--limit-gib", "7.8", "--steps", "10"],
        [unsloth("Unsloth, recompute", "qlora", "2", FULL)],
        11_300, 12_500,
    ),
    "lora-gsm8k": Row(
        "8B LoRA, GSM8K rows, 16 a step",
        ["--method", "lora", "--batch", "gsm8k", "--steps", "24"],
        [
            unsloth("Unsloth, recompute", "lora", "2", GSM8K),
            ("TRL, recompute", "trl", ["--method", "lora", "--ckpt", "1", *GSM8K]),
        ],
        12_000, 15_000,
    ),
    "qlora-70b": Row(
        "70B QLoRA, 2 x 2048",
        ["--model", "Llama-3-70B", "--method", "qlora", "--batch", "2x2048", "--steps", "7",
         "--extra", "optim=adamw_torch"],
        [("TRL + Liger, recompute", "70b", ["2048", "2", "liger"])],
        1_900, 2_100,
    ),
    "qlora-70b-fp8": Row(
        "70B QLoRA, NF4 to fp8, 2 x 2048",
        ["--model", "Llama-3-70B", "--method", "qlora", "--batch", "2x2048", "--steps", "7",
         "--extra", "precision=fp8", "optim=adamw_torch"],
        [],
        2_600, 3_200,
    ),
}  # fmt: skip
