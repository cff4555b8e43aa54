"""Folders of cells with the files that a comparison leaves, written through the records' own classes."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thriftune.evaluate.intervals import Z_95, wilson
from thriftune.recipe import Recipe, dump_yaml
from thriftune.records import (
    CellRecord,
    CutAnswers,
    DataAudit,
    EvalResult,
    Lengths,
    PlannedMethod,
    RunRecord,
    StepMetrics,
    write_record,
    write_text_atomically,
)

MIB = 2**20
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace", "runtime")


@dataclass(frozen=True)
class Made:
    """What a cell is to hold. `accuracy` None leaves the cell without a score."""

    method: str
    seed: int | None = None
    accuracy: float | None = 0.9
    variant: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    status: str = "done"
    reason: str = ""
    peak_mib: int = 1000
    train_s: float = 100.0
    gpu: str | None = "NVIDIA H200"
    planned: bool = True
    energy_j: float | None = 36_000.0
    general: float | None = 3.0
    steps: int = 60
    rows: int = 200
    answer: str = "positive"
    model: str = "/models/reader-16m"
    task: str = "imdb"
    recipe: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = "f" * 64
    perplexity: float | None = None
    at_once: int = 1
    sharing: int = 0


def write_cells(folder: Path, cells: Sequence[Made]) -> Path:
    """folder/cells/NAME for each; returns `folder`."""
    for made in cells:
        name = (made.variant or made.method).replace(" ", "-").replace("/", "_")
        seed = f"-seed{made.seed}" if made.seed is not None else ""
        write_cell(folder / "cells" / f"{name}{seed}", made)
    return folder


def write_cell(folder: Path, made: Made) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ran = made.method != "base" and made.status == "done"
    plan = planned(made) if made.planned and made.method != "base" else None
    if ran:
        run = run_record(made, plan)
        write_record(folder / "record.json", run)
        (folder / "recipe.yaml").write_text(dump_yaml(run.recipe), encoding="utf-8")
        lines = [step.model_dump_json() + "\n" for step in steps(made)]
        write_text_atomically(folder / "metrics.jsonl", "".join(lines))
    result = None
    if made.status == "done":
        answers = perplexity_rows(made) if made.perplexity is not None else answer_rows(made)
        name = f"eval-{made.task}.jsonl"
        write_text_atomically(folder / name, "".join(json.dumps(row) + "\n" for row in answers))
        result = eval_result(made, answers, f"/somewhere/else/{name}")
    general = None
    if made.general is not None and made.status == "done":
        general = EvalResult(
            task="general",
            metric="loss",
            value=made.general,
            low=made.general - 0.1,
            high=made.general + 0.1,
            rows=20,
            model=made.model,
        )
    record = CellRecord(
        status=made.status,  # type: ignore[arg-type]
        reason=made.reason,
        method=made.method,
        variant=made.variant or made.method,
        seed=made.seed,
        overrides=made.overrides,
        plan=plan,
        result=result,
        general=general,
        first_token_s=0.0123 if made.status == "done" else None,
        merged_first_token_s=0.0101 if ran and made.method != "full" else None,
        result_bytes=64 * MIB if made.method == "full" and ran else 3 * MIB + 4321 if ran else None,
        at_once=made.at_once,
        sharing=made.sharing,
    )
    write_record(folder / "cell.json", record)


def random_of(made: Made) -> random.Random:
    return random.Random(f"{made.method} {made.variant} {made.seed}")


def answer_rows(made: Made) -> list[dict[str, Any]]:
    """Rows differ in how hard they are, alike for every cell, so that cells agree on most of them."""
    chance, hardness = random_of(made), random.Random(7)
    right = round((made.accuracy or 0) * made.rows)
    hard = [hardness.random() for _ in range(made.rows)]
    ordered = sorted(range(made.rows), key=lambda row: hard[row] + 0.15 * chance.random())
    correct = set(ordered[:right])
    rows = []
    for row in range(made.rows):
        target = "positive" if row % 2 else "negative"
        other = "negative" if row % 2 else "positive"
        prediction = target if row in correct else other
        rows.append(
            {
                "row": row,
                "prompt": f"Review {row}: " + "a film that one may like or not, seen twice. " * (1 + row % 5),
                "answer": prediction if made.answer == "positive" else made.answer,
                "prediction": prediction,
                "target": target,
                "correct": row in correct,
            }
        )
    return rows


def perplexity_rows(made: Made) -> list[dict[str, Any]]:
    chance, windows = random_of(made), random.Random(7)
    middle = math.log(made.perplexity or 1)
    losses = [middle + 0.3 * (windows.random() - 0.5) + 0.01 * (chance.random() - 0.5) for _ in range(made.rows)]
    return [{"row": row, "tokens": 100, "loss": loss} for row, loss in enumerate(losses)]


def eval_result(made: Made, answers: Sequence[dict[str, Any]], name: str) -> EvalResult:
    if made.perplexity is not None:
        loss = sum(row["loss"] for row in answers) / len(answers)
        value, low, high, metric = math.exp(loss), math.exp(loss - 0.02), math.exp(loss + 0.02), "perplexity"
    else:
        right = sum(row["correct"] for row in answers)
        value, metric = right / len(answers), "accuracy"
        low, high = wilson(right, len(answers), Z_95)
    return EvalResult(
        task=made.task,
        metric=metric,
        value=value,
        low=low,
        high=high,
        rows=len(answers),
        model=made.model,
        adapter=None if made.method == "base" else "adapter",
        answers=name,
        details={"data": f"{made.task} test, {len(answers)} rows", "max_length": 256, "settings": {"batch_size": 32}},
        wall_s=12.0,
    )


def steps(made: Made) -> list[StepMetrics]:
    chance = random_of(made)
    tokens = random.Random(f"rows {made.seed}")
    seen, found = 0, []
    for step in range(1, made.steps + 1):
        count = tokens.randint(900, 1100)
        seen += count
        level = {"full": 0.19, "lora": 0.21, "qlora": 0.24}.get(made.method, 0.3)
        loss = level + 2.2 * math.exp(-6 * step / made.steps) + 0.05 * chance.gauss(0, 1)
        found.append(
            StepMetrics(
                step=step,
                epoch=step / made.steps,
                loss=max(0.01, loss),
                grad_norm=1.0,
                learning_rate=2e-4,
                targets=16,
                tokens=count,
                tokens_seen=seen,
                step_s=made.train_s / made.steps,
                tokens_per_s=1000.0,
                memory_bytes=made.peak_mib * MIB // 2,
                peak_bytes=made.peak_mib * MIB,
            )
        )
    return found


def planned(made: Made) -> PlannedMethod:
    shares = {"weights": 0.3, "adapter": 0.05, "gradients": 0.1, "optimizer": 0.15, "activations": 0.25, "logits": 0.1}
    memory = {part: round(shares.get(part, 0.025) * made.peak_mib * MIB) for part in PARTS}
    memory["runtime"] = 600 * MIB
    peak = sum(memory.values())
    return PlannedMethod(
        method=made.method,
        fits=made.status == "done",
        peak_bytes=peak,
        usable_bytes=140 * 1024 * MIB if made.status == "done" else peak // 2,
        allocated_bytes=peak - 640 * MIB,
        reserved_bytes=peak - 600 * MIB,
        memory=memory,
        trainable_parameters=trained(made),
        total_parameters=15_735_168,
        tokens_per_s=10_000.0 if made.gpu else 0.0,
        step_s=1.0 if made.gpu else 0.0,
        run_s=made.train_s * 0.9 if made.gpu else 0.0,
        cost_usd={"electricity at home": 0.001} if made.gpu else {},
        limited_by="compute",
        settings={"num_train_epochs": 1.0},
    )


def trained(made: Made) -> int:
    return 15_735_168 if made.method == "full" else 868_352


def run_record(made: Made, plan: PlannedMethod | None) -> RunRecord:
    values: dict[str, Any] = {"model": made.model, "data": "imdb", "method": made.method, "seed": made.seed or 0}
    recipe = Recipe.build({**values, **made.recipe}, source="the test")
    hardware: dict[str, Any] = {"device": "cpu", "platform": "Linux", "cpu_count": 2, "torch_threads": 1}
    if made.gpu:
        hardware |= {"device": "cuda:0", "gpu": made.gpu, "gpu_memory_bytes": 150_000_000_000}
    seen = sum(step.tokens for step in steps(made))
    return RunRecord(
        status="done",
        method=made.method,
        path="generic",
        path_reason="no other",
        model=made.model,
        trainable_parameters=trained(made),
        total_parameters=15_735_168,
        steps=made.steps,
        epochs=1.0,
        loss=0.25,
        tokens=seen,
        tokens_per_s=seen / made.train_s,
        peak_bytes=made.peak_mib * MIB,
        energy_j=made.energy_j if made.gpu else None,
        wall_s=made.train_s + 5,
        train_s=made.train_s,
        load_s=1.0,
        adapter="adapter",
        data=audit(made),
        plan=plan,
        reserved_bytes=round(1.1 * made.peak_mib) * MIB if made.gpu else 0,
        recipe=recipe,
        hardware=hardware,
        versions={"python": "3.11.7", "thriftune": "0.1.0", "torch": "2.13.0"},
        command=f"thriftune train {made.model} --data imdb --method {made.method} seed={made.seed}",
        started="2026-11-24T04:00:00+00:00",
    )


def audit(made: Made) -> DataAudit:
    return DataAudit(
        source="imdb train, 25,000 rows",
        shape="imdb",
        rendering="plain text",
        rows_read=1000,
        rows_used=960,
        rows_dropped={},
        token_lengths=Lengths(median=200, p95=256, max=256),
        max_length=256,
        tokens=60_000,
        trained_tokens=960,
        trained_share=0.016,
        rows_without_trained_token=0,
        prompts_cut=300,
        answers_cut=CutAnswers(rows=0, share=0.0, tokens_lost_mean=0.0),
        eos_trained=True,
        eos_token="<|end|>",
        bos_doubled=False,
        duplicate_rows=0,
        rows_shared_with_eval=0,
        eval_rows=0,
        fingerprint=made.fingerprint,
    )


def usual(seeds: Sequence[int] = (1, 2, 3), rows: int = 600, gpu: str | None = "NVIDIA H200") -> list[Made]:
    """Base, full, lora and qlora: full and lora alike, qlora a little worse, lighter and slower."""
    made = [Made("base", accuracy=0.55, rows=rows, gpu=gpu)]
    for number, seed in enumerate(seeds):
        shift = (0.0, 0.004, -0.003)[number % 3]
        made += [
            Made("full", seed, 0.930 + shift, peak_mib=1000, train_s=130 + number, rows=rows, gpu=gpu, general=3.4),
            Made("lora", seed, 0.930 - shift, peak_mib=810, train_s=100 + number, rows=rows, gpu=gpu, general=3.1),
            Made("qlora", seed, 0.870 + shift, peak_mib=560, train_s=160 + number, rows=rows, gpu=gpu, general=3.2),
        ]
    return made
