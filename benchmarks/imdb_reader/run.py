"""Base, full, lora and qlora on a small pretrained Llama, through `thriftune compare`: IMDb with 3 seeds, and GSM8K.

    python benchmarks/imdb_reader/run.py --model ../shared/models/reader-16m --imdb ../shared/data/imdb \
        --gsm8k ../shared/data/gsm8k --output runs/reader --results benchmarks/results/reader --at-once 4

`imdb` trains on all 25,000 rows and scores all 25,000 test rows; each method's learning rate is searched on held-out
training rows. `gsm8k` trains for 300 steps and has all 1,319 test questions answered and parsed, which shows the
pipeline and its time: a model of this size solves next to none. `--at-once` is how many cells run side by side, the
GPUs in turn; with no more cells than GPUs their times can be compared.

When `--minutes` are over the comparison is stopped and what is done is kept. The same command goes on with it, also on
another machine of the same kind, where only `--results` is left: it holds the records of all cells that are done, in a
few megabytes and without weights. How many cells are side by side is then as before. The last lines are a table of the
cells. `--tiny` tries it in minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from keep import at_once, keep, restore

# Two epochs on texts cut to their last 480 tokens or so.
IMDB = [
    *("max_length=512", "cut_prompt=start", "num_train_epochs=2", "per_device_train_batch_size=32"),
    *("gradient_accumulation_steps=1", "warmup_ratio=0.05", "lr_scheduler_type=linear", "weight_decay=0.0"),
    *("logging_steps=100", "save_strategy=no", "generation.batch_size=512"),
]
GSM8K = [
    *("max_length=512", "max_steps=300", "per_device_train_batch_size=32", "gradient_accumulation_steps=1"),
    *("full:learning_rate=4e-4", "lora:learning_rate=1e-3", "qlora:learning_rate=1e-3"),
    *("warmup_ratio=0.05", "logging_steps=100", "save_strategy=no", "generation.batch_size=512"),
    *("max_new_tokens=300",),
]
TINY = ["max_samples=16", "max_steps=2", "max_length=96", "per_device_train_batch_size=4", "max_new_tokens=8"]
SAVING_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--imdb", required=True, help="folder of the data set")
    parser.add_argument("--gsm8k", required=True, help="folder of the data set")
    parser.add_argument("--output", type=Path, required=True, help="the comparisons, with weights")
    parser.add_argument("--results", type=Path, required=True, help="their records, without")
    parser.add_argument("--parts", default="imdb,gsm8k")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--tries-at-once", type=int, help="of the learning-rate search; three times --at-once")
    parser.add_argument("--minutes", type=float, default=60.0, help="for everything, the last saving included")
    parser.add_argument("--tiny", action="store_true", help="a trial on few rows and steps")
    arguments = parser.parse_args()
    ends = time.monotonic() + 60 * arguments.minutes - SAVING_S
    codes = {}
    for part in arguments.parts.split(","):
        folder, kept = arguments.output / part, arguments.results / part
        restore(kept, folder, arguments.model, arguments.imdb if part == "imdb" else arguments.gsm8k)
        started = time.monotonic()
        codes[part] = until(ends, words(part, folder, arguments))
        keep(folder, kept)
        print(f"{part}: exit code {codes[part]} after {time.monotonic() - started:.0f} s", flush=True)
    for part in codes:
        print_table(arguments.output / part)
    if any(codes.values()):
        sys.exit("not everything is done: give the same command again")


def words(part: str, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """The command line of one comparison."""
    asked = {"imdb": (arguments.imdb, IMDB, "3"), "gsm8k": (arguments.gsm8k, GSM8K, "1")}
    data, options, seeds = asked[part]
    at_once_here = at_once(folder) or arguments.at_once
    tries = arguments.tries_at_once or 3 * at_once_here
    small = []
    if arguments.tiny:
        small, seeds = ["--no-search", "--limit", "16"], "1"
        given = {option.partition("=")[0] for option in TINY}
        options = [*TINY, *(option for option in options if option.partition("=")[0] not in given)]
    return [
        *(sys.executable, "-m", "thriftune", "compare", arguments.model, "--data", part, "--task", part),
        *("--methods", "base,full,lora,qlora", "--seeds", seeds, "--output", str(folder)),
        *("--at-once", str(at_once_here), "--tries-at-once", str(tries)),
        *(f"data.path={data}", *options, *small),
    ]


def until(ends: float, command: list[str]) -> int:
    """Run the comparison; at `ends` (of the monotonic clock) it is asked to save and stop. Its exit code."""
    if time.monotonic() >= ends:
        return 130
    threads = {"RAYON_NUM_THREADS": "8", **os.environ}  # of the tokenizer in each cell
    process = subprocess.Popen(command, stdout=sys.stderr, env=threads)
    try:
        return process.wait(ends - time.monotonic())
    except subprocess.TimeoutExpired:
        print("the time is over: stopping", file=sys.stderr, flush=True)
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(SAVING_S - 15)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def print_table(folder: Path) -> None:
    """Every cell with its score and seconds, and the verdict where there is one."""
    head = f"{'accuracy':>9} {'95 % interval':>17} {'rate':>8} {'train s':>8} {'scored s':>9} {'GiB':>6}  path"
    print(f"\n{folder.name:18} {head}")
    for path in sorted(folder.glob("cells/*/cell.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        if not cell["result"]:
            print(f"{path.parent.name:18} {cell['status']}: {cell['reason']}")
            continue
        result, record = cell["result"], path.parent / "record.json"
        interval = f"{result['low']:.4f}-{result['high']:.4f}"
        line = f"{path.parent.name:18} {result['value']:9.4f} {interval:>17}"
        if record.is_file():
            run = json.loads(record.read_text(encoding="utf-8"))
            rate, peak = run["recipe"]["train"]["learning_rate"], run["peak_bytes"] / 2**30
            print(f"{line} {rate:8.2g} {run['train_s']:8.1f} {result['wall_s']:9.1f} {peak:6.2f}  {run['path']}")
        else:
            print(f"{line} {'':8} {'':8} {result['wall_s']:9.1f}")
    report = folder / "report.json"
    if report.is_file():
        print(json.loads(report.read_text(encoding="utf-8"))["verdict"])


if __name__ == "__main__":
    main()
