"""Do the engine's precisions train like autograd? IMDb on a small pretrained Llama, the same rows and seeds for all.

    python benchmarks/engine/curves.py --model ../shared/models/reader-16m --data ../shared/data/imdb \
        --output runs/curves --results benchmarks/results/engine-curves --gpus 4 --at-once 18

LoRA over bfloat16 and over NF4, each through autograd, through the engine, and through the engine with fp8 products:
one pass over 24,000 rows with --seeds seeds, the loss of 1,000 held-out training rows, the accuracy on 5,000 test rows.
Autograd in halves is the same mathematics as autograd, its sums rounded in another order: how far two such runs end
from each other is what no comparison can be finer than. Cells are processes beside each other, so their times are not
comparable; a cell whose record is there is not run again. The table comes last, `--table` prints it alone. `--try`
takes few rows and steps, on any machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from thriftune.report.statistics import t_quantile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from seats import start_shell, stop

WORDS = [
    *("max_length=512", "cut_prompt=start", "num_train_epochs=1", "per_device_train_batch_size=32"),
    *("gradient_accumulation_steps=1", "learning_rate=1e-3", "warmup_ratio=0.05", "lr_scheduler_type=linear"),
    *("eval_fraction=0.04", "max_eval_samples=1000", "save_strategy=no", "logging_steps=100", "optim=adamw_torch"),
]
FEW = ["max_samples=200", "max_steps=4", "max_length=128", "per_device_train_batch_size=4"]
HALVES = ["per_device_train_batch_size=16", "gradient_accumulation_steps=2"]
VARIANTS = {
    "lora, autograd": ["method=lora", "engine=off"],
    "lora, autograd in halves": ["method=lora", "engine=off", *HALVES],
    "lora, engine": ["method=lora"],
    "lora, engine, fp8": ["method=lora", "precision=fp8"],
    "qlora, autograd": ["method=qlora", "engine=off"],
    "qlora, autograd in halves": ["method=qlora", "engine=off", *HALVES],
    "qlora, engine": ["method=qlora"],
    "qlora, engine, fp8": ["method=qlora", "precision=fp8"],
}
STRETCH = 25  # steps, of which a curve keeps the mean loss
END = 10  # stretches, a third of a run, whose mean is its loss at the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--output", type=Path, default=Path("runs/curves"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--try", dest="few", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.results))
        return
    arguments.results.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * arguments.minutes
    cells = [(variant, seed) for seed in range(1, arguments.seeds + 1) for variant in VARIANTS]
    waiting = [cell for cell in cells if not record_of(*cell, arguments.results).exists()]
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    started = 0
    while (waiting or running) and time.monotonic() < ends:
        while waiting and len(running) < arguments.at_once:
            cell = waiting.pop(0)
            running[cell] = start(*cell, started, arguments)
            started += 1
        time.sleep(0.5)
        for cell, process in list(running.items()):
            if process.poll() is not None:
                del running[cell]
                if process.returncode:
                    print("failed:", *cell, "see", folder_of(*cell, arguments.output).with_suffix(".log"), flush=True)
                else:
                    keep(*cell, arguments)
    stop(running.values())
    print(table(arguments.results))


def name_of(variant: str, seed: int) -> str:
    return f"{variant.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def folder_of(variant: str, seed: int, output: Path) -> Path:
    return output / name_of(variant, seed)


def record_of(variant: str, seed: int, results: Path) -> Path:
    return results / f"{name_of(variant, seed)}.json"


def start(variant: str, seed: int, place: int, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Train, then score, in one shell; what they print goes to a log beside the run's folder."""
    folder = folder_of(variant, seed, arguments.output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = [*WORDS, *VARIANTS[variant], f"seed={seed}", f"data.path={arguments.data}"]
    words += FEW if arguments.few else []
    program = f"{sys.executable} -m thriftune"
    train = f"{program} train {arguments.model} --data imdb --output {folder} {' '.join(words)}"
    limit = 16 if arguments.few else 5000
    score = f"{program} eval {folder} --task imdb --data {arguments.data} --limit {limit} --json > {folder}.score.json"
    return start_shell(f"{train} && {score}", folder.with_suffix(".log"), place, arguments.gpus)


def keep(variant: str, seed: int, arguments: argparse.Namespace) -> None:
    folder = folder_of(variant, seed, arguments.output)
    run = json.loads((folder / "record.json").read_text())
    score = json.loads(Path(f"{folder}.score.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps]
    found = {
        "variant": variant,
        "seed": seed,
        **{key: run[key] for key in ("path", "path_reason", "steps", "tokens", "loss", "eval_loss", "command")},
        **{key: run[key] for key in ("hardware", "versions")},
        "accuracy": score["value"],
        "rows": score["rows"],
        "curve": [statistics.fmean(losses[first : first + STRETCH]) for first in range(0, len(losses), STRETCH)],
    }
    record_of(variant, seed, arguments.results).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table(results: Path) -> str:
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(results.glob("*-seed*.json")):
        record = json.loads(path.read_text())
        found.setdefault(record["variant"], {})[record["seed"]] = record
    lines = [
        "| variant | seeds | loss at the end | held-out loss | accuracy | at the end, against autograd | held out "
        "| accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant, records in sorted(found.items()):
        plain = found.get(f"{variant.split(',')[0]}, autograd", {})
        means = [statistics.fmean(measure(record) for record in records.values()) for measure in MEASURES]
        row = f"| {variant} | {len(records)} | {means[0]:.4f} | {means[1]:.4f} | {100 * means[2]:.2f} % |"
        for number, measure in enumerate(MEASURES):
            pairs = [(measure(records[seed]), measure(plain[seed])) for seed in sorted(set(records) & set(plain))]
            off = [100 * (one - other if number == 2 else one / other - 1) for one, other in pairs]
            unit = "points" if number == 2 else "%"
            row += " |" if records is plain else f" {mean_and_interval(off)} {unit} |"
        lines.append(row)
    return "\n".join(lines)


def loss_at_end(record: dict[str, Any]) -> float:
    return statistics.fmean(record["curve"][-END:])


MEASURES = (loss_at_end, lambda record: record["eval_loss"], lambda record: record["accuracy"])


def mean_and_interval(values: list[float]) -> str:
    """The mean over seeds, with its 95 % interval by Student's t where there are two."""
    if len(values) < 2:
        return f"{statistics.fmean(values):+.2f}" if values else "-"
    half = t_quantile(0.95, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):+.2f} +- {half:.2f}"


if __name__ == "__main__":
    main()
