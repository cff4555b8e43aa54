"""What is written to a disk or crosses a process: data audit, step metrics, evaluation, the record of a run.

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

SCHEMA_VERSION = 1


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=(), ser_json_inf_nan="strings")


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
    events: list[str] = Field(default_factory=list, description="what happened: out of memory and what was done ...")


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
    data: DataAudit | None = None
    plan: PlannedMethod | None = Field(None, description="what the planner expected; the measurements stand beside it")
    reserved_bytes: int = 0
    recipe: Recipe
    hardware: dict[str, Any]
    versions: dict[str, str]
    command: str
    started: str


class CellRecord(Record):
    """One cell of a comparison: a method with a seed and settings, what was planned and what came of it.

    Cells of one `variant` differ by their seed only. The base model is a cell without a run: `seed` is None.
    """

    schema_version: int = SCHEMA_VERSION
    status: Literal["done", "out_of_memory", "refused", "failed", "skipped"] = Field(
        description="refused: the plan says that it cannot fit; skipped: left out to stay in the budget"
    )
    reason: str = Field("", description="why it is not done, in words")
    method: str = Field(description="base, full, lora, qlora ...")
    variant: str = Field(description="the method and what else sets it apart: 'lora', 'lora lora.r=8'")
    seed: int | None = None
    overrides: dict[str, Any] = Field(default_factory=dict, description="dotted recipe option -> value, of this cell")
    plan: PlannedMethod | None = None
    result: EvalResult | None = Field(None, description="the task's score; its answers lie beside this record")
    general: EvalResult | None = Field(None, description="loss on a fixed general text, for what is forgotten")
    first_token_s: float | None = Field(None, description="median time to the first token, the adapter beside its base")
    merged_first_token_s: float | None = Field(None, description="the same with the adapter folded into its base")
    result_bytes: int | None = Field(None, description="files of the adapter, or of the whole model for method full")
    at_once: int = Field(1, description="cells that ran at once, this one among them")
    sharing: int = Field(0, description="others of them on the same device: then times tell nothing of the method")


class ReportValue(Record):
    """One variant in one row of a report's table: mean and standard deviation over seeds, or why they are `missing`."""

    text: str
    spread_text: str = ""
    mean: float | None = None
    spread: float | None = None
    low: float | None = Field(None, description="of the 95 % interval")
    high: float | None = None
    by_seed: dict[str, float] = Field(default_factory=dict)
    missing: str = ""


class ReportRow(Record):
    """One line of the table; `values` are in the order of the report's variants."""

    key: str
    group: str
    label: str
    unit: str = Field(description="of the numbers (bytes, s, USD ...); the texts may be in another")
    note: str = ""
    values: list[ReportValue]


class PairTest(Record):
    """Two variants on the same test rows. `shown`: the p-value, corrected by Holm's method, is below 5 %."""

    first: str
    second: str
    seeds: list[str] = Field(description="that both have; a variant without seeds goes with each")
    rows: int
    first_better: int = Field(description="rows on which the first did better, as a mean over seeds")
    second_better: int
    difference: float | None = Field(description="first - second, with its own 95 % interval")
    low: float | None
    high: float | None
    p_value: float | None
    adjusted_p_value: float | None = None
    shown: bool = False
    test: str = Field(description="which test, in words; or why there is none")


class ReportVariant(Record):
    """One column of the table: cells that differ by their seed only. `label` is its name for people."""

    name: str
    label: str
    method: str
    overrides: dict[str, Any]
    seeds: list[str] = Field(description="of the cells that are done")
    cells: int
    planned_memory: dict[str, int] = Field(description="bytes by part, as planned")
    allocated_bytes: float | None = Field(description="measured peak, mean over seeds; a process's on a CPU")
    reserved_bytes: float | None


class ReportCell(Record):
    name: str
    variant: str
    seed: int | None
    status: str
    reason: str
    folder: str
    value: float | None
    low: float | None
    high: float | None
    learning_rate: float | None
    planned_peak_bytes: int | None
    usable_bytes: int | None
    events: list[str]
    command: str
    recipe: str = Field(description="YAML; empty for a cell without a run")
    curve_tokens: list[int] = Field(description="end of each stretch of steps, in tokens seen")
    curve_loss: list[float] = Field(description="mean loss over the target tokens of that stretch")
    curve_steps: int = Field(description="most steps in a stretch; 1: every step is there")


class ReportPattern(Record):
    """How many test rows exactly these variants answer right (in most of their seeds)."""

    right: list[str]
    rows: int


class ReportAnswer(Record):
    variant: str
    seed: int | None
    answer: str
    read_as: str = Field(description="the prediction that the task took from the answer")
    correct: bool


class ReportExample(Record):
    """A test row on which variants differ, with what the first seed of each answered."""

    row: int
    prompt: str
    target: str
    answers: list[ReportAnswer]


class ReportRecord(Record):
    """A comparison as a report shows it: report.json, and everything that report.html and report.md say."""

    schema_version: int = SCHEMA_VERSION
    title: str
    verdict: str
    chosen: str | None = Field(description="the variant to take, by its name; None without a verdict")
    certainty: list[str]
    model: str
    task: str
    metric: str
    higher_is_better: bool
    as_percent: bool
    test_data: str
    test_rows: int
    train_data: str
    variants: list[ReportVariant]
    table: list[ReportRow]
    pairs: list[PairTest]
    patterns: list[ReportPattern]
    examples: list[ReportExample]
    cells: list[ReportCell]
    search: dict[str, Any] | None
    hardware: dict[str, Any]
    share_a_device: bool = Field(False, description="cells ran beside others on it, so that times compare nothing")
    versions: dict[str, list[str]]
    commands: list[str]
    notes: list[str]


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
