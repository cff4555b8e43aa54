"""A run from its recipe to its record, top to bottom; and a run's folder opened again for use."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from thriftune.data import PreparedData, prepare
from thriftune.engine.choose import warm_up
from thriftune.errors import DiskFullError, OutputError, StoppedBySignal, ThriftuneError
from thriftune.machine import choose_device, hardware, quiet_libraries, versions
from thriftune.methods import METHODS, Method, trainable_parameters
from thriftune.model_files import read_config
from thriftune.models import LoadedModel, describe_model, load_tokenizer
from thriftune.models.load import ModelDescription, choose_dtype
from thriftune.models.surgery import count_parameters, enable_checkpointing
from thriftune.plan.search import Device
from thriftune.plan.work import Rows
from thriftune.planning import RunPlan, cpu_device, own_gpu, plan_run, refuse_other_plans, refuse_too_long, unknown_gpu
from thriftune.recipe import Recipe, dump_yaml
from thriftune.records import RunRecord, write_record, write_text_atomically
from thriftune.run_path import hold_memory, let_go_after, load_base, offload_record, paged_bytes, with_path
from thriftune.train import Observer, Observers, StopRequest, TrainJob, TrainOutcome, train
from thriftune.train.checkpoint import is_disk_full, last_good, newest_checkpoint
from thriftune.train.distributed import Processes
from thriftune.train.observe import MetricsFile
from thriftune.train.trackers import Trackers, start_processes

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Prepared:
    """All that is known before anything is spent: files checked, data audited, the run planned, output chosen."""

    recipe: Recipe
    description: ModelDescription
    data: PreparedData
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    planned: RunPlan


def prepare_run(recipe: Recipe, *, force: bool = False) -> Prepared:
    """Check the model's files, read and audit the data, plan, choose the output. Loads no weights, writes nothing.

    Raises DoesNotFitError when the plan needs more memory than is free, unless `force`.
    """
    quiet_libraries()
    device = choose_device()
    place = run_place(device)
    description = describe_model(recipe.model)
    dtype = choose_dtype(recipe.model, device)
    tokenizer = load_tokenizer(recipe.model, description.folder)
    data = prepare(recipe, tokenizer)
    refuse_too_long(data.audit.token_lengths.max, description.max_positions, recipe.model.name)
    rows = Rows(
        tokens=[len(example) for example in data.train],
        targets=[example.num_targets for example in data.train],
        count=len(data.train),
        source=f"{data.train_rows.description}, every row",
    )
    planned = plan_run(recipe, rows, description.folder, place, force)
    resolved = _with_whole_paths(recipe).resolved(planned.method, _output_folder(recipe, planned.method))
    sizes = {
        "per_device_train_batch_size": planned.rows_at_once,
        "gradient_accumulation_steps": planned.accumulation,
        "optim": planned.optimizer,
    }
    resolved = resolved.model_copy(update={"train": resolved.train.model_copy(update=sizes)})
    return Prepared(resolved, description, data, tokenizer, device, dtype, planned)


def run_place(device: torch.device) -> Device:
    """The GPUs or the memory that the run is planned for. The driver is asked first: a context takes memory itself.

    Of several processes each plans for the fullest GPU of its machine, so that all come to the same settings.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type != "cuda":
        return cpu_device(count)
    beside = int(os.environ.get("LOCAL_WORLD_SIZE") or torch.cuda.device_count())
    place = own_gpu(range(beside) if count > 1 else [device.index], count)
    if place is None:
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        place = unknown_gpu(torch.cuda.get_device_name(device), total_bytes, free_bytes, count)
    if not torch.cuda.is_initialized():
        return place
    spare_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return replace(place, usable_bytes=place.usable_bytes + spare_bytes)


def _with_whole_paths(recipe: Recipe) -> Recipe:
    """Local places by their absolute path, so that the run's folder can be used from anywhere on this machine."""
    changed: dict[str, dict[str, str]] = {}
    for section, values in (("model", recipe.model), ("data", recipe.data)):
        for key in ("name", "path", "eval_path"):
            text = getattr(values, key, None)
            if text and text not in ("pocket", "sums", "reviews", "imdb", "gsm8k") and Path(text).expanduser().exists():
                changed.setdefault(section, {})[key] = str(Path(text).expanduser().absolute())
    return recipe.replace(**changed) if changed else recipe


def run(prepared: Prepared, *, observers: Sequence[Observer], command: str, resume_command: str) -> RunRecord:
    """Train as prepared and leave a run's folder behind: checkpoints, result, recipe, metrics, record.

    What fails before the first step (a model or options that cannot be used) leaves no folder.
    """
    output = Path(prepared.recipe.output or "")
    had_recipe = (output / "recipe.yaml").exists()
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        return _run(prepared, observers, command, resume_command)
    except BaseException:
        untouched = output.is_dir() and {path.name for path in output.iterdir()} <= {"recipe.yaml", PLAN_FILE}
        if untouched and not had_recipe and os.environ.get("RANK", "0") == "0":
            for name in ("recipe.yaml", PLAN_FILE):
                (output / name).unlink(missing_ok=True)
            for folder in missing:
                folder.rmdir()
        raise


def _run(prepared: Prepared, observers: Sequence[Observer], command: str, resume_command: str) -> RunRecord:
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    recipe, device = prepared.recipe, prepared.device
    output = Path(recipe.output or "")
    accelerator, processes = start_processes(recipe, output, device)
    if processes.is_main:
        _claim(output, prepared)
    processes.barrier()
    refuse_other_plans(processes.unlike_main(prepared.planned.decision), processes.world)
    method = METHODS[recipe.method]

    def say(text: str) -> None:
        for observer in observers if processes.is_main else []:
            observer.event(text)

    warming = warm_up(read_config(prepared.description.folder), recipe, device, method.four_bit)
    hold_memory(device, recipe, 0)
    base = load_base(
        recipe,
        prepared.description,
        device=device,
        dtype=prepared.dtype,
        four_bit=method.four_bit,
        streams=prepared.planned.streams or recipe.resident_layers is not None,
        world=processes.world,
        say=say,
    )
    loaded = base.loaded
    total_parameters = count_parameters(loaded.model)
    model = method.attach(loaded, recipe)
    warming.wait()  # before anything else compiles: one thread at a time in Triton's compiler
    hold_memory(device, recipe, paged_bytes(recipe, trainable_parameters(model)))
    job, path_reason = with_path(
        make_job(prepared, method, loaded, model, processes, output, resume_command), base.store, say
    )
    path_name: Literal["engine", "generic"] = "generic" if job.path is None else job.path.name
    say(f"path: {path_name} ({path_reason})")
    trackers: list[Observer] = [Trackers(accelerator, recipe)] if recipe.report_to else []
    watching = Observers([*observers, MetricsFile(output / "metrics.jsonl"), *trackers] if processes.is_main else [])

    def record(status: Any, outcome: TrainOutcome | None, adapter: Path | None) -> RunRecord:
        last = watching.last  # all there is to tell of a run that did not get to its end
        return RunRecord(
            status=status,
            method=recipe.method,
            path=path_name,
            path_reason=path_reason,
            model=recipe.model.name,
            trainable_parameters=trainable_parameters(model) or trainable,
            total_parameters=total_parameters,
            steps=outcome.steps if outcome else last.step if last else 0,
            epochs=outcome.epochs if outcome else last.epoch if last else 0.0,
            loss=outcome.loss if outcome else None,
            eval_loss=outcome.eval_loss if outcome else None,
            best_step=outcome.best_step if outcome else None,
            tokens=outcome.tokens if outcome else last.tokens_seen if last else 0,
            tokens_per_s=outcome.tokens_per_s if outcome else 0.0,
            peak_bytes=outcome.peak_bytes if outcome else last.peak_bytes if last else 0,
            energy_j=outcome.energy_j if outcome else last.energy_j if last else None,
            wall_s=time.perf_counter() - clock,
            train_s=outcome.train_s if outcome else 0.0,
            load_s=loaded.load_s,
            adapter=str(adapter) if adapter else None,
            events=watching.events,
            cuts=outcome.cuts if outcome else [],
            data=prepared.data.audit,
            plan=prepared.planned.chosen,
            reserved_bytes=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
            offload=offload_record(job.path, output / "metrics.jsonl"),
            recipe=recipe,
            hardware=hardware(device, processes.world),
            versions=versions(),
            command=command,
            started=started,
        )

    trainable = trainable_parameters(model)
    if prepared.planned.note:
        watching.events.append(prepared.planned.note)
    with let_go_after(job.path):  # the record is written first: to let go may fail, and wait for a disk
        try:
            with _stop_signals() as stop, job.product_types():
                outcome = train(job, watching, stop)
        except ThriftuneError as error:
            watching.events.append(error.given)
            # Refused before the first step (another run's checkpoint, an optimizer for GPUs): the folder is as it was.
            if processes.is_main and watching.started:
                status = "interrupted" if isinstance(error, StoppedBySignal) else "failed"
                with suppress(ThriftuneError):  # a full disk refuses this too, and the first error tells more
                    _leave_behind(output, record(status, None, None))
            raise
        result = output / method.result_folder
        if processes.is_main:
            export_result(method, job.model, loaded, recipe, result)
        processes.barrier()
        finished = record("done", outcome, result)
        if processes.is_main:
            _leave_behind(output, finished)
    return finished


def make_job(
    prepared: Prepared,
    method: Method,
    loaded: LoadedModel,
    model: Any,
    processes: Processes,
    output: Path,
    resume_command: str,
) -> TrainJob:
    recipe = prepared.recipe
    in_bfloat16 = loaded.base_dtype == torch.bfloat16
    return TrainJob(
        model=model,
        method=method,
        recipe=recipe,
        train_examples=prepared.data.train,
        place_of=prepared.data.place_of,
        eval_examples=prepared.data.eval,
        processes=processes,
        output=output,
        autocast_dtype=torch.bfloat16 if in_bfloat16 else None,
        enable_checkpointing=lambda: enable_checkpointing(loaded.model),
        checkpointing=prepared.planned.checkpointing,
        identity=_identity(prepared, processes.world),
        resume_command=resume_command,
    )


def _identity(prepared: Prepared, world: int) -> dict[str, Any]:
    """What a checkpoint and the run that resumes it must have in common."""
    recipe = prepared.recipe
    settings = {
        *("learning_rate", "num_train_epochs", "max_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2"),
        *("adam_epsilon", "max_grad_norm", "lr_scheduler_type", "warmup_steps", "warmup_ratio"),
    }
    train = recipe.train.model_dump(include=settings)
    examples = recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps * world
    return {
        "model": recipe.model.name,
        "total_parameters": prepared.description.total_parameters,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "method": recipe.method,
        "precision": recipe.precision,
        "seed": recipe.seed,
        "data": prepared.data.audit.fingerprint,
        "shuffle": recipe.data.shuffle,
        "examples_per_step": examples,
        "lora": recipe.lora.model_dump(mode="json") if recipe.method != "full" else None,
        "quant": recipe.quant.model_dump() if recipe.method == "qlora" else None,
        "dynamic": recipe.dynamic.model_dump() if recipe.method == "dynamic" else None,
        **train,
    }


@contextmanager
def _stop_signals() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM ask the loop to stop after the step; a second one stops at once."""
    request = StopRequest()

    def ask(number: int, _frame: Any) -> None:
        if request.signal_number:
            raise KeyboardInterrupt
        request.signal_number = number

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _output_folder(recipe: Recipe, method: str) -> str:
    """The folder asked for, or runs/<model>-<data>-<method>, numbered when that run exists and is not to be resumed."""
    if recipe.output:
        return recipe.output
    words = [Path(recipe.model.name).name, Path(recipe.data.name).name.split(".")[0], method]
    stem = "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", word).strip("-.") or "x" for word in words).lower()
    base = Path("runs") / stem
    candidates = [base, *(base.with_name(f"{stem}-{number}") for number in range(2, 10_000))]
    first_free = next(index for index, folder in enumerate(candidates) if not folder.exists())
    if recipe.train.resume_from_checkpoint and first_free:
        return str(candidates[first_free - 1])
    return str(candidates[first_free])


def _claim(output: Path, prepared: Prepared) -> None:
    """Make the run's folder and store the resolved recipe and the plan. Refuses a folder that holds a run, unless to go
    on with it; then its recipe is replaced at the end, when the checkpoint has proved to be of the same run."""
    recipe, plan = prepared.recipe, prepared.planned.plan
    resuming = recipe.train.resume_from_checkpoint is not None
    holds_run = (output / "record.json").exists() or newest_checkpoint(output) is not None
    if holds_run and not resuming:
        raise OutputError(
            given=f"{output} already holds a run",
            allowed="a new or empty folder, or resume_from_checkpoint=auto",
            do=f"name another --output, or go on with resume_from_checkpoint=auto, or delete {output}",
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not holds_run:
            write_text_atomically(output / "recipe.yaml", dump_yaml(recipe))
            if plan is not None:
                write_record(output / PLAN_FILE, plan)
    except OSError as error:
        raise OutputError(
            given=f"{output} cannot be written to: {error.strerror or error}",
            allowed="a folder you may write to",
            do="name another --output",
        ) from None


def _leave_behind(output: Path, record: RunRecord) -> None:
    write_text_atomically(output / "recipe.yaml", dump_yaml(record.recipe))
    write_record(output / "record.json", record)


def export_result(method: Method, model: Any, loaded: LoadedModel, recipe: Recipe, result: Path) -> None:
    """Write the result aside, then put it in place whole."""
    aside = result.with_name(f".{result.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        method.export(model, loaded, aside)
        (aside / "README.md").write_text(_card(recipe), encoding="utf-8")
        umask = os.umask(0)
        os.umask(umask)
        for part in aside.iterdir():
            part.chmod(0o666 & ~umask)
        shutil.rmtree(result, ignore_errors=True)
        aside.rename(result)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        given = f"the result cannot be written to {result}: {getattr(error, 'strerror', None) or error}"
        if is_disk_full(error):
            do = f"free some and run again with resume_from_checkpoint=auto; {last_good(result.parent)}"
            raise DiskFullError(given=given, allowed="a disk with room", do=do) from None
        if isinstance(error, OSError):
            do = f"mend that and run again with resume_from_checkpoint=auto; {last_good(result.parent)}"
            raise OutputError(given=given, allowed="a folder you may write to", do=do) from None
        raise


def _card(recipe: Recipe) -> str:
    kind = "A whole model" if recipe.method == "full" else "A LoRA adapter in PEFT's format"
    library = "transformers" if recipe.method == "full" else "peft"
    return (
        f"---\nbase_model: {recipe.model.name}\nlibrary_name: {library}\n---\n\n{kind} for {recipe.model.name}, made "
        f"by thriftune (method {recipe.method}, data {recipe.data.name}, seed {recipe.seed}).\nThe recipe, the metrics "
        "and the record of the run are in the folder above this one.\n"
    )
