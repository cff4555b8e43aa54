"""Runs' folders with an adapter that shows, made without training; and what to compare of a model."""

from __future__ import annotations

from pathlib import Path

import torch

from thriftune.methods import METHODS
from thriftune.models import load_model
from thriftune.recipe import QuantRecipe, Recipe, dump_yaml

CPU = torch.device("cpu")
IDS_BT = torch.tensor([[5, 80, 99, 104, 81, 7, 33, 12], [9, 9, 200, 3, 2, 60, 61, 0]])


def make_run(folder: Path, base: Path, method: str = "lora", size: float = 0.05, lora: dict | None = None) -> Path:
    """The folder of a run whose adapter moves every weight by about `size`, without the training."""
    tree = {"method": method, "model": {"name": str(base)}, "lora": {"r": 4, "alpha": 8, **(lora or {})}}
    recipe = Recipe.build({**tree, "output": str(folder)}, source="the test's recipe")
    loaded = load_model(
        recipe.model, device=CPU, dtype=torch.float32, quant=QuantRecipe() if METHODS[method].four_bit else None
    )
    model = METHODS[method].attach(loaded, recipe)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=draw)
    (folder / "adapter").mkdir(parents=True)
    METHODS[method].export(model, loaded, folder / "adapter")
    (folder / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    return folder


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS_BT).logits.float()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
