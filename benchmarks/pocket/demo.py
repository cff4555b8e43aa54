"""The pocket comparison twice with one seed: seconds, scores, and whether both tables are the same.

    OMP_NUM_THREADS=1 python benchmarks/pocket/demo.py --results benchmarks/results/pocket/demo.json

Wall seconds are those of a machine that others may use at the same time; processor seconds are its own processes'.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from thriftune.machine import hardware, versions
from thriftune.records import ReportRecord, read_record, write_text_atomically

POLL_S = 0.2
UNTIMED = ("parameters", "share", "bytes", "nats a token")  # units of rows that a second run has to repeat
MEASURED_MEMORY = "peak_measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="the record to write")
    parser.add_argument("--limit", type=int, help="score so many rows only (for a trial)")
    arguments = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory() as aside:
        runs = [timed(Path(aside) / name, arguments.limit) for name in ("first", "second")]
    tables = [run.pop("table") for run in runs]
    record = {
        "command": "thriftune demo",
        "runs": runs,
        "same_table": tables[0] == tables[1],
        "compared_rows": sorted({row["key"] for row in tables[0]}),
        "scores": {row["key"]: row["texts"] for row in tables[0] if row["key"] in ("score", "interval")},
        "processors": os.cpu_count(),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
    }
    write_text_atomically(arguments.results, json.dumps(record, indent=2) + "\n")
    for run in runs:
        print(f"{run['wall_s']:.0f} s by the clock, {run['processor_s']:.0f} s of a processor; {run['verdict']}")
    print(f"the same table twice: {record['same_table']}; {record['scores']}")


def timed(folder: Path, limit: int | None) -> dict[str, Any]:
    """One demo: its seconds, its verdict, and the rows of its table that hold no times."""
    started = time.perf_counter()
    words = ["--limit", str(limit)] if limit else []
    process = subprocess.Popen(
        [sys.executable, "-m", "thriftune", "demo", "--output", str(folder), "--json", *words],
        stdout=subprocess.DEVNULL,
    )
    busy_s = processor_s(process)
    if process.returncode:
        sys.exit(f"the demo ended with exit code {process.returncode}")
    wall_s = time.perf_counter() - started
    report = read_record(folder / "report.json", ReportRecord)
    table = [
        {"key": row.key, "texts": [value.text for value in row.values], "means": [value.mean for value in row.values]}
        for row in report.table
        if row.unit in UNTIMED and row.key != MEASURED_MEMORY
    ]
    cells = {cell.name: {"value": cell.value, "low": cell.low, "high": cell.high} for cell in report.cells}
    return {"wall_s": wall_s, "processor_s": busy_s, "verdict": report.verdict, "cells": cells, "table": table}


def processor_s(process: subprocess.Popen[bytes]) -> float:
    """Processor seconds of a process and all that came from it, looked at until it ends."""
    used: dict[tuple[int, float], float] = {}
    main = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for member in family:
            try:
                times = member.cpu_times()
                used[member.pid, member.create_time()] = times.user + times.system
            except psutil.NoSuchProcess:
                continue
        time.sleep(POLL_S)
    process.wait()
    return sum(used.values())


if __name__ == "__main__":
    main()
