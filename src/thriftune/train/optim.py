"""Optimizer and learning rate from the recipe, and the optimizer's state as plain tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thriftune.errors import CheckpointError, InputError
from thriftune.recipe import Recipe, TrainRecipe

STATE_FILE = "optimizer.safetensors"
LAYOUT_FILE = "optimizer.json"
POLYNOMIAL_END = 1e-7  # where transformers' polynomial schedule ends, whatever the peak


def build_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> tuple[torch.optim.Optimizer, str, str]:
    """The optimizer over the trainable parameters, its name, and a remark to print ('' when it is what was asked).

    Biases and norms are not decayed. Raises InputError when an 8-bit or paged optimizer is asked for on a CPU.
    """
    train = recipe.train
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    arguments: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
    }
    name, remark = train.optim, ""
    if name == "auto":
        name = "paged_adamw_8bit" if recipe.method == "qlora" and device.type == "cuda" else "adamw_torch"
        if recipe.method == "qlora" and device.type != "cuda":
            remark = "optimizer: plain AdamW; the paged 8-bit AdamW of qlora needs a GPU"
    if name == "adamw_torch":
        return torch.optim.AdamW(groups, fused=True, **arguments), name, remark
    if device.type != "cuda":
        raise InputError(
            given=f"train.optim={name} on {device}",
            allowed="8-bit and paged optimizers on a GPU; adamw_torch anywhere",
            do="use train.optim=auto",
        )
    from bitsandbytes import optim

    kinds = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
        "paged_adamw_32bit": optim.PagedAdamW32bit,
    }
    return kinds[name](groups, **arguments), name, remark


class LearningRate:
    """The rate of each step as a pure function of its number, by transformers' schedules.

    A warm-up of w steps ends with the peak at step w: the first step trains with peak / w, not with 0 as in
    transformers' own counting, where it is spent for nothing. Without warm-up both are the same.
    """

    def __init__(self, train: TrainRecipe, peak: float, num_steps: int) -> None:
        from transformers import get_scheduler

        self.peak = peak
        warmup = train.warmup_steps or math.ceil(train.warmup_ratio * num_steps)
        if train.lr_scheduler_type == "constant":  # as in transformers it has no warm-up, unless in so many steps
            warmup = train.warmup_steps
        self.warmup_steps = min(warmup, num_steps)
        if train.lr_scheduler_type == "polynomial" and peak <= POLYNOMIAL_END:
            raise InputError(
                given=f"learning_rate={peak:g} with lr_scheduler_type=polynomial, which ends at {POLYNOMIAL_END:g}",
                allowed=f"a learning rate above {POLYNOMIAL_END:g}",
                do="raise the learning rate or use lr_scheduler_type=linear",
            )
        probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
        schedule = get_scheduler(
            train.lr_scheduler_type, probe, num_warmup_steps=self.warmup_steps, num_training_steps=num_steps
        )
        self._factor = schedule.lr_lambdas[0]

    def at(self, step: int) -> float:
        """Rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        return self.peak * float(self._factor(step))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path, prefix: str = "") -> None:
    """The state as safetensors and JSON, without pickle: tensors under 'index.name', numbers in the layout. `prefix` is
    that of both files' names, where a folder has the states of several optimizers."""
    from safetensors.torch import save_file

    content = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, state in content["state"].items():
        for name, value in _flat(state).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().clone().contiguous()
            else:
                numbers[f"{index}.{name}"] = value
    save_file(tensors, folder / f"{prefix}{STATE_FILE}", metadata={"format": "pt"})
    layout = {"numbers": numbers, "param_groups": content["param_groups"]}
    (folder / f"{prefix}{LAYOUT_FILE}").write_text(json.dumps(layout), encoding="utf-8")


def _flat(state: dict[str, Any]) -> dict[str, Any]:
    """bitsandbytes puts its quantised tensors into a mapping of their own, and takes them without it as well."""
    flat: dict[str, Any] = {}
    for name, value in state.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path, prefix: str = "") -> None:
    """Put a saved state back. Raises CheckpointError when it is missing or of another optimizer or parameters."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # Copied, because those of a file lie at its addresses, and products round by where their numbers lie.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / f"{prefix}{STATE_FILE}").items()}
        layout = json.loads((folder / f"{prefix}{LAYOUT_FILE}").read_text(encoding="utf-8"))
        state: dict[int, dict[str, Any]] = {}
        for key, value in [*tensors.items(), *layout["numbers"].items()]:
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        groups = [{**group, **_as_tuples(group)} for group in layout["param_groups"]]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            given=f"the optimizer state in {folder} does not fit this run: {error}",
            allowed="a checkpoint of the same recipe",
            do="resume with the recipe the run was started with, or start in another output folder",
        ) from None


def _as_tuples(group: dict[str, Any]) -> dict[str, Any]:
    return {"betas": tuple(group["betas"])} if "betas" in group else {}
