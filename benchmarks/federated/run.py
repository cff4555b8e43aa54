"""IMDb over 8 sites that are not alike, ranks 4, 8 and 16, a 4-bit base, beside training on all rows in one place.

    python benchmarks/federated/run.py --model ../shared/models/reader-16m --data ../shared/data/imdb \
        --output runs/federated --results benchmarks/results/federated-imdb --gpus 4 --at-once 16

Arms: `central` is `thriftune train` on all rows, as many examples as all sites together see; `svd` and `fedit` are
federations of mixed ranks; `svd-equal`, `rolora` and `ffa` (not run unless named with --arms) have rank 16 at all
sites. Splits: Dirichlet 0.3 over the labels, and by rating. Every cell is a process of its own and then a second one
that scores all test rows; cells share the GPUs in turn. A cell whose score is there already is not run again, and one
that is trained, in --output, is only scored. After --minutes no process is left running and the table of what there is
comes last; the records go to --results. Fifteen cells, 4 x H100, `--at-once 15`: 5 minutes to train, 2 to score.

For a trial: --seeds 1 --arms central,svd --splits dirichlet:0.3 --limit 40 --rounds 2 --local-steps 2
--extra max_samples=400 per_device_train_batch_size=4
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from seats import start_shell, stop

SITES = 8
COMMON = [
    *("max_length=512", "cut_prompt=start", "logging_steps=100", "save_strategy=no", "warmup_ratio=0.05"),
    *("lr_scheduler_type=linear", "lora.r=16", "lora.alpha=32", "per_device_train_batch_size=32"),
    "gradient_accumulation_steps=1",
]
MIXED = "4,8,16"
ARMS = {
    "central": None,
    "svd": ["aggregation=svd", "--ranks", MIXED],
    "fedit": ["aggregation=fedit", "--ranks", MIXED],
    "svd-equal": ["aggregation=svd"],
    "rolora": ["aggregation=rolora"],
    "ffa": ["aggregation=ffa"],
}


@dataclass(frozen=True)
class Cell:
    arm: str
    split: str
    seed: int

    @property
    def name(self) -> str:
        return "-".join([self.arm, *([self.split.replace(":", "_")] if self.split else []), f"seed{self.seed}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--arms", default="central,svd,fedit")
    parser.add_argument("--splits", default="dirichlet:0.3,by:rating")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--local-steps", type=int, default=10)
    parser.add_argument("--learning-rate", default="1e-3")
    parser.add_argument("--method", default="qlora")
    parser.add_argument("--gpus", type=int, default=0, help="0: on the CPU")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--limit", type=int, help="score so many test rows only (for a trial)")
    parser.add_argument("--extra", nargs="*", default=[], help="further key=value words for every cell")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    cells = cells_of(arguments)
    failed = run_all(cells, arguments)
    print_table(cells, arguments)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    """Seed by seed, so that a run that is cut short has whole seeds."""
    arms, splits = arguments.arms.split(","), arguments.splits.split(",")
    return [
        Cell(arm, split, seed)
        for seed in range(1, arguments.seeds + 1)
        for arm in arms
        for split in ([""] if ARMS[arm] is None else splits)
    ]


def run_all(cells: list[Cell], arguments: argparse.Namespace) -> list[str]:
    """Names of the cells that failed. What a cell prints goes to OUTPUT/NAME.log."""
    waiting = [cell for cell in cells if score_of(cell, arguments) is None]
    arguments.output.mkdir(parents=True, exist_ok=True)
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    failed, started, place = [], time.perf_counter(), 0
    while (waiting or running) and time.perf_counter() - started < 60 * arguments.minutes:
        while waiting and len(running) < arguments.at_once:
            cell = waiting.pop(0)
            log = arguments.output / f"{cell.name}.log"
            running[cell] = start_shell(command_of(cell, arguments), log, place, arguments.gpus)
            place += 1
        time.sleep(0.2)
        for cell, process in list(running.items()):
            if process.poll() is not None:
                del running[cell]
                failed += [cell.name] if process.returncode else []
                state = "failed" if process.returncode else "done"
                print(
                    f"{time.perf_counter() - started:6.0f} s  {cell.name} {state}, {len(waiting)} waiting", flush=True
                )
    stop(running.values())
    return failed


def command_of(cell: Cell, arguments: argparse.Namespace) -> str:
    """The shell line of one cell: train, score all test rows."""
    program = [sys.executable, "-m", "thriftune"]
    folder = arguments.output / cell.name
    words = [
        *(arguments.model, "--data", "imdb", "--method", arguments.method, "--output", str(folder), "--json"),
        *COMMON,
        *(f"data.path={arguments.data}", f"seed={cell.seed}", f"learning_rate={arguments.learning_rate}"),
    ]
    arm = ARMS[cell.arm]
    if arm is None:
        steps = SITES * arguments.rounds * arguments.local_steps
        train = [*program, "train", "--force", *words, f"max_steps={steps}"]
    else:
        train = [
            *(*program, "federate", "simulate", "--force", *words, "--clients", str(SITES), "--split", cell.split),
            *("--rounds", str(arguments.rounds), f"local_steps={arguments.local_steps}", *arm),
        ]
    score = [*program, "eval", str(folder), "--task", "imdb", "--data", arguments.data, "--json"]
    score += ["max_length=512", "generation.batch_size=256"]
    score += ["--limit", str(arguments.limit)] if arguments.limit else []
    stem = arguments.results / cell.name
    scoring = f"{shlex.join(score)} > {stem}.eval.json"
    if folder.is_dir() and read(stem.with_name(f"{cell.name}.train.json")) is not None:
        return scoring
    return f"{shlex.join([*train, *arguments.extra])} > {stem}.train.json && {scoring}"


def score_of(cell: Cell, arguments: argparse.Namespace) -> float | None:
    content = read(arguments.results / f"{cell.name}.eval.json")
    return None if content is None else float(content["value"])


def read(path: Path) -> dict[str, Any] | None:
    """A record, or None when its cell did not come so far."""
    if not path.exists() or not path.read_text(encoding="utf-8").strip():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def print_table(cells: list[Cell], arguments: argparse.Namespace) -> None:
    scores = {cell: score_of(cell, arguments) for cell in cells}
    titles = [f"{title:>9}" for title in ("mean", "- central", "- fedit", "up/bound")]
    print(f"\n{'arm':10} {'split':14} {'accuracy by seed':24} {' '.join(titles)} {'wall s':>7}")
    rows = []
    for arm, split in dict.fromkeys((cell.arm, cell.split) for cell in cells):
        own = [cell for cell in cells if (cell.arm, cell.split) == (arm, split)]
        row: dict[str, Any] = {"arm": arm, "split": split, "by_seed": {cell.seed: scores[cell] for cell in own}}
        row["mean"] = mean([scores[cell] for cell in own])
        row["minus_central"] = difference(scores, own, "central", "")
        row["minus_fedit"] = difference(scores, own, "fedit", split)
        records = [read(arguments.results / f"{cell.name}.train.json") for cell in own]
        row["up_of_bound"] = mean([share_of_bound(record) for record in records if record])
        row["wall_s"] = mean([record["wall_s"] for record in records if record])
        rows.append(row)
        by_seed = " ".join("-" if score is None else f"{100 * score:.2f}" for score in row["by_seed"].values())
        columns = [f"{percent(row[key]):>9}" for key in ("mean", "minus_central", "minus_fedit", "up_of_bound")]
        print(f"{arm:10} {split:14} {by_seed:24} {' '.join(columns)} {row['wall_s'] or 0:7.0f}")
    (arguments.results / "table.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print("all in percent; up/bound: bytes of all updates by 2 x rank x (in + out) over matrices, sites and rounds")
    print("differences: means over the seeds that both have, in points")


def difference(scores: dict[Cell, float | None], own: list[Cell], arm: str, split: str) -> float | None:
    """Mean over seeds of own score - that of another arm with the same seed."""
    pairs = [(scores[cell], scores.get(Cell(arm, split, cell.seed))) for cell in own if cell.arm != arm]
    return mean([one - other for one, other in pairs if one is not None and other is not None])


def share_of_bound(record: dict[str, Any]) -> float | None:
    """Bytes of all updates, headers and all, in units of 2 x r_k x (in + out) over matrices, sites and rounds."""
    if "sides" not in record:
        return None
    ranks = sum(site["rank"] for entry in record["rounds"] for site in entry["sites"])
    return float(record["bytes_up"]) / (2 * record["sides"] * ranks)


def mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(known) if known else None


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


if __name__ == "__main__":
    main()
