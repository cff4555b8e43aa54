"""LoRA and QLoRA of an 8B-shaped Llama on rows of GSM8K's lengths, 4 rows x 4 accumulation: tokens/s and peak memory.

    python benchmarks/peers_8b/run.py --model /tmp/bench/8b --data /tmp/bench/rows.jsonl --work /tmp/bench/runs \
        --results benchmarks/results/gsm8k-8b \\
        [--peers-script ../shared/bench/peers.py --lengths ../shared/bench/gsm8k_lengths.txt]

With a peers' script (one that prints a line `RESULT {json}`) its TRL and Unsloth runs follow on the same machine. A
run's speed is its tokens, padding not counted, over the median step time after the second step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS = 10
RECIPE = [
    "max_length=2048",
    "lora_r=16",
    "lora_alpha=32",
    "per_device_train_batch_size=4",
    "gradient_accumulation_steps=4",
    f"max_steps={STEPS}",
    "learning_rate=2e-4",
    "save_strategy=no",
    "logging_steps=1",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--cases", default="lora:off,lora:on,qlora:on,qlora:off", help="method:gradient_checkpointing")
    parser.add_argument("--peers-script")
    parser.add_argument("--peers", default="trl,unsloth")
    parser.add_argument("--lengths")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    rows = [ours(case, arguments) for case in arguments.cases.split(",") if case]
    if arguments.peers_script:
        rows += [peer(name, method, arguments) for name in arguments.peers.split(",") for method in ("lora", "qlora")]
    (arguments.results / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    print(f"{'who':12} {'method':7} {'recompute':9} {'tokens/s':>9} {'step s':>8} {'first s':>8} {'peak GiB':>9}")
    for row in rows:
        print(
            f"{row['who']:12} {row['method']:7} {row['recompute']:9} {row['tokens_per_s']:9.0f} {row['step_s']:8.3f} "
            f"{row['first_step_s']:8.2f} {row['peak_gib']:9.2f}"
        )


def ours(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    method, recompute = case.split(":")
    output = arguments.work / f"{method}-{recompute}"
    command = [
        sys.executable,
        "-m",
        "thriftune",
        "train",
        arguments.model,
        "--data",
        arguments.data,
        "--method",
        method,
        "-o",
        str(output),
        "--json",
        *RECIPE,
        f"gradient_checkpointing={recompute}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return empty("thriftune", method, recompute)
    (arguments.results / f"{method}-{recompute}.json").write_text(done.stdout)
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    step_s = statistics.median(step["step_s"] for step in metrics[2:])
    return {
        "who": "thriftune",
        "method": method,
        "recompute": recompute,
        "step_s": step_s,
        "tokens_per_s": statistics.mean(step["tokens"] for step in metrics) / step_s,
        "first_step_s": metrics[0]["step_s"],
        "peak_gib": max(step["peak_bytes"] for step in metrics) / 2**30,
    }


def peer(name: str, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    recompute = "on"
    command = [
        sys.executable,
        arguments.peers_script,
        name,
        "--method",
        method,
        "--batch",
        "4",
        "--accum",
        "4",
        "--seq",
        "2048",
        "--steps",
        str(STEPS),
        "--lengths",
        arguments.lengths,
        "--ckpt",
        "2" if name == "unsloth" else "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        print(done.stdout[-2000:], done.stderr[-3000:], file=sys.stderr)
        return empty(name, method, recompute)
    result = json.loads(found[-1].removeprefix("RESULT "))
    (arguments.results / f"{name}-{method}.json").write_text(json.dumps(result, indent=2) + "\n")
    return {
        "who": name,
        "method": method,
        "recompute": recompute,
        "step_s": result["step_s"],
        "tokens_per_s": result["tok_s"],
        "first_step_s": result["first_s"],
        "peak_gib": result["peak_gib"],
    }


def empty(who: str, method: str, recompute: str) -> dict[str, Any]:
    missing = float("nan")
    return {
        "who": who,
        "method": method,
        "recompute": recompute,
        "step_s": missing,
        "tokens_per_s": missing,
        "first_step_s": missing,
        "peak_gib": missing,
    }


if __name__ == "__main__":
    main()
