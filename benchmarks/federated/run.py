"""IMDb over 8 sites that are not alike, ranks 4, 8 and 16, a 4-bit base, beside training on all rows in one place.

    python benchmarks/federated/run.py --model ../shared/models/reader-16m --data ../shared/data/imdb \
        --output runs/federated --results benchmarks/results/federated-imdb --gpus 4 --at-once 19

Arms: `central` is `thriftune train` on all rows, as many examples as all sites together see; `svd` and `fedit` are
federations of mixed ranks; `svd-equal`, `rolora` and `ffa` (not run unless named with --arms) have rank 16 at all
sites. Splits: Dirichlet 0.3 over the labels, and by rating. Every arm has its own learning rate on each split: that of
the least loss on EVAL_ROWS training rows held out, with a seed that no final cell has, of those in RATES and of up to
two more where the best is at an edge (rates.py). Then --seeds are trained on all rows and score all test rows.

Every cell is a process of its own and, when it is trained, a second one that scores; cells share the GPUs in turn, so
their times are not to be compared. A cell whose score is there already is not run again, and one that is trained, in
--output, is only scored. After --minutes no process is left running and the table of what there is comes last; the
records go to --results.

For a trial: --seeds 1 --arms central,svd --splits dirichlet:0.3 --limit 40 --rounds 2 --local-steps 2 --rates 1e-3
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rates import Search, search_of
from seats import start_shell, stop

SITES = 8
COMMON = [
    *("max_length=512", "cut_prompt=start", "logging_steps=100", "save_strategy=no", "warmup_ratio=0.05"),
    *("lr_scheduler_type=linear", "lora.r=16", "lora.alpha=32", "per_device_train_batch_size=32"),
    "gradient_accumulation_steps=1",
]
MIXED = "4,8,16"
STRETCH = 10  # rounds
# A federation makes an eighth of the steps one after the other, and wants a higher rate. These are where a search
# begins, wide enough that few have to go on.
CENTRAL_RATES, RATES = "5e-4,1e-3,2e-3", "1e-3,2e-3,4e-3,8e-3"
SEARCH_SEED, TRAIN_ROWS, EVAL_ROWS = 1000, 25_000, 1_000
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
    """`is_final`: scored on the test rows; otherwise a rate is judged on held-out training rows."""

    arm: str
    split: str
    rate: float
    seed: int
    is_final: bool = True

    @property
    def name(self) -> str:
        return f"{name_of('final' if self.is_final else 'search', self.arm, self.split)}-{self.rate:g}-seed{self.seed}"


def name_of(phase: str, arm: str, split: str) -> str:
    return "-".join([phase, arm, *([split.replace(":", "_")] if split else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--arms", default="central,svd,fedit")
    parser.add_argument("--splits", default="dirichlet:0.3,by:rating")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--local-steps", type=int, default=2)
    parser.add_argument("--rates", help="learning rates that every arm's search begins with, instead of RATES")
    parser.add_argument("--method", default="qlora")
    parser.add_argument("--gpus", type=int, default=0, help="0: on the CPU")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--limit", type=int, help="score so many test rows only (for a trial)")
    parser.add_argument("--extra", nargs="*", default=[], help="further key=value words for every cell")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = run_all(arguments)
    print_table(arguments)
    if failed:
        sys.exit(f"failed: {', '.join(cell.name for cell in failed)}")


def arms_and_splits(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    splits = arguments.splits.split(",")
    return [(arm, split) for arm in arguments.arms.split(",") for split in ([""] if ARMS[arm] is None else splits)]


def search(arm: str, split: str, arguments: argparse.Namespace) -> Search:
    """Of the records that are there."""
    losses = {}
    stem = name_of("search", arm, split)
    for path in arguments.results.glob(f"{stem}-*-seed{SEARCH_SEED}.train.json"):
        rate = float(path.name.removeprefix(f"{stem}-").removesuffix(f"-seed{SEARCH_SEED}.train.json"))
        record = read(path)
        losses[rate] = None if record is None else loss_of(record)  # empty: training broke off
    rates = arguments.rates or (CENTRAL_RATES if ARMS[arm] is None else RATES)
    return search_of(losses, [float(rate) for rate in rates.split(",")])


def loss_of(record: dict[str, Any]) -> float | None:
    """On the held-out rows, at the end of training."""
    loss = shortened(record)["eval_loss"]
    return None if loss is None else float(loss)


def shorten(path: Path) -> None:
    """Write a training's record again without what each site did in each round: half a megabyte a cell."""
    record = read(path)
    if record is not None:
        path.write_text(json.dumps(shortened(record), indent=1) + "\n", encoding="utf-8")


def shortened(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a federation with STRETCH rounds as one, and sums of what the table needs of each site and round.
    Other records, and those that are short, stay as they are."""
    if not isinstance(record.get("rounds"), list):
        return record
    rounds = record["rounds"]
    stretches = [rounds[first : first + STRETCH] for first in range(0, len(rounds), STRETCH)]
    sums = {
        "rounds": len(rounds),
        "eval_loss": rounds[-1]["eval_loss"],
        "ranks_sent": sum(site["rank"] for entry in rounds for site in entry["sites"]),
        "updates_taken": sum(entry["updates"] for entry in rounds),
        "loss_by_stretch": [loss_of_sites([site for entry in part for site in entry["sites"]]) for part in stretches],
        "energy_kept_least": min((entry["energy_kept"] for entry in rounds if entry["energy_kept"]), default=None),
    }
    return record | sums


def loss_of_sites(sites: list[dict[str, Any]]) -> float:
    """Mean over their target tokens."""
    return sum(site["loss"] * site["targets"] for site in sites) / sum(site["targets"] for site in sites)


def wanted(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Every cell that can run now and is not done: final ones first, whose rate is found; seed by seed, so that a run
    that is cut short has whole seeds."""
    searches = {pair: search(*pair, arguments) for pair in arms_and_splits(arguments)}
    for seed in range(1, arguments.seeds + 1):
        for (arm, split), found in searches.items():
            if not found.missing and found.best is not None:
                cell = Cell(arm, split, found.best, seed)
                if score_of(cell, arguments) is None:
                    yield cell
    for (arm, split), found in searches.items():
        for rate in found.missing:
            yield Cell(arm, split, rate, SEARCH_SEED, is_final=False)


def run_all(arguments: argparse.Namespace) -> list[Cell]:
    """Run until all is done or the time is over; the cells that failed. What a cell prints goes to OUTPUT/NAME.log."""
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    failed: list[Cell] = []
    started, place = time.perf_counter(), 0
    try:
        while time.perf_counter() - started < 60 * arguments.minutes:
            for cell, process in list(running.items()):
                if process.poll() is not None:
                    del running[cell]
                    shorten(arguments.results / f"{cell.name}.train.json")
                    failed += [cell] if process.returncode else []
                    state = "failed" if process.returncode else "done"
                    print(f"{time.perf_counter() - started:6.0f} s  {cell.name} {state}", flush=True)
            waiting = [cell for cell in wanted(arguments) if cell not in failed and cell not in running]
            if not waiting and not running:
                break
            for cell in waiting[: arguments.at_once - len(running)]:
                log = arguments.output / f"{cell.name}.log"
                running[cell] = start_shell(command_of(cell, arguments), log, place, arguments.gpus)
                place += 1
            time.sleep(0.5)
    finally:
        stop(running.values())
    return failed


def command_of(cell: Cell, arguments: argparse.Namespace) -> str:
    """The shell line of one cell: train, and score all test rows or judge the rate on held-out ones."""
    program = [sys.executable, "-m", "thriftune"]
    folder = arguments.output / cell.name
    words = [
        *(arguments.model, "--data", "imdb", "--method", arguments.method, "--output", str(folder), "--json"),
        *COMMON,
        *(f"data.path={arguments.data}", f"seed={cell.seed}", f"learning_rate={cell.rate:g}"),
    ]
    arm = ARMS[cell.arm]
    steps = arguments.rounds * arguments.local_steps * (SITES if arm is None else 1)
    if not cell.is_final:
        words += [f"eval_fraction={EVAL_ROWS / TRAIN_ROWS}", f"max_eval_samples={EVAL_ROWS}"]
        words += ["eval_strategy=steps", f"eval_steps={steps}"]
    if arm is None:
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
    scoring = into(score, f"{stem}.eval.json")
    if folder.is_dir() and read(Path(f"{stem}.train.json")) is not None:
        return scoring
    # From nothing: a simulation that goes on in its folder begins its sites' moments anew, which is another experiment.
    training = f"rm -rf {shlex.quote(str(folder))} && {into([*train, *arguments.extra], f'{stem}.train.json')}"
    if cell.is_final:
        return f"{training} && {scoring}"
    return f"{training} || {{ : > {stem}.train.json; false; }}"


def into(command: list[str], path: str) -> str:
    """A shell line that makes a file of what a command prints when it has ended well; others read it meanwhile."""
    return f"{shlex.join(command)} > {path}.part && mv {path}.part {path}"


def score_of(cell: Cell, arguments: argparse.Namespace) -> float | None:
    content = read(arguments.results / f"{cell.name}.eval.json")
    return None if content is None else float(content["value"])


def read(path: Path) -> dict[str, Any] | None:
    """A record, or None when its cell did not come so far."""
    if not path.exists() or not path.read_text(encoding="utf-8").strip():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def print_table(arguments: argparse.Namespace) -> None:
    pairs = arms_and_splits(arguments)
    searches = {pair: search(*pair, arguments) for pair in pairs}
    scores = {pair: by_seed(*pair, searches[pair].best, arguments) for pair in pairs}
    titles = [f"{title:>9}" for title in ("mean", "- central", "- fedit", "up/bound")]
    print(f"\n{'arm':10} {'split':14} {'rate':>8} {'accuracy by seed':24} {' '.join(titles)} {'wall s':>7}")
    rows = []
    for arm, split in pairs:
        found, own = searches[arm, split], scores[arm, split]
        row: dict[str, Any] = {"arm": arm, "split": split, "rate": found.best, "rate_at_edge": found.at_edge}
        row |= {"search_ended": not found.missing, "by_seed": own, "mean": mean(list(own.values()))}
        row["minus_central"] = None if arm == "central" else difference(own, scores.get(("central", ""), {}))
        row["minus_fedit"] = None if arm == "fedit" else difference(own, scores.get(("fedit", split), {}))
        cells = [Cell(arm, split, found.best or 0.0, seed) for seed in own]
        records = [read(arguments.results / f"{cell.name}.train.json") for cell in cells]
        row["up_of_bound"] = mean([share_of_bound(record) for record in records if record])
        row["wall_s"] = mean([record["wall_s"] for record in records if record])
        rows.append(row)
        line = " ".join("-" if score is None else f"{100 * score:.2f}" for score in own.values())
        columns = [f"{percent(row[key]):>9}" for key in ("mean", "minus_central", "minus_fedit", "up_of_bound")]
        mark = "?" if found.missing else "!" if found.at_edge else " "
        rate = f"{found.best or 0:7g}{mark}"
        print(f"{arm:10} {split:14} {rate} {line:24} {' '.join(columns)} {row['wall_s'] or 0:7.0f}")
    (arguments.results / "table.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print("all in percent; up/bound: bytes of all updates by 2 x rank x (in + out) over matrices, sites and rounds")
    print("differences: means over the seeds that both have, in points")
    print("rate!: the best of those tried, at their edge; rate?: its search has not ended")


def by_seed(arm: str, split: str, rate: float | None, arguments: argparse.Namespace) -> dict[int, float | None]:
    seeds = range(1, arguments.seeds + 1)
    return {seed: None if rate is None else score_of(Cell(arm, split, rate, seed), arguments) for seed in seeds}


def difference(own: dict[int, float | None], other: dict[int, float | None]) -> float | None:
    """Mean over the seeds that both have."""
    pairs = [(one, other.get(seed)) for seed, one in own.items()]
    return mean([one - another for one, another in pairs if one is not None and another is not None])


def share_of_bound(record: dict[str, Any]) -> float | None:
    """Bytes of all updates, headers and all, in units of 2 x r_k x (in + out) over matrices, sites and rounds."""
    if "sides" not in record:
        return None
    return float(record["bytes_up"]) / (2 * record["sides"] * shortened(record)["ranks_sent"])


def mean(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(known) if known else None


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


if __name__ == "__main__":
    main()
