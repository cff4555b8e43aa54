"""Full fine-tuning: every parameter trains. Weights are held in float32 and computed in bfloat16 under autocast.

Sixteen bytes a parameter with AdamW (weight, gradient, two moments): updates of pure bfloat16 weights would be lost to
rounding at usual learning rates.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from thriftune.methods.lora import compare_tensors, read_tensors
from thriftune.models import LoadedModel
from thriftune.recipe import Recipe

WEIGHTS_FILE = "trained.safetensors"
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclasses.dataclass(frozen=True)
class FullMethod:
    name: str = "full"
    four_bit: bool = False
    result_folder: str = "model"

    def attach(self, loaded: LoadedModel, recipe: Recipe) -> nn.Module:
        torch.manual_seed(recipe.seed)
        model = loaded.model.float()
        model.requires_grad_(True)
        return model

    def between_steps(self, recipe: Recipe, step: int, steps: int) -> None:
        return None

    def save(self, model: nn.Module, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def load(self, model: nn.Module, folder: Path) -> None:
        path = folder / WEIGHTS_FILE
        tensors = read_tensors(path)
        own = dict(model.named_parameters())
        compare_tensors(path, tensors, {name: parameter.detach() for name, parameter in own.items()})
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)

    def export(self, model: nn.Module, loaded: LoadedModel, folder: Path) -> None:
        """The model in the type its base was stored in; this rounds float32 masters once, at the very end."""
        model.to(STORED_DTYPES.get(loaded.description.stored_dtype or "", torch.bfloat16))
        model.save_pretrained(str(folder))
        loaded.tokenizer.save_pretrained(str(folder))
