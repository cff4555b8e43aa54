"""accelerate's part in a run: which process this is, and the trackers that are handed the step metrics."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from thriftune.errors import InputError
from thriftune.recipe import Recipe
from thriftune.train.distributed import Processes


def start_processes(recipe: Recipe, output: Path, device: torch.device) -> tuple[Any, Processes]:
    """accelerate sets up the processes (torchrun or accelerate launch) and finds the trackers' packages."""
    from accelerate import Accelerator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no tracker is installed is an error below
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",
            log_with=list(recipe.report_to) or None,
            project_dir=str(output),
        )
    found = {getattr(tracker, "value", tracker) for tracker in accelerator.log_with or []}
    missing = [name for name in recipe.report_to if name not in found]
    if missing:
        raise InputError(
            given=f"report_to={','.join(recipe.report_to)}, and the package of {', '.join(missing)} is not installed",
            allowed="tensorboard, wandb, mlflow and trackio, each with its package installed",
            do="pip install the tracker's package (tensorboardX for tensorboard), or drop report_to",
        )
    # The device as it was chosen: accelerate's has no number where there is one process.
    return accelerator, Processes(accelerator.process_index, accelerator.num_processes, device)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat


class Trackers:
    """The run's numbers handed to accelerate's trackers."""

    def __init__(self, accelerator: Any, recipe: Recipe) -> None:
        self._accelerator = accelerator
        self._recipe = recipe

    def start(self, first_step: int, num_steps: int) -> None:
        self._accelerator.init_trackers("thriftune", config=_flat(self._recipe.dump()))

    def step(self, metrics: Any) -> None:
        names = (
            "loss",
            "grad_norm",
            "learning_rate",
            "tokens_per_s",
            "tokens_seen",
            "epoch",
            "peak_bytes",
            "eval_loss",
        )
        values = {f"train/{name}": getattr(metrics, name) for name in names if getattr(metrics, name) is not None}
        self._accelerator.log(values, step=metrics.step)

    def event(self, text: str) -> None:
        pass

    def saved(self, folder: Path) -> None:
        pass

    def end(self) -> None:
        self._accelerator.end_training()
