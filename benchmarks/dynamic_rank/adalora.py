"""PEFT's AdaLoRA as an arm of the comparison, called as its documentation asks.

Its loss is the model's own with PEFT's orthogonality penalty in it, `update_and_allocate` is called after every
optimizer step while the gradients are there, and `total_step` is the run's own number of steps. Its budget falls in the
same part of the run as that of method dynamic. It trains through thriftune's loop, so rows, order, rate, clipping and
AdamW are those of the other arms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from thriftune.data import Example, micro_batches
from thriftune.models import LoadedModel
from thriftune.recipe import Recipe
from thriftune.train.path import GenericPath

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class AdaLora:
    """A `Method` whose result stays in memory: it is scored there."""

    steps: int
    r_start: int
    r_end: int
    alpha: float
    first_cut: float
    last_cut: float
    name: str = "adalora"
    four_bit: bool = False
    result_folder: str = "adapter"

    def attach(self, loaded: LoadedModel, recipe: Recipe) -> nn.Module:
        import peft

        torch.manual_seed(recipe.seed)
        config = peft.AdaLoraConfig(
            task_type="CAUSAL_LM",
            init_r=self.r_start,
            target_r=self.r_end,
            lora_alpha=self.alpha,
            target_modules=LINEARS,
            tinit=round(self.first_cut * self.steps),
            tfinal=self.steps - round(self.last_cut * self.steps),
            deltaT=max(1, self.steps // 100),
            total_step=self.steps,
        )
        model: nn.Module = peft.get_peft_model(loaded.model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return model

    def between_steps(self, recipe: Recipe, step: int, steps: int) -> None:
        return None

    def save(self, model: nn.Module, folder: Path) -> None:
        raise NotImplementedError("this arm is scored in memory")

    def load(self, model: nn.Module, folder: Path) -> None:
        raise NotImplementedError("this arm is not resumed")

    def export(self, model: nn.Module, loaded: LoadedModel, folder: Path) -> None:
        raise NotImplementedError("this arm is scored in memory")


@dataclass
class AdaLoraPath(GenericPath):
    """A whole step at once, by the model's own loss: its mean over targets is the loop's, and PEFT adds its penalty."""

    def add_gradients(self, examples: Sequence[Example], targets: float) -> Tensor:
        (batch,) = micro_batches(examples, len(examples))
        batch = batch.to(self.device)
        with self.autocast():
            loss = self.model(input_ids=batch.tokens_BT, attention_mask=batch.mask_BT, labels=batch.labels_BT).loss
        loss.backward()
        return loss.detach().double()


@contextmanager
def allocating(model: Any) -> Iterator[None]:
    """Inside, every optimizer step is followed by the model's `update_and_allocate`, before gradients are cleared."""
    taken = 0

    def after(*_: Any) -> None:
        nonlocal taken
        taken += 1
        model.base_model.update_and_allocate(taken)

    handle = register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        handle.remove()


def directions_left(model: nn.Module) -> int:
    """Singular values that are not masked to zero, over all modules."""
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if ".lora_E." in name)
