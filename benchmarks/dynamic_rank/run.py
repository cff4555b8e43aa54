"""Does an adapter that loses half of its parameters while it trains score as well as one that keeps them?

    python benchmarks/dynamic_rank/run.py --model shared/models/reader-16m --data shared/data \
        --output runs/dynamic-rank --results benchmarks/results/dynamic-rank --gpus 4 --at-once 24 --minutes 8.5
    python benchmarks/dynamic_rank/run.py --results benchmarks/results/dynamic-rank --table

Arms: LoRA of the whole rank (64) and of half, method dynamic from 64 to half of the parameters, the same with random
directions kept, PEFT's AdaLoRA from 64 to 32, and the whole LoRA shrunk to half when it is finished. Tasks: IMDb
(accuracy, higher is better) and GSM8K (loss on the answers, lower is better; cell.py says why). Every arm has its own
learning rate, the best by the loss on 400 training rows that were held out, with a seed that no final run has: of four,
and of up to two more where the best is at an edge of those tried (rates.py). `shrunk` is made of the finished `lora`.
Then three seeds are trained on more rows and scored on the test rows. A final record whose rate turns out not to be the
best stays where it is and is not used.

Every cell is a process of its own, several to a GPU, so times are not to be compared. What is done is not done again:
the same command goes on. After --minutes no process is left running and the table of what there is, is printed and
written to table.json; `--table` prints it, and trains and writes nothing. `--try` runs tiny sizes on a CPU. Needs
nothing from the network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thriftune.report.statistics import over_rows_and_seeds

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rates import Search, search_of
from seats import THREADS, seat

TRAINED = ("lora", "lora-half", "dynamic", "adalora", "random")
ARMS = (*TRAINED, "shrunk")
BESIDE_DYNAMIC = ("adalora", "random", "shrunk")  # the other ways to half, which dynamic alone is compared with
TASKS = ("imdb", "gsm8k")
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
ADALORA_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)  # its singular values start at zero and its factors are small
SEARCH_SEED, SEEDS = 1000, (1, 2, 3)
Key = tuple[str, str, float, int, str]


@dataclass
class Pool:
    """Processes beside each other, each on the GPU that has fewest of them."""

    settings: Path
    logs: Path
    gpus: int
    at_once: int
    running: dict[Key, tuple[subprocess.Popen[bytes], int]] = field(default_factory=dict)
    failed: list[Key] = field(default_factory=list)

    def start(self, key: Key) -> None:
        task, arm, rate, seed, phase = key
        spec = {"task": task, "arm": arm, "rate": rate, "seed": seed, "phase": phase}
        busy = [gpu for _, gpu in self.running.values()]
        gpu = min(range(max(1, self.gpus)), key=busy.count)
        environment = {
            **os.environ,
            **THREADS,
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": seat(gpu, self.gpus) if self.gpus else "",
        }
        command = [sys.executable, str(Path(__file__).with_name("cell.py")), json.dumps(spec), str(self.settings)]
        with (self.logs / f"{'-'.join(map(str, key))}.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.running[key] = (process, gpu)

    def collect(self) -> None:
        for key, (process, _) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[key]
                self.failed += [key] if process.returncode else []

    def stop(self) -> None:
        for process, _ in self.running.values():
            process.terminate()
        for process, _ in self.running.values():
            process.wait()


def rates_of(arm: str) -> Sequence[float]:
    return ADALORA_RATES if arm == "adalora" else RATES


def read_records(results: Path) -> dict[Key, dict[str, Any]]:
    found = {}
    for path in results.glob("*-seed*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        found[(record["task"], record["arm"], record["rate"], record["seed"], record["phase"])] = record
    return found


def search(records: dict[Key, dict[str, Any]], task: str, arm: str, arguments: argparse.Namespace) -> Search:
    """`shrunk` is made of the finished lora, at its rate."""
    searched = "lora" if arm == "shrunk" else arm
    losses = {
        rate: record["eval_loss"]
        for (of_task, of_arm, rate, _, phase), record in records.items()
        if (of_task, of_arm, phase) == (task, searched, "search")
    }
    return search_of(losses, arguments.rates or rates_of(searched))


def wanted(records: dict[Key, dict[str, Any]], arguments: argparse.Namespace) -> Iterator[Key]:
    """Every cell that can run now and is not done: final ones first, whose arm has its rate."""
    searches = {(task, arm): search(records, task, arm, arguments) for task in arguments.tasks for arm in TRAINED}
    for seed in arguments.seeds:
        for (task, arm), found in searches.items():
            if not found.missing and found.best is not None and (task, arm, found.best, seed, "final") not in records:
                yield (task, arm, found.best, seed, "final")
    for (task, arm), found in searches.items():
        for rate in found.missing:
            yield (task, arm, rate, SEARCH_SEED, "search")


def run_all(pool: Pool, arguments: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < deadline:
        pool.collect()
        todo = [key for key in wanted(read_records(arguments.results), arguments) if key not in pool.failed]
        waiting = [key for key in todo if key not in pool.running]
        if not waiting and not pool.running:
            break
        for key in waiting[: arguments.at_once - len(pool.running)]:
            pool.start(key)
        time.sleep(0.5)
    pool.stop()


def table(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    records = read_records(arguments.results)
    rows = [table_row(records, task, arm, arguments) for task in arguments.tasks for arm in ARMS]
    return [row for row in rows if row is not None]


def print_table(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> None:
    for task in tasks:
        of_arm = {row["arm"]: row for row in rows if row["task"] == task}
        print(f"\n{task}: {'accuracy, higher is better' if task == 'imdb' else 'loss on answers, lower is better'}")
        print(
            f"{'arm':10} {'rate':>8} {'seeds':>5} {'parameters':>11} {'score':>9} {'95 % interval':>19} "
            f"{'- lora':>9} {'95 % interval':>19} {'- lora-half':>11} {'95 % interval':>19}"
        )
        for arm in ARMS:
            print(line_of(of_arm[arm]) if arm in of_arm else f"{arm:10} no result")
        for other in BESIDE_DYNAMIC:
            if f"minus_{other}_mean" in of_arm.get("dynamic", {}):
                mean, low, high = (of_arm["dynamic"][f"minus_{other}_{part}"] for part in ("mean", "low", "high"))
                print(f"dynamic - {other:8} {mean:+.4f}  {low:+.4f} {high:+.4f}")
    print("rate!: the best of those tried, at their edge; rate?: its search has not ended")


def table_row(
    records: dict[Key, dict[str, Any]], task: str, arm: str, arguments: argparse.Namespace
) -> dict[str, Any] | None:
    of_arm = finals(records, task, arm, arguments)
    if not of_arm:
        return None
    first = next(iter(of_arm.values()))
    compared = ("lora", "lora-half", *(BESIDE_DYNAMIC if arm == "dynamic" else ()))
    others = {other: finals(records, task, other, arguments) for other in compared if other != arm}
    found = search(records, task, arm, arguments)
    return {
        "task": task,
        "arm": arm,
        "rate": first["rate"],
        "rate_at_edge": found.at_edge,
        "search_ended": not found.missing,
        "seeds": sorted(of_arm),
        "parameters": round(sum(record["parameters"] for record in of_arm.values()) / len(of_arm)),
        "cut_s": sum(cut["cut_s"] for cut in first.get("cuts", [])),
        **{f"score_{key}": value for key, value in estimate(of_arm, None, task).items()},
        **{
            f"minus_{other}_{key}": value
            for other, of_other in others.items()
            if set(of_other) & set(of_arm)
            for key, value in estimate(of_arm, of_other, task).items()
        },
    }


def finals(
    records: dict[Key, dict[str, Any]], task: str, arm: str, arguments: argparse.Namespace
) -> dict[int, dict[str, Any]]:
    """Seed -> the final record at the best rate so far."""
    best = search(records, task, arm, arguments).best
    return {key[3]: record for key, record in records.items() if (*key[:3], key[4]) == (task, arm, best, "final")}


def estimate(one: dict[int, Any], other: dict[int, Any] | None, task: str) -> dict[str, float]:
    """The mean over rows and seeds, or that of the difference on the same rows and seeds, with its 95 % interval."""
    seeds = sorted(set(one) & set(other)) if other is not None else sorted(one)
    values = [one[seed]["rows"] for seed in seeds]
    if other is not None:
        values = [[a - b for a, b in zip(one[seed]["rows"], other[seed]["rows"], strict=True)] for seed in seeds]
    rows = [sum(row) / len(row) for row in zip(*values, strict=True)]
    by_seed = [sum(row) / len(row) for row in values]
    continuity = task == "imdb" and other is not None
    found = over_rows_and_seeds(rows, [1.0] * len(rows), by_seed, continuity=continuity)
    low, high = found.interval()
    return {"mean": found.mean, "low": low, "high": high}


def line_of(row: dict[str, Any]) -> str:
    def told(prefix: str, width: int) -> str:
        if f"{prefix}_mean" not in row:
            return f"{'':{width}} {'':19}"
        interval = f"{row[f'{prefix}_low']:+.4f} {row[f'{prefix}_high']:+.4f}"
        return f"{row[f'{prefix}_mean']:{width}.4f} {interval:>19}"

    edge = "" if row["search_ended"] and not row["rate_at_edge"] else "!" if row["search_ended"] else "?"
    return (
        f"{row['arm']:10} {row['rate']:>7g}{edge:1} {len(row['seeds']):>5} {row['parameters']:>11,} {told('score', 9)} "
        f"{told('minus_lora', 9)} {told('minus_lora-half', 11)}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trains = "--table" not in sys.argv
    parser.add_argument("--model", required=trains)
    parser.add_argument("--data", required=trains, help="a folder with imdb/ and gsm8k/")
    parser.add_argument("--output", type=Path, required=trains, help="run folders and logs")
    parser.add_argument("--results", type=Path, required=True, help="one JSON record a cell, and table.json")
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=24)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--train-rows", type=int, default=8000)
    parser.add_argument("--search-rows", type=int, default=4400, help="of which 400 judge a rate")
    parser.add_argument("--test-rows", type=int, default=5000)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--table", action="store_true", help="only print the table of the records in --results")
    parser.add_argument("--try", dest="trial", action="store_true", help="tiny sizes, to try the script")
    arguments = parser.parse_args()
    arguments.seeds, arguments.rates, rank = SEEDS, None, 64
    if arguments.trial:
        arguments.gpus, arguments.at_once, rank = 0, 1, 8
        arguments.seeds, arguments.rates = (1, 2), (1e-3,)
        arguments.train_rows, arguments.search_rows, arguments.test_rows = 32, 48, 24
    if not arguments.table:
        arguments.settings = settle(arguments, rank)
    return arguments


def settle(arguments: argparse.Namespace, rank: int) -> Path:
    """Make the folders, and write what every cell is told."""
    arguments.results.mkdir(parents=True, exist_ok=True)
    logs = arguments.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    settings = {
        **{name: str(Path(getattr(arguments, name)).absolute()) for name in ("model", "data", "output", "results")},
        **{name: getattr(arguments, name) for name in ("train_rows", "search_rows", "test_rows")},
        "judged_rows": 400 if rank == 64 else 16,
        "rank": rank,
        "keep": 0.5,
        "round_to": 8 if rank == 64 else 1,
        "rows_a_step": 32 if rank == 64 else 4,
    }
    path: Path = arguments.output / "settings.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def main() -> None:
    arguments = parse()
    if arguments.table:
        print_table(table(arguments), arguments.tasks)
        return
    pool = Pool(arguments.settings, arguments.output / "logs", arguments.gpus, arguments.at_once)
    try:
        run_all(pool, arguments)
    finally:
        pool.stop()
    rows = table(arguments)
    (arguments.results / "table.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print_table(rows, arguments.tasks)
    for key in pool.failed:
        print("failed:", *key, f"(see {arguments.output}/logs)")
    if pool.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
