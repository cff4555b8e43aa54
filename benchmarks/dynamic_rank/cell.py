"""One cell of the comparison: train one arm on one task with one rate and seed, score it, write one JSON record.

Called by run.py:  python cell.py '{"task": ..., "arm": ..., "rate": ..., "seed": ..., "phase": ...}' SETTINGS.json

IMDb is scored by accuracy on the test reviews (label likelihood). The generative task is GSM8K, scored by the loss on
the answers of its test rows: a model of 16 M parameters gets no problem right, so its exact-match score would be zero
for every arm, while the loss on the whole worked answers is what such a model can be told apart by.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adalora import AdaLora, AdaLoraPath, allocating, directions_left
from torch.nn import functional

from thriftune.data import Example, micro_batches
from thriftune.errors import NonFiniteLossError
from thriftune.evaluate import evaluate
from thriftune.machine import quiet_libraries
from thriftune.methods import trainable_parameters
from thriftune.models import load_model
from thriftune.models.surgery import enable_checkpointing
from thriftune.recipe import Recipe, read_recipe
from thriftune.run import Prepared, prepare_run, run
from thriftune.shrinking import shrink
from thriftune.target import find_target, open_target
from thriftune.train import Observers, StopRequest, TrainJob, train
from thriftune.train.distributed import Processes
from thriftune.train.job import generic_path
from thriftune.train.recover import Recovery

FIRST_CUT, LAST_CUT = 0.1, 0.5
SCALE = 1.0  # alpha / r of every arm, at its start
COMMON = [
    *("max_length=512", "cut_prompt=start", "num_train_epochs=1", "gradient_accumulation_steps=1"),
    *("save_strategy=no", "warmup_ratio=0.05", "lr_scheduler_type=linear"),
    *("weight_decay=0.0", "generation.batch_size=256"),
]


@dataclass(frozen=True)
class Spec:
    """What the cell is: `phase` is search (a rate judged on held-out training rows) or final (scored on test rows)."""

    task: str
    arm: str
    rate: float
    seed: int
    phase: str

    @property
    def name(self) -> str:
        return f"{self.phase}-{self.task}-{self.arm}-{self.rate:g}-seed{self.seed}"


def arm_words(arm: str, rank: int, keep: float, round_to: int) -> list[str]:
    half = max(1, round(rank * keep))
    if arm in ("dynamic", "random"):
        score = "energy" if arm == "dynamic" else "random"
        cuts = [f"dynamic.first_cut={FIRST_CUT}", f"dynamic.last_cut={LAST_CUT}", f"dynamic.round_to={round_to}"]
        start = [f"dynamic.r_start={rank}", f"dynamic.keep={keep}", f"dynamic.score={score}"]
        return ["method=dynamic", f"lora.alpha={SCALE * rank}", *start, *cuts]
    own = half if arm == "lora-half" else rank
    return ["method=lora", f"lora.r={own}", f"lora.alpha={SCALE * own}"]


def recipe_of(spec: Spec, settings: dict[str, Any], output: Path) -> Recipe:
    rows = settings["search_rows"] if spec.phase == "search" else settings["train_rows"]
    words = [
        *COMMON,
        *arm_words(spec.arm, settings["rank"], settings["keep"], settings["round_to"]),
        *(f"learning_rate={spec.rate}", f"seed={spec.seed}", f"max_samples={rows}"),
        *(f"data.path={settings['data']}/{spec.task}", f"per_device_train_batch_size={settings['rows_a_step']}"),
    ]
    if spec.phase == "search":
        judged = settings["judged_rows"]
        words += [f"eval_fraction={judged / rows}", "eval_strategy=epoch", f"max_eval_samples={judged}"]
    elif spec.task == "gsm8k":
        words += ["eval_split=test", "eval_strategy=no", f"max_eval_samples={settings['test_rows']}"]
    values = {"model": settings["model"], "data": spec.task, "output": str(output)}
    return read_recipe(None, words, values)


def losses_of_rows(model: Any, examples: list[Example], device: torch.device) -> list[float]:
    """Mean loss over each example's target tokens, in the order of `micro_batches`: longest first."""
    found: list[float] = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for batch in micro_batches(examples, 64):
            batch = batch.to(device)
            logits_BTV = model(input_ids=batch.tokens_BT, attention_mask=batch.mask_BT).logits[:, :-1].float()
            labels_BT = batch.labels_BT[:, 1:]
            losses_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="none")
            found += (losses_BT.sum(1) / (labels_BT != -100).sum(1)).tolist()
    return found


def score(spec: Spec, settings: dict[str, Any], prepared: Prepared, model: Any, tokenizer: Any) -> list[float]:
    """One value a test row: 1 or 0 for a review, the loss for a worked answer."""
    model.eval()
    if spec.task == "gsm8k":
        return [round(value, 5) for value in losses_of_rows(model, prepared.data.eval, prepared.device)]
    answers = Path(prepared.recipe.output or "") / f"{spec.arm}.answers.jsonl"
    answers.parent.mkdir(parents=True, exist_ok=True)
    evaluate(
        "imdb",
        model,
        tokenizer,
        data=prepared.recipe.data,
        settings=prepared.recipe.generation,
        limit=settings["test_rows"],
        split="test",
        answers_path=answers,
        model_name=settings["model"],
        adapter_name=None,
        on_progress=lambda progress: None,
    )
    # Only \n separates answers: str.splitlines would also break at a U+0085 inside a review.
    with answers.open(encoding="utf-8") as file:
        return [float(json.loads(line)["correct"]) for line in file]


def train_adalora(spec: Spec, settings: dict[str, Any], prepared: Prepared) -> tuple[Any, Any, dict[str, Any]]:
    """The trained model, its tokenizer, and what the record says of it."""
    recipe, device = prepared.recipe, prepared.device
    loaded = load_model(recipe.model, device=device, dtype=prepared.dtype, quant=None)
    rows = -(-len(prepared.data.train) // recipe.train.per_device_train_batch_size)
    rank = settings["rank"]
    method = AdaLora(rows, rank, max(1, round(settings["keep"] * rank)), SCALE * rank, FIRST_CUT, LAST_CUT)
    model: Any = method.attach(loaded, recipe)
    job = TrainJob(
        model=model,
        method=method,
        recipe=recipe,
        train_examples=prepared.data.train,
        place_of=prepared.data.place_of,
        eval_examples=prepared.data.eval,
        processes=Processes(0, 1, device),
        output=Path(recipe.output or ""),
        autocast_dtype=torch.bfloat16 if loaded.base_dtype == torch.bfloat16 else None,
        enable_checkpointing=partial(enable_checkpointing, loaded.model),
        checkpointing=False,
        identity={},
        resume_command="",
    )
    assert job.order.steps == rows, "AdaLoRA must know the number of steps"
    plain = generic_path(job)
    path = AdaLoraPath(**{**vars(plain), "recovery": Recovery(plain.most_rows, False, None)})
    object.__setattr__(job, "path", path)
    before = sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_E." in name)
    with job.product_types(), allocating(model):
        outcome = train(job, Observers([]), StopRequest())
    left = directions_left(model)
    told = {
        "parameters": trainable_parameters(model),
        "directions": [before, left],
        "train_s": outcome.train_s,
        "peak_bytes": outcome.peak_bytes,
        "eval_loss": outcome.eval_loss,
        "loss": outcome.loss,
    }
    return model, loaded.tokenizer, told


def train_arm(spec: Spec, prepared: Prepared) -> dict[str, Any]:
    record = run(prepared, observers=[], command="benchmarks/dynamic_rank/cell.py", resume_command="")
    return {
        "parameters": record.trainable_parameters,
        "train_s": record.train_s,
        "peak_bytes": record.peak_bytes,
        "eval_loss": record.eval_loss,
        "loss": record.loss,
        "path": record.path,
        "cuts": [cut.model_dump() for cut in record.cuts],
        "versions": record.versions,
        "hardware": record.hardware,
    }


def records_of(spec: Spec, settings: dict[str, Any], prepared: Prepared, output: Path) -> list[dict[str, Any]]:
    """The cell's record; of a finished `lora` that of the same adapter shrunk as well."""
    if spec.arm == "adalora":
        model, tokenizer, told = train_adalora(spec, settings, prepared)
        rows = score(spec, settings, prepared, model, tokenizer) if spec.phase == "final" else []
        return [{**vars(spec), **told, "rows": rows}]
    told = train_arm(spec, prepared)
    if spec.phase == "search":
        return [{**vars(spec), **told, "rows": []}]
    targets, shrunk, records = {spec.arm: output}, {}, []
    if spec.arm == "lora":
        targets["shrunk"] = output / "smaller"
        shrunk = shrink(str(output), targets["shrunk"], settings["keep"], settings["round_to"])
    for arm, target in targets.items():
        opened = open_target(find_target(str(target)), prepared.device)
        more = {"arm": arm, "rows": score(spec, settings, prepared, opened.model, opened.tokenizer)}
        if arm == "shrunk":
            more |= {"parameters": shrunk["parameters_after"], "kept_energy": shrunk["kept_energy"], "cuts": []}
        records.append({**vars(spec), **told, **more})
    return records


def main() -> None:
    quiet_libraries()
    started = time.perf_counter()
    spec = Spec(**json.loads(sys.argv[1]))
    settings = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    output = Path(settings["output"]) / spec.name
    shutil.rmtree(output, ignore_errors=True)  # of a process that was stopped
    prepared = prepare_run(recipe_of(spec, settings, output))
    try:
        records = records_of(spec, settings, prepared, output)
    except NonFiniteLossError as error:
        if spec.phase == "final":
            raise
        records = [{**vars(spec), "eval_loss": None, "broke_off": error.given, "rows": []}]  # too high a rate
    for record in records:
        record["wall_s"] = time.perf_counter() - started
        name = Spec(**{key: record[key] for key in vars(spec)}).name
        path = Path(settings["results"]) / f"{name}.json"
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(record), encoding="utf-8")
        aside.rename(path)


if __name__ == "__main__":
    main()
