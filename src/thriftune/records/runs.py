"""Records of runs, and how records are read and written: data audit, step metrics, evaluation, plan, run.

Every file carries `schema_version`; it rises when a field changes its meaning, never when one is added. The
lines of metrics.jsonl go by the version of the record beside them. NaN and infinity, which JSON lacks, are the texts
"NaN" and "Infinity", and are read back as numbers.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from thriftune.errors import DiskFullError, InputError, OutputError
from thriftune.recipe import Recipe
from thriftune.units import format_bytes

SCHEMA_VERSION = 1


class Record(BaseModel):
    model_config = ConfigDict(
        frozen=True, defer_build=True, extra="ignore", protected_namespaces=(), ser_json_inf_nan="strings"
    )


class Lengths(Record):
    """Token lengths of the rows used."""

    median: int
    p95: int
    max: int


class CutAnswers(Record):
    """Answers that alone exceed max_length and lost their end (so these rows do not teach the model to stop)."""

    rows: int
    share: float
    tokens_lost_mean: float


class DataAudit(Record):
    """Verdicts on the training rows. Counts are rows unless the name says tokens."""

    source: str = Field(description="what the rows are, in words: 'imdb train, 25,000 rows'")
    shape: str = Field(description="messages, prompt/completion, alpaca, sharegpt, text, imdb, gsm8k ...")
    rendering: str = Field(description="how prompts are written: the tokenizer's chat template, plain text ...")
    rows_read: int
    rows_used: int
    rows_dropped: dict[str, int] = Field(description="reason -> rows")
    token_lengths: Lengths
    max_length: int
    tokens: int
    trained_tokens: int
    trained_share: float
    rows_without_trained_token: int
    prompts_cut: int = Field(description="rows whose prompt was shortened to max_length; their answers are whole")
    answers_cut: CutAnswers
    eos_trained: bool = Field(description="every used, uncut answer ends in a trained end token")
    eos_token: str | None
    bos_doubled: bool
    duplicate_rows: int
    rows_shared_with_eval: int
    eval_rows: int
    fingerprint: str = Field(description="sha256 of the token ids and masks used, in row order")


class StepMetrics(Record):
    """One optimizer step, one line of metrics.jsonl. The loss is the mean over the step's target tokens."""

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    targets: int
    tokens: int = Field(description="tokens that went through the model in this step, padding not counted")
    tokens_seen: int
    step_s: float
    tokens_per_s: float
    memory_bytes: int
    peak_bytes: int
    energy_j: float | None = None
    eval_loss: float | None = None
    copy_s: float | None = Field(None, description="seconds in which streamed layers were copied to the GPU")
    waited_s: float | None = Field(None, description="of the step, seconds in which the GPU stood still for a copy")
    events: list[str] = Field(default_factory=list, description="what happened: out of memory and what was done ...")


class RankCut(Record):
    """A cut of an adapter's ranks between two steps, of method dynamic. The losses are those of the step's examples.

    `held` bytes are those of the trained parameters, their gradients and the optimizer's states, `copies` those of the
    engine's 16-bit copies, padding included, both counted from their sizes; `allocated` ones all that the GPU's
    allocator has handed out at that moment.
    """

    step: int
    share: float = Field(description="of the parameters at the start, how many could stay")
    ranks: dict[str, int] = Field(description="module -> rank from here on; 0: it lost its adapter")
    loss_before: float
    loss_after: float
    parameters_before: int
    parameters_after: int
    held_bytes_before: int
    held_bytes_after: int
    copies_bytes_before: int = 0
    copies_bytes_after: int = 0
    allocated_bytes_before: int | None = None
    allocated_bytes_after: int | None = None
    cut_s: float

    @property
    def words(self) -> str:
        """The event of a run that tells of it."""
        gone = sum(rank == 0 for rank in self.ranks.values())
        return (
            f"ranks cut after step {self.step}: {self.parameters_before:,} -> {self.parameters_after:,} parameters, "
            f"with gradients and optimizer {format_bytes(self.held_bytes_before)} -> "
            f"{format_bytes(self.held_bytes_after)}; loss {self.loss_before:.4f} -> {self.loss_after:.4f}"
            + (f"; {gone} modules have no adapter" if gone else "")
        )


class EvalResult(Record):
    """A score with its Wilson 95 % interval (`low`, `high`); every answer is kept in the `answers` file."""

    schema_version: int = SCHEMA_VERSION
    task: str
    metric: str
    value: float
    low: float
    high: float
    rows: int
    model: str
    adapter: str | None = None
    answers: str | None = Field(None, description="jsonl file with one object a row: prompt, answer, target, correct")
    details: dict[str, Any] = Field(default_factory=dict, description="further scores and settings")
    wall_s: float = 0.0


class PlannedMethod(Record):
    """What one method would take on one GPU. Sizes are bytes on each GPU, times seconds, money US dollars.

    `memory` has every part of plan.values.PARTS and adds up to `peak_bytes`; `cost_usd` is the whole run's, by place.
    """

    method: str
    fits: bool
    peak_bytes: int
    usable_bytes: int
    allocated_bytes: int = Field(description="what PyTorch's allocator hands out at the peak")
    reserved_bytes: int = Field(description="what it takes from the driver for that")
    memory: dict[str, int]
    trainable_parameters: int
    total_parameters: int
    tokens_per_s: float
    step_s: float
    run_s: float
    cost_usd: dict[str, float]
    limited_by: str
    settings: dict[str, Any] = Field(description="recipe options that the numbers hold for, and the engine's choices")
    path: Literal["engine", "generic"] = "generic"
    least_bytes: int | None = Field(None, description="the peak with which the engine could do, given less memory")
    beside: bool = Field(False, description="shown beside the methods asked about, and never recommended")
    notes: list[str] = Field(default_factory=list)


class Recommendation(Record):
    """`method` is None when nothing fits; the reasons then say what would."""

    method: str | None
    reasons: list[str]
    command: str | None


class GpuPlan(Record):
    gpu: str
    gpus: int = 1
    methods: list[PlannedMethod]
    recommended: Recommendation
    notes: list[str] = Field(default_factory=list)


class Plan(Record):
    """Answer of `thriftune plan`: every method on every GPU asked about, and one recommendation for each GPU."""

    schema_version: int = SCHEMA_VERSION
    model: str
    model_source: str = Field(description="where the model's sizes come from")
    data: str = Field(description="where the token counts come from, in words")
    steps: int
    tokens: int
    gpus: list[GpuPlan]
    notes: list[str] = Field(default_factory=list)


class OffloadRecord(Record):
    """How a run whose layers were streamed held them, and the medians of its steps in seconds: of copies to the GPU,
    of waiting for them (what was not hidden), of all else, and of the whole step. On a CPU copies are not timed."""

    resident_layers: int
    layers: int
    inputs_on_host: bool
    host_bytes: int = Field(description="pinned host memory")
    copied_bytes_per_step: int
    copy_s: float
    waited_s: float
    compute_s: float
    step_s: float


class RunRecord(Record):
    """A run: what was asked, what happened, on what, with which versions."""

    schema_version: int = SCHEMA_VERSION
    status: Literal["done", "interrupted", "failed"]
    method: str
    path: Literal["engine", "generic"]
    path_reason: str
    model: str
    trainable_parameters: int
    total_parameters: int
    steps: int
    epochs: float
    loss: float | None = Field(description="mean loss over the target tokens of the last tenth of the steps")
    eval_loss: float | None = None
    best_step: int | None = None
    tokens: int
    tokens_per_s: float
    peak_bytes: int
    energy_j: float | None = None
    wall_s: float
    train_s: float
    load_s: float
    adapter: str | None = Field(description="folder of the result: a PEFT adapter, or a whole model for method full")
    events: list[str] = Field(default_factory=list)
    cuts: list[RankCut] = Field(default_factory=list, description="of an adapter's ranks, by method dynamic")
    data: DataAudit | None = None
    plan: PlannedMethod | None = Field(None, description="what the planner expected; the measurements stand beside it")
    reserved_bytes: int = 0
    offload: OffloadRecord | None = Field(None, description="of a run whose layers were streamed")
    recipe: Recipe
    hardware: dict[str, Any]
    versions: dict[str, str]
    command: str
    started: str


RecordType = TypeVar("RecordType", bound=Record)


def write_text_atomically(path: Path, text: str) -> None:
    """Write aside, flush to the disk, rename: a reader sees the old file or the new one, never half of one.

    Raises OutputError when the place cannot be written to and DiskFullError when it has no room.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        given = f"{path} cannot be written: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(given=given, allowed="a disk with room", do="free some, or write elsewhere") from error
        raise OutputError(given=given, allowed="a folder that you may write to", do="name another one") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def write_record(path: Path, record: Record) -> None:
    write_text_atomically(path, record.model_dump_json(indent=2) + "\n")


def read_record(path: Path, kind: type[RecordType]) -> RecordType:
    """Read a record back. Raises InputError naming the file when it is missing, not JSON or of another shape."""
    allowed = f"a {kind.__name__} written by thriftune (schema version {SCHEMA_VERSION} or older)"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("schema_version", SCHEMA_VERSION) if isinstance(content, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise InputError(
                given=f"{path} has schema version {version}", allowed=allowed, do="read it with a newer thriftune"
            )
        return kind.model_validate(content)
    except FileNotFoundError:
        raise InputError(given=f"{path} does not exist", allowed=allowed, do="name a run's folder") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        given = f"{path} is not a {kind.__name__}: {where}: {first['msg']}"
        raise InputError(given=given, allowed=allowed, do="restore or remove it") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number too long to read
        raise InputError(given=f"{path} cannot be read: {error}", allowed=allowed, do="restore or remove it") from None
