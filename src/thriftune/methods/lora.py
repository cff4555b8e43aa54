"""LoRA (Hu et al. 2021, arXiv:2106.09685) through PEFT: W x + alpha / r * B A x, A and B trained, W frozen.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314) is the same over a base held in NF4; the loader quantises it and the
optimizer module picks the paged 8-bit AdamW, so nothing here differs but what cannot work on a 4-bit base.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch
from torch import nn

from thriftune.errors import CheckpointError, ModelError, RecipeError
from thriftune.models import LoadedModel
from thriftune.models.surgery import norms_to_float32
from thriftune.recipe import LoraRecipe, Recipe, did_you_mean

ADAPTER_FILE = "adapter_model.safetensors"

# Initialisations of PEFT 0.21 that rewrite or decompose the base weight: on a 4-bit base they fail, or re-quantise it in
# silence (olora moved the start output by 18.5 %). Those in NEEDS_PREPARATION silently start plain without a step of
# their own that this package does not run.
REWRITES_BASE = ("pissa", "olora", "orthogonal", "mica", "corda", "loftq")
NEEDS_PREPARATION = ("eva", "corda", "lora_ga", "loftq")


@dataclasses.dataclass(frozen=True)
class LoraMethod:
    name: str
    four_bit: bool
    result_folder: str = "adapter"

    def attach(self, loaded: LoadedModel, recipe: Recipe) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        self._refuse_what_cannot_work(recipe.lora)
        targets = find_targets(loaded.model, recipe.lora.target_modules)
        torch.manual_seed(recipe.seed)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.lora.r,
            lora_alpha=recipe.lora.alpha,
            lora_dropout=recipe.lora.dropout,
            target_modules=targets,
            use_rslora=recipe.lora.use_rslora,
            use_dora=recipe.lora.use_dora,
            init_lora_weights=recipe.lora.init_lora_weights,
            bias=recipe.lora.bias,
            modules_to_save=recipe.lora.modules_to_save,
            **recipe.lora.options,
        )
        model = get_peft_model(loaded.model, config)
        model.peft_config["default"].base_model_name_or_path = _public_name(recipe)
        if loaded.base_dtype != torch.float32:
            norms_to_float32(model)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        return model

    def _refuse_what_cannot_work(self, lora: LoraRecipe) -> None:
        from peft import LoraConfig

        known = {field.name for field in dataclasses.fields(LoraConfig)}
        problems = [
            f"lora.options.{key}: peft.LoraConfig has no such option{did_you_mean(key, known)}"
            for key in lora.options
            if key not in known
        ]
        init = lora.init_lora_weights
        if isinstance(init, str):
            if self.four_bit and init.startswith(REWRITES_BASE):
                problems.append(f"lora.init_lora_weights {init!r} rewrites the base weight, which qlora holds in 4 bits; "
                                "use method lora, or init_lora_weights=true or gaussian")
            if init.startswith(NEEDS_PREPARATION):
                problems.append(f"lora.init_lora_weights {init!r} needs a preparation step that is not built in; "
                                "use true, gaussian, pissa, olora or orthogonal")
            if init.startswith("pissa_niter"):
                problems.append(f"lora.init_lora_weights {init!r} draws random factors that the saved adapter does not "
                                "keep, so it reloads wrongly; use pissa")
        if problems:
            raise RecipeError(problems, "the recipe")

    def save(self, model: nn.Module, folder: Path) -> None:
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in
                   get_peft_model_state_dict(model, save_embedding_layers=False).items()}
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
        model.peft_config["default"].save_pretrained(str(folder))

    def load(self, model: nn.Module, folder: Path) -> None:
        load_adapter_weights(model, folder)

    def export(self, model: nn.Module, loaded: LoadedModel, folder: Path) -> None:
        self.save(model, folder)
        loaded.tokenizer.save_pretrained(str(folder))


def find_targets(model: nn.Module, wanted: str | list[str]) -> str | list[str]:
    """The target modules, each checked to match at least one linear. PEFT itself ignores a name that matches none."""
    if wanted == "all-linear":
        return wanted
    names = [name for name, _ in model.named_modules()]
    linears = sorted({name.split(".")[-1] for name, module in model.named_modules()
                      if isinstance(module, nn.Linear)} - {"lm_head"})
    if isinstance(wanted, str):
        try:
            matched = any(re.fullmatch(wanted, name) for name in names)
        except re.error as error:
            raise RecipeError([f"lora.target_modules {wanted!r} is no regular expression: {error}"], "the recipe") from None
        if matched:
            return wanted
        if "," in wanted:
            return find_targets(model, [word.strip() for word in wanted.split(",") if word.strip()])
        return find_targets(model, [wanted])
    problems = [
        f"lora.target_modules: {name!r} matches no module of this model{did_you_mean(name, linears)}; "
        f"it has {', '.join(linears)}"
        for name in wanted
        if not any(known == name or known.endswith(f".{name}") for known in names)
    ]
    if not wanted:
        problems.append("lora.target_modules is empty; name linear layers or use all-linear")
    if problems:
        raise RecipeError(problems, "the recipe")
    return wanted


def load_adapter_weights(model: nn.Module, folder: Path) -> None:
    """Put an adapter folder's tensors into the model's adapter; every tensor must have its place and the reverse.

    Raises CheckpointError otherwise: PEFT only warns, and an adapter that loads as nothing serves the base model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    path = folder / ADAPTER_FILE
    tensors = read_tensors(path)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    compare_tensors(path, tensors, expected)
    set_peft_model_state_dict(model, tensors)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file on the CPU. Raises CheckpointError when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from thriftune.models.files import tensor_shapes

    try:
        tensor_shapes(path)
        return load_file(path)
    except (ModelError, SafetensorError, OSError) as error:
        raise CheckpointError(
            given=str(getattr(error, "given", f"{path} cannot be read: {error}")),
            allowed="an adapter or checkpoint that was written to its end",
            do="take an earlier checkpoint, or train again",
        ) from None


def compare_tensors(path: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless both have the same names and shapes."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    odd = [name for name in sorted(found.keys() & expected.keys()) if found[name].shape != expected[name].shape]
    if missing or unexpected or odd:
        parts = [f"{len(names)} {word} (first: {names[0]})" for names, word in
                 ((missing, "missing"), (unexpected, "unexpected"), (odd, "of another shape")) if names]
        raise CheckpointError(
            given=f"{path} does not belong to this model and recipe: tensors {', '.join(parts)}",
            allowed="exactly the tensors of this model's adapter",
            do="use the model and the recipe that it was trained with",
        )


def _public_name(recipe: Recipe) -> str:
    folder = Path(recipe.model.name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else recipe.model.name
