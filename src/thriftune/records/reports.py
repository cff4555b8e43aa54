"""Records of comparisons: a cell, and a report with all that its page says. Read and written as those of runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from thriftune.records.runs import SCHEMA_VERSION, EvalResult, PlannedMethod, RankCut, Record


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
    cuts: list[RankCut] = Field(default_factory=list)
    start_rank: int | None = Field(None, description="of an adapter whose ranks are cut")


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
