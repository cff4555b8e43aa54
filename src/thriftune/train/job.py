"""What the loop is handed, and what it hands back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thriftune.data import Example, StepOrder
from thriftune.errors import NonFiniteLossError
from thriftune.methods.base import Method
from thriftune.recipe import Recipe
from thriftune.records import RankCut
from thriftune.train.checkpoint import last_good
from thriftune.train.distributed import Processes
from thriftune.train.loss import accepts_logits_to_keep
from thriftune.train.path import GenericPath, StepPath
from thriftune.train.recover import Recovery


@dataclass
class StopRequest:
    """Set by a signal handler; the loop finishes the step, saves, and raises StoppedBySignal."""

    signal_number: int = 0


@dataclass(frozen=True)
class TrainJob:
    """Everything the loop is handed. `identity` is what a resumed run must share with its checkpoint. `draws`, below
    2**32, is added to the seed of what its steps draw (dropout): the sites of a federation have one each, so that their
    noise averages out.
    """

    model: nn.Module
    method: Method
    recipe: Recipe
    train_examples: Sequence[Example]
    place_of: Callable[[int], str]
    eval_examples: Sequence[Example]
    processes: Processes
    output: Path
    autocast_dtype: torch.dtype | None
    enable_checkpointing: Callable[[], None]
    checkpointing: bool
    identity: dict[str, Any]
    resume_command: str
    path: StepPath | None = None  # None: autograd through the model
    draws: int = 0

    @functools.cached_property
    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def parameters_changed(self) -> None:
        """To be called when trained parameters were put in others' places."""
        self.__dict__.pop("trainable", None)

    @functools.cached_property
    def lengths(self) -> list[int]:
        return [len(example) for example in self.train_examples]

    @functools.cached_property
    def order(self) -> StepOrder:
        settings = self.recipe.train
        a_device = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        return StepOrder(
            num_examples=len(self.train_examples),
            examples_per_step=a_device * self.processes.world,
            num_train_epochs=settings.num_train_epochs,
            max_steps=settings.max_steps,
            seed=self.recipe.seed,
            shuffle=self.recipe.data.shuffle,
        )

    @functools.cached_property
    def logits_for_targets_only(self) -> bool:
        return accepts_logits_to_keep(self.model)

    def autocast(self) -> torch.autocast:
        """Without its cache of cast weights: a weight is used once a forward pass, and with recomputation the cache
        would hold a bfloat16 copy of every trained weight until the pass ends (2 bytes a parameter when all train)."""
        kind = self.autocast_dtype
        return torch.autocast(self.processes.device.type, dtype=kind, enabled=kind is not None, cache_enabled=False)

    def product_types(self) -> AbstractContextManager[Any]:
        """Around a run: under autocast PEFT need not copy a layer's input to float32, the product is in bfloat16."""
        if self.autocast_dtype is None or self.method.name == "full":
            return nullcontext()
        from peft.helpers import disable_input_dtype_casting

        casting: AbstractContextManager[Any] = disable_input_dtype_casting(self.model)
        return casting


def generic_path(job: TrainJob) -> GenericPath:
    """Autograd through the job's model, as its recipe and plan say."""
    settings = job.recipe.train
    if job.checkpointing:
        job.enable_checkpointing()
    automatic = settings.gradient_checkpointing == "auto"
    rows = settings.per_device_train_batch_size
    return GenericPath(
        model=job.model,
        device=job.processes.device,
        autocast=job.autocast,
        logits_for_targets_only=job.logits_for_targets_only,
        recovery=Recovery(rows, job.checkpointing, job.enable_checkpointing if automatic else None),
        most_rows=rows,
        eval_rows=settings.per_device_eval_batch_size,
    )


def check_finite(job: TrainJob, step: int) -> None:
    """Raise NonFiniteLossError when an update (a weight decay of 1e30, say) made weights that are not finite."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in job.trainable):
        raise NonFiniteLossError(
            given=f"the update of step {step} made weights that are NaN or infinite",
            allowed="finite weights; nothing of this step was saved",
            do=f"lower learning_rate or weight_decay; {last_good(job.output)}",
        )


@dataclass(frozen=True)
class TrainOutcome:
    """What came out. `loss` is the mean over the target tokens of the last tenth of the steps; `eval_loss` is that of
    the weights that are kept: the best with load_best_model_at_end, else the last that was measured."""

    steps: int
    epochs: float
    loss: float | None
    eval_loss: float | None
    best_step: int | None
    tokens: int
    tokens_per_s: float
    peak_bytes: int
    energy_j: float | None
    train_s: float
    optimizer: str
    losses: list[float] = field(default_factory=list)
    cuts: list[RankCut] = field(default_factory=list)
