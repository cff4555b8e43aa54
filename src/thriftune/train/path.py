"""How a step's gradient is computed: by autograd through the model (here), or by the engine, which is handed in.

Either way it is the gradient of the summed losses divided by the targets of the whole step, however it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from thriftune.data import Example, micro_batches
from thriftune.train.loss import loss_sum
from thriftune.train.recover import Recovery


class StepPath(Protocol):
    @property
    def name(self) -> Literal["engine", "generic"]: ...

    def add_gradients(self, examples: Sequence[Example], targets: float) -> Tensor:
        """Add the gradient of (sum of the examples' losses) / targets to the trained parameters' `grad`. Returns that
        quotient, a float64 scalar. Raises what running out of memory raises."""
        ...

    def losses(self, examples: Sequence[Example]) -> tuple[float, int]:
        """Sum of the losses and number of targets; no gradient."""
        ...

    def step_down(self, reason: str) -> str:
        """Take less memory from here on and say how. Raises DoesNotFitError when nothing smaller is left."""
        ...

    def in_evaluation(self) -> StepPath:
        """The path for `losses` of many examples. Stepping it down leaves the size of this one's parts as it is; frozen
        weights that it gives up the memory of are given up for both."""
        ...

    def state(self) -> dict[str, int | bool]:
        """What a checkpoint keeps, so that a resumed run rounds as this one did."""
        ...

    def resume(self, state: Mapping[str, int | bool]) -> None: ...

    def measured(self) -> dict[str, float]:
        """Of the last step, by the names of StepMetrics."""
        ...

    def parameters_changed(self) -> None:
        """To be called when the model has other trained parameters than before, of other sizes."""
        ...

    def copies_bytes(self) -> int:
        """Of working copies of the trained parameters, which the path holds beside them."""
        ...


@dataclass
class GenericPath:
    """Autograd through transformers' model, a micro-batch of padded rows after another."""

    model: nn.Module
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    logits_for_targets_only: bool
    recovery: Recovery
    most_rows: int
    eval_rows: int
    name: Literal["engine", "generic"] = "generic"

    def add_gradients(self, examples: Sequence[Example], targets: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in micro_batches(examples, self.recovery.rows_at_once):
            with self.autocast():
                share = loss_sum(self.model, batch.to(self.device), self.logits_for_targets_only) / targets
            share.backward()
            total += share.detach()
        return total

    def losses(self, examples: Sequence[Example]) -> tuple[float, int]:
        total, targets = 0.0, 0
        for batch in micro_batches(examples, self.recovery.rows_at_once):
            with self.autocast():
                total += float(loss_sum(self.model, batch.to(self.device), self.logits_for_targets_only))
            targets += batch.num_targets
        return total, targets

    def step_down(self, reason: str) -> str:
        return self.recovery.step_down(reason)

    def in_evaluation(self) -> GenericPath:
        return replace(self, recovery=Recovery(self.eval_rows, self.recovery.checkpointing, None))

    def measured(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, int | bool]:
        return {"rows_at_once": self.recovery.rows_at_once, "checkpointing": self.recovery.checkpointing}

    def resume(self, state: Mapping[str, int | bool]) -> None:
        """As the checkpoint was left, within what the recipe says now."""
        rows = int(state.get("rows_at_once", self.most_rows))
        self.recovery.rows_at_once = min(rows, self.most_rows)
        if state.get("checkpointing") and not self.recovery.checkpointing:
            enable = self.recovery.enable_checkpointing
            if enable is not None:
                enable()
                self.recovery.checkpointing = True

    def parameters_changed(self) -> None:
        """Nothing: every pass goes through the model itself."""

    def copies_bytes(self) -> int:
        return 0
