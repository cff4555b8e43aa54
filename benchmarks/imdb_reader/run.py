"""IMDb by full, lora and qlora on a small pretrained Llama: train on all 25,000 rows, score all 25,000 test rows.

    python benchmarks/imdb_reader/run.py --model ../shared/models/reader-16m --data ../shared/data/imdb \
        --output runs/imdb-reader --results benchmarks/results/imdb-reader

Writes one run folder a method, and into --results the record and the evaluation of each (without the answers).
`--methods` limits it; base is the model as it comes. Every cell is a process of its own; `--at-once` runs several
beside each other, which shares the GPU, so their times are not to be compared then.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

# Two epochs on texts cut to their last 480 tokens or so, with each method's own learning rate.
COMMON = [
    "max_length=512",
    "cut_prompt=start",
    "num_train_epochs=2",
    "per_device_train_batch_size=32",
    "gradient_accumulation_steps=1",
    "logging_steps=100",
    "save_strategy=no",
    "warmup_ratio=0.05",
    "lr_scheduler_type=linear",
    "weight_decay=0.0",
]
LEARNING_RATE = {"full": "4e-4", "lora": "1e-3", "qlora": "1e-3"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--methods", default="base,full,lora,qlora")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--limit", type=int, help="score so many test rows only (for a trial)")
    parser.add_argument("--extra", nargs="*", default=[], help="further key=value words for every run")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    waiting = arguments.methods.split(",")
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed = []
    while waiting or running:
        while waiting and len(running) < arguments.at_once:
            method = waiting.pop(0)
            running[method] = subprocess.Popen(["bash", "-c", cell(method, arguments)])
        time.sleep(0.5)
        for method, process in list(running.items()):
            if process.poll() is not None:
                del running[method]
                failed += [method] if process.returncode else []
    print_table(arguments)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def cell(method: str, arguments: argparse.Namespace) -> str:
    """The shell line of one cell: train (unless base), score, copy the records."""
    program = f"{sys.executable} -m thriftune"
    results = arguments.results
    run = arguments.output / f"{method}-seed{arguments.seed}"
    steps = []
    target = arguments.model
    if method != "base":
        words = [
            *COMMON,
            f"learning_rate={LEARNING_RATE[method]}",
            f"seed={arguments.seed}",
            f"data.path={arguments.data}",
            *arguments.extra,
        ]
        steps.append(
            f"{program} train {arguments.model} --data imdb --method {method} -o {run} {' '.join(words)} --json "
            f"> {results}/{run.name}.train.json"
        )
        target = str(run)
    limit = f"--limit {arguments.limit}" if arguments.limit else ""
    steps.append(
        f"{program} eval {target} --task imdb --data {arguments.data} --answers {run}.answers.jsonl --json {limit} "
        f"max_length=512 generation.batch_size=256 > {results}/{run.name}.eval.json"
    )
    return " && ".join(steps)


def print_table(arguments: argparse.Namespace) -> None:
    print(
        f"{'method':8} {'accuracy':>9} {'95 % interval':>18} {'generated':>10} {'loss':>8} "
        f"{'tokens/s':>10} {'train s':>8}"
    )
    for method in arguments.methods.split(","):
        stem = f"{method}-seed{arguments.seed}"
        evaluation = arguments.results / f"{stem}.eval.json"
        if not evaluation.exists() or not evaluation.read_text().strip():
            print(f"{method:8} no result")
            continue
        score = json.loads(evaluation.read_text())
        record = json.loads((arguments.results / f"{stem}.train.json").read_text()) if method != "base" else {}
        generated = score["details"]["generated_accuracy"]["value"]
        print(
            f"{method:8} {score['value']:9.4f} {score['low']:9.4f}-{score['high']:.4f} {generated:10.4f} "
            f"{record.get('loss', float('nan')):8.4f} {record.get('tokens_per_s', float('nan')):10.0f} "
            f"{record.get('train_s', float('nan')):8.1f}"
        )


if __name__ == "__main__":
    main()
