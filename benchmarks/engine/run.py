"""The engine beside its peers on one GPU, in turn: tokens/s without padding, peak memory, seconds of the first step.

    python benchmarks/engine/run.py --results benchmarks/results/engine --lengths ../shared/bench/gsm8k_lengths.txt \
        --peers-script ../shared/bench/peers.py --peers-70b-script ../shared/bench/peer70b.py [--rows lora,lora-tight]

Llama shapes with random weights, LoRA r=16 on all linears. Each row is ours (ours.py) and the peers that the row names,
each in a process of its own, one after the other on the same GPU. A peers' script takes --method, --batch, --seq,
--accum, --ckpt (0 none, 1 full, 2 Unsloth's own), --lengths and prints a line `RESULT {json}`; without one only ours
run. What has a record already is not run again; no run is started after --minutes. The table comes last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rows_compared import GSM8K, ROWS

from thriftune.machine import hardware, versions

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--peers-script")
    parser.add_argument("--peers-70b-script")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--layers", help="models cut short, to try the script")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * arguments.minutes
    for name in arguments.rows.split(","):
        row = ROWS[name]
        cut = ["--layers", arguments.layers] if arguments.layers else []
        ours = [str(HERE / "ours.py"), *row.ours, "--lengths", str(arguments.lengths), *cut]
        run(f"{name}.thriftune", ours, ends, arguments.results)
        for index, (_, script, words) in enumerate(row.peers):
            if script == "70b" and arguments.peers_70b_script:
                run(f"{name}.peer{index}", [arguments.peers_70b_script, *words], ends, arguments.results)
            elif script != "70b" and arguments.peers_script:
                lengths = ["--lengths", str(arguments.lengths)] if words[-len(GSM8K) :] == GSM8K else []
                command = [arguments.peers_script, script, *words, *lengths]
                run(f"{name}.peer{index}", command, ends, arguments.results)
    print_table(arguments.results)


def run(name: str, words: list[str], ends: float, results: Path) -> None:
    place = results / f"{name}.json"
    if place.exists() or time.monotonic() > ends:
        return
    started = time.monotonic()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        print(name, "failed:", done.stdout[-800:], done.stderr[-1500:], file=sys.stderr, flush=True)
        return
    record: dict[str, Any] = json.loads(found[-1].removeprefix("RESULT "))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    record |= {"command": words, "wall_s": round(time.monotonic() - started, 1)}
    record |= {"hardware": hardware(device), "versions": versions()}
    place.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(name, {key: record.get(key) for key in ("tokens_per_s", "tok_s", "peak_gib", "first_step_s", "first_s")},
          flush=True)  # fmt: skip


def print_table(results: Path) -> None:
    print("| work | who | tokens/s | peak GiB | first step, s | must | aim |\n|---|---|---|---|---|---|---|")
    for name, row in ROWS.items():
        for who, file in [("thriftune", "thriftune"), *((who, f"peer{i}") for i, (who, _, _) in enumerate(row.peers))]:
            place = results / f"{name}.{file}.json"
            if not place.exists():
                continue
            record = json.loads(place.read_text())
            speed = record.get("tokens_per_s") or record.get("tok_s")
            first = record.get("first_step_s") or record.get("first_s") or float("nan")
            gates = f"{row.must:,} | {row.aim:,}" if file == "thriftune" else " | "
            print(f"| {row.title} | {who} | {speed:,} | {record['peak_gib']} | {first} | {gates} |")


if __name__ == "__main__":
    main()
