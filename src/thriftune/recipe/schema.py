"""The recipe: every option of a run, its default, its meaning. This is the only home of defaults (those of the
`federate` verbs stand beside it, in `federated.py`).

A recipe has sections (`model`, `data`, `train`, `lora`, ...). A leaf whose name is unique may be written flat, as in
Hugging Face's scripts: `learning_rate=1e-4` is `train.learning_rate`. The names of axolotl, LLaMA-Factory and TRL are
accepted too (see `read.py`). Unknown keys are refused, and all problems are reported at once.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from thriftune.errors import RecipeError
from thriftune.recipe.dynamic import contradictions_of_dynamic
from thriftune.recipe.federated import FederatedRecipe
from thriftune.recipe.nearest import did_you_mean
from thriftune.recipe.section import Fraction, NonNegative, Positive, Section
from thriftune.units import parse_bytes

MethodName = Literal["auto", "lora", "qlora", "dynamic", "full"]
MAX_SEED = 2**32 - 1  # what numpy takes

# Learning rates when the recipe names none. Adapters start from zero and take about ten times the rate of full
# fine-tuning (Hu et al. 2021, section F; Biderman et al. 2024, "LoRA Learns Less and Forgets Less", section 6).
LEARNING_RATE_BY_METHOD = {"lora": 2e-4, "qlora": 2e-4, "dynamic": 2e-4, "full": 2e-5}


class ModelRecipe(Section):
    name: str = Field("pocket", min_length=1, description="hub id, folder, or 'pocket' (the model inside the package)")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    trust_remote_code: bool = Field(False, description="execute Python code that the model's repository ships")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="type of the frozen weights; auto is bfloat16 on a GPU and float32 on a CPU"
    )
    attn_implementation: str = Field("sdpa", description="transformers' attention: sdpa, eager, flash_attention_2 ...")


class DataRecipe(Section):
    name: str = Field(
        "reviews", min_length=1, description="sums or reviews (built in), imdb, gsm8k, a file, a folder, or a hub id"
    )
    path: str | None = Field(None, description="a local copy of the named data set: a folder or a file")
    subset: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="split to train on")
    eval_split: str | None = Field(None, description="split to evaluate the loss on during training")
    eval_path: str | None = Field(None, description="a file of rows to evaluate the loss on during training")
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the training rows held out when no eval rows are named"
    )
    max_samples: Positive | None = Field(None, description="use at most this many training rows (drawn by the seed)")
    max_eval_samples: Positive = Field(500, description="use at most this many eval rows during training")
    max_length: Annotated[int, Field(ge=8)] = Field(1024, description="tokens a row may have; longer prompts are cut")
    cut_prompt: Literal["start", "middle", "end"] = Field(
        "start", description="which part of a too long prompt's longest message is cut; answers are not cut for it"
    )
    train_on_prompt: bool = Field(False, description="train on every token, not on the answers only")
    chat_template: str = Field(
        "auto", description="auto: the tokenizer's own, or plain text without one; none: plain text; or a .jinja file"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="your column names, as {prompt: question, completion: reply} or {text: body}"
    )
    shuffle: bool = Field(True, description="draw the rows of each epoch in a random order given by the seed")


class TrainRecipe(Section):
    learning_rate: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = Field(
        None, description="peak learning rate; by method when not given (2e-5 full, 2e-4 the others)"
    )
    num_train_epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1.0, description="passes over the data"
    )
    max_steps: Annotated[int, Field(ge=-1)] = Field(-1, description="optimizer steps; overrides epochs when above 0")
    per_device_train_batch_size: Positive = Field(4, description="examples that go through the model at once")
    gradient_accumulation_steps: Positive = Field(4, description="micro-batches an optimizer step, a device")
    per_device_eval_batch_size: Positive = Field(8, description="examples at once in evaluation during training")
    optim: Literal["auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = Field(
        "auto", description="auto: paged_adamw_8bit for qlora on a GPU whose memory is short, adamw_torch elsewhere"
    )
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="decoupled: a weight shrinks by learning rate x this, each step"
    )
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="decay of AdamW's mean of gradients")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="decay of AdamW's mean of their squares")
    adam_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1e-8, description="added to AdamW's denominator"
    )
    max_grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        1.0, description="norm that a step's gradient is scaled down to; 0 clips nothing"
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"
    ] = Field("linear", description="how the learning rate changes after its warm-up")
    warmup_steps: NonNegative = Field(0, description="steps of linear warm-up; overrides warmup_ratio when above 0")
    warmup_ratio: Fraction = Field(0.03, description="share of the steps that warms up")
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="recompute activations in the backward pass; auto: only when memory asks for it"
    )
    logging_steps: Positive = Field(10, description="a plain progress line every so many steps; records keep them all")
    eval_strategy: Literal["no", "steps", "epoch"] = Field("epoch", description="when the eval rows' loss is measured")
    eval_steps: Positive = Field(100, description="with eval_strategy steps")
    save_strategy: Literal["no", "steps", "epoch"] = Field("epoch", description="when a checkpoint is written")
    save_steps: Positive = Field(500, description="with save_strategy steps")
    save_total_limit: Positive = Field(2, description="checkpoints kept; the best and the newest are never deleted")
    load_best_model_at_end: bool = Field(False, description="end with the checkpoint of the lowest eval loss")
    resume_from_checkpoint: str | None = Field(
        None, description="auto: the newest good checkpoint in the output folder, or afresh; or a checkpoint folder"
    )

    @model_validator(mode="before")
    @classmethod
    def _words_for_switches(cls, values: Any) -> Any:
        """YAML's true/false, and the strategies implied by `eval_steps=50` or `save_steps=50` alone."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        switch = values.get("gradient_checkpointing")
        if isinstance(switch, bool):
            values["gradient_checkpointing"] = "on" if switch else "off"
        resume = values.get("resume_from_checkpoint")
        if isinstance(resume, bool):
            values["resume_from_checkpoint"] = "auto" if resume else None
        for kind in ("eval", "save"):
            if f"{kind}_steps" in values and f"{kind}_strategy" not in values:
                values[f"{kind}_strategy"] = "steps"
        return values


class LoraRecipe(Section):
    r: Positive = Field(16, description="rank")
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(32.0, description="the update is alpha / r * B A")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="share of the adapter's inputs set to zero")
    target_modules: str | list[str] = Field(
        "all-linear", description="all-linear (every linear but the head), a list of names, or a regular expression"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(r) (Kalajdzievski 2023)")
    use_dora: bool = Field(False, description="weight-decomposed LoRA (Liu et al. 2024)")
    init_lora_weights: bool | str = Field(
        True, description="PEFT's initialisation: true, gaussian, pissa, orthogonal ..."
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which bias terms train too")
    modules_to_save: list[str] | None = Field(None, description="modules trained whole and saved with the adapter")
    options: dict[str, Any] = Field(
        default_factory=dict, description="any other option of peft.LoraConfig, by its name"
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _target_words(cls, value: Any) -> Any:
        """`q_proj,v_proj` is a list, and LLaMA-Factory's `all` is all-linear."""
        if value == "all":
            return "all-linear"
        if isinstance(value, str) and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", value):
            return _comma_list(value)
        if not _are_names(value if isinstance(value, list) else [value]):
            raise ValueError("expects all-linear, a list of names or a regular expression")
        return value

    @field_validator("modules_to_save", mode="before")
    @classmethod
    def _module_words(cls, value: Any) -> Any:
        value = _comma_list(value) if isinstance(value, str) else value
        if value in (None, []):
            return None
        if not _are_names(value):
            raise ValueError("expects a list of names")
        return value

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _switch_or_name(cls, value: Any) -> Any:
        if not isinstance(value, (bool, str)) or value == "":
            raise ValueError("expects true, false or the name of an initialisation")
        return value


class DynamicRecipe(Section):
    """Of method dynamic, whose adapter starts with `r_start` in the place of lora.r."""

    r_start: Positive = Field(64, description="rank at the start; the update is lora.alpha / r_start * B A to the end")
    keep: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="share of the adapter's parameters at the end")
    first_cut: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="share of the steps before the first cut")
    last_cut: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="share of the steps before the last cut")
    n_cuts: Positive = Field(4, description="cuts, evenly spaced; the first ones take most")
    round_to: Positive = Field(8, description="a module's rank falls by whole blocks of so many directions")
    min_rank: NonNegative = Field(0, description="rank that every module keeps; at 0 a module may lose its adapter")
    score: Literal["energy", "random"] = Field(
        "energy", description="which directions stay: those with the most energy a parameter, or (a control) any"
    )


def _comma_list(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)


class QuantRecipe(Section):
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="the sixteen values of a 4-bit weight")
    bnb_4bit_use_double_quant: bool = Field(True, description="quantise the scales too: 0.37 bits a weight less")


class GenerationRecipe(Section):
    max_new_tokens: Positive = Field(256, description="tokens an answer may have")
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(0.0, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="sample from the likeliest tokens that together have this probability"
    )
    batch_size: Positive = Field(32, description="rows generated at once")


class Recipe(Section):
    """A whole run. Frozen; `Recipe.build` is the way in, `dump` the way out, and both are each other's inverse."""

    method: MethodName = Field("auto", description="what trains; auto: the first of lora, qlora that fits free memory")
    model: ModelRecipe = Field(default_factory=ModelRecipe)
    data: DataRecipe = Field(default_factory=DataRecipe)
    train: TrainRecipe = Field(default_factory=TrainRecipe)
    lora: LoraRecipe = Field(default_factory=LoraRecipe)
    quant: QuantRecipe = Field(default_factory=QuantRecipe)
    dynamic: DynamicRecipe = Field(default_factory=DynamicRecipe)
    generation: GenerationRecipe = Field(default_factory=GenerationRecipe)
    federated: FederatedRecipe = Field(default_factory=FederatedRecipe)
    output: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="folder of the run; runs/<model>-<data>-<method> when not given"
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = Field(
        42, description="of the row order, the adapter's start, dropout and sampling"
    )
    engine: Literal["auto", "off"] = Field(
        "auto",
        description="auto: the explicit forward and backward pass where it knows the model; off: autograd",
    )
    precision: Literal["auto", "fp8"] = Field(
        "auto",
        description="type of the frozen products: auto is that of the base; fp8 is 8-bit floats, by the engine alone",
    )
    offload: Literal["auto", "off"] | dict[str, int] = Field(
        "auto",
        description="4-bit layers streamed: auto, those that do not fit; off, none; {resident_layers: N}, all but N",
    )
    max_memory: str | None = Field(
        None, description="GPU memory that a run may take, all in, such as 24GiB; null: all that is free"
    )
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default_factory=list, description="trackers that get the step metrics too; none"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthands(cls, values: Any) -> Any:
        """`model: NAME` and `data: NAME` stand for their sections' name; `report_to: none` for an empty list."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for section in ("model", "data"):
            if isinstance(values.get(section), str):
                values[section] = {"name": values[section]}
        reports = values.get("report_to")
        if reports is None or isinstance(reports, str):
            values["report_to"] = [] if reports in (None, "none") else _comma_list(reports)
        return values

    @field_validator("offload", mode="before")
    @classmethod
    def _offload_words(cls, value: Any) -> Any:
        if value in ("auto", "off"):
            return value
        layers = value.get("resident_layers") if isinstance(value, dict) and len(value) == 1 else None
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 0:
            raise ValueError("expects auto, off or {resident_layers: N} with N from 0")
        return value

    @field_validator("max_memory", mode="before")
    @classmethod
    def _memory_words(cls, value: Any) -> Any:
        """A number alone is refused: 24 would be so many bytes, and nobody means that."""
        text = str(value)
        if value is not None and (not text[-1:].isalpha() or _bytes_or_none(text) in (None, 0)):
            raise ValueError("expects a size above 0 with its unit, such as 24GiB, 512MiB or 8GB")
        return value

    @classmethod
    def build(cls, values: dict[str, Any], source: str, found: list[str] | None = None) -> Recipe:
        """Validate a tree of sections. `found` are problems seen while reading it; everything is raised at once."""
        problems = list(found or [])
        recipe = None
        try:
            recipe = cls.model_validate(values)
        except ValidationError as error:
            problems += [_explain(entry) for entry in error.errors()]
        if recipe is not None:
            problems += recipe._contradictions()
        if problems or recipe is None:
            raise RecipeError(problems, source)
        return recipe

    def _contradictions(self) -> list[str]:
        """Options that are fine alone and wrong together. Each text names the fields and the ways out."""
        problems = []
        if self.data.eval_path and self.data.eval_fraction:
            problems.append("data.eval_path and data.eval_fraction both name the eval rows; give one of them")
        if self.data.eval_split and self.data.eval_fraction:
            problems.append("data.eval_split and data.eval_fraction both name the eval rows; give one of them")
        if self.data.eval_split and self.data.eval_path:
            problems.append("data.eval_split and data.eval_path both name the eval rows; give one of them")
        if self.data.eval_split and self.data.eval_split == self.data.split:
            problems.append(f"data.eval_split and data.split are both {self.data.split!r}; evaluate on other rows")
        train = self.train
        if train.load_best_model_at_end:
            if train.eval_strategy == "no" or not self.has_eval_rows:
                problems.append(
                    "train.load_best_model_at_end needs eval rows (data.eval_split, data.eval_path or "
                    "data.eval_fraction) and train.eval_strategy steps or epoch"
                )
            if train.save_strategy == "no":
                problems.append("train.load_best_model_at_end needs train.save_strategy steps or epoch, got no")
        if self.method == "dynamic":
            problems += contradictions_of_dynamic(self)
        if self.method == "full" and self.lora != LoraRecipe():
            problems.append("lora.* options have no effect with method full; drop them or use method lora or qlora")
        if self.method == "full" and self.precision == "fp8":
            problems.append("precision fp8 is of frozen products, and method full freezes none; use precision=auto")
        if isinstance(self.offload, dict):
            if self.method != "qlora":
                problems.append(f"offload streams 4-bit layers and method is {self.method}; use method qlora")
            if train.gradient_checkpointing == "off":
                problems.append("offload computes layers again and train.gradient_checkpointing is off; drop one")
            if self.engine == "off":
                problems.append("offload.resident_layers needs the engine, and engine is off; drop one of them")
        return problems

    def adapter_at_start(self, method: str) -> LoraRecipe:
        """The adapter that a run with `method` starts with."""
        return self.lora.model_copy(update={"r": self.dynamic.r_start}) if method == "dynamic" else self.lora

    @property
    def resident_layers(self) -> int | None:
        """Layers that the recipe wants to stay on the GPU while the others are streamed; None: it does not say."""
        return self.offload["resident_layers"] if isinstance(self.offload, dict) else None

    @property
    def max_memory_bytes(self) -> int | None:
        return None if self.max_memory is None else parse_bytes(self.max_memory)

    @property
    def has_eval_rows(self) -> bool:
        return bool(self.data.eval_split or self.data.eval_path or self.data.eval_fraction)

    @property
    def learning_rate(self) -> float:
        """The rate asked for, or the method's own. `method` must be resolved (not auto)."""
        if self.train.learning_rate is not None:
            return self.train.learning_rate
        return LEARNING_RATE_BY_METHOD[self.method]

    def resolved(self, method: MethodName, output: str) -> Recipe:
        """The same recipe with nothing left to decide: what is stored with a run."""
        chosen = self.model_copy(update={"method": method, "output": output})
        train = chosen.train.model_copy(update={"learning_rate": chosen.learning_rate})
        return chosen.model_copy(update={"train": train})

    def replace(self, **sections: Any) -> Recipe:
        """A copy with other values, `train={"max_steps": 3}` or `seed=1`, validated again."""
        tree = self.dump()
        for key, value in sections.items():
            if isinstance(value, dict) and isinstance(tree.get(key), dict):
                tree[key] = {**tree[key], **value}
            else:
                tree[key] = value
        return Recipe.build(tree, source="the changed recipe")

    def dump(self) -> dict[str, Any]:
        """Plain Python values; `Recipe.build(recipe.dump(), ...) == recipe`."""
        return self.model_dump(mode="json")


def _bytes_or_none(text: str) -> int | None:
    try:
        return parse_bytes(text)
    except ValueError:
        return None


def _explain(entry: Any) -> str:
    """One pydantic error as one line: where, what was given, what is allowed."""
    place = ".".join(str(part) for part in entry["loc"] if not str(part).startswith(("function-", "constrained-")))
    if entry["type"] == "extra_forbidden":
        return f"{place}: unknown key{did_you_mean(place.split('.')[-1], [*known_places(), *Recipe.model_fields])}"
    given = entry.get("input")
    wanted = entry["msg"].removeprefix("Value error, ")
    hint = ""
    if entry["type"] == "string_type" and isinstance(given, (bool, int, float)):
        hint = f' (to mean the text, quote it: "{given}", on a command line \'"{given}"\')'
    return f"{place or 'recipe'}: {wanted[0].lower()}{wanted[1:]}, got {shown(given)}{hint}"


def shown(value: Any, quote: bool = True) -> str:
    """A value as it stands in a message: its repr, or a text as it is, cut to a line's length."""
    text = repr(value) if quote or not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."


def known_places() -> list[str]:
    """Every option's dotted place: `train.learning_rate`, `method`, ..."""
    places = []
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            places += [f"{name}.{leaf}" for leaf in kind.model_fields]
        else:
            places.append(name)
    return places
