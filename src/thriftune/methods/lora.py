"""LoRA (Hu et al. 2021, arXiv:2106.09685) through PEFT: W x + alpha / r * B A x, A and B trained, W frozen.

QLoRA (Dettmers et al. 2023, arXiv:2305.14314) is the same over a base held in NF4; the loader quantises it and the
optimizer module picks the paged 8-bit AdamW, so nothing here differs but what cannot work on a 4-bit base.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thriftune.errors import CheckpointError, DoesNotFitError, ModelError, RecipeError, first_line
from thriftune.models import LoadedModel
from thriftune.recipe import LoraRecipe, Recipe, did_you_mean

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

# What PEFT raises for option values that it cannot use; it checks few of them itself.
PEFT_REFUSES = (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ImportError, re.error)

# Initialisations of PEFT 0.21 that rewrite or read the base weight: on a 4-bit base they fail, or re-quantise it in
# silence (olora moved the start output by 18.5 %). Those in NEEDS_PREPARATION silently start plain without a step of
# their own that this package does not run. Those in REPLACES_BASE leave a changed base behind, so an adapter that
# started from one is read with the same initialisation again.
REWRITES_BASE = ("pissa", "olora", "orthogonal", "mica", "corda", "loftq")
NEEDS_PREPARATION = ("eva", "corda", "lora_ga", "loftq")
REPLACES_BASE = ("pissa", "olora")

OWN_PLACE = {
    "r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.target_modules",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "init_lora_weights": "lora.init_lora_weights",
    "bias": "lora.bias",
    "modules_to_save": "lora.modules_to_save",
}
_SET_HERE = "it is set by the run"
_NEEDS_CODE = "it takes an object, or a step of its own, that a recipe cannot give"
# Fields of peft.LoraConfig that a recipe cannot use, and why.
REFUSED_OPTIONS = {
    **dict.fromkeys(("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode"), _SET_HERE),
    **dict.fromkeys(("base_model_name_or_path", "revision"), "it is the recipe's model"),
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), _NEEDS_CODE),
    **dict.fromkeys(("megatron_config", "megatron_core", "arrow_config", "runtime_config"), _NEEDS_CODE),
    **dict.fromkeys(("kasa_config", "velora_config", "monteclora_config", "use_bdlora"), _NEEDS_CODE),
    **dict.fromkeys(("use_qalora", "qalora_group_size"), "it works on GPTQ weights only"),
    "alora_invocation_tokens": "an adapter that switches itself on cannot be merged, nor generated with here",
    "target_parameters": "adapters on an expert layer's stacked weights are not built in",
    "layer_replication": "it makes a model with more layers than the base has",
}


@dataclasses.dataclass(frozen=True)
class LoraMethod:
    name: str
    four_bit: bool
    result_folder: str = "adapter"

    def attach(self, loaded: LoadedModel, recipe: Recipe) -> nn.Module:
        import peft

        targets, problems = find_targets(loaded.model, recipe.lora.target_modules)
        problems = self._what_cannot_work(recipe.lora) + problems + _unmatched(loaded.model, recipe.lora)
        if problems:
            raise RecipeError(problems, "the recipe")
        torch.manual_seed(recipe.seed)
        try:
            config = peft.LoraConfig(
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
                revision=recipe.model.revision,
                **recipe.lora.options,
            )
            model: nn.Module = peft.get_peft_model(loaded.model, config)
        except (*PEFT_REFUSES, MemoryError) as error:
            if is_out_of_memory(error):
                raise DoesNotFitError(
                    given=f"an adapter of rank {recipe.lora.r} beside {recipe.model.name}: {first_line(error)}",
                    allowed="an adapter that fits in memory beside its base",
                    do="lower lora.r, name fewer lora.target_modules, or use method qlora",
                ) from None
            raise RecipeError([f"lora: PEFT cannot use these options: {first_line(error)}"], "the recipe") from None
        _make_plain(config, recipe)
        if problems := _unmatched_patterns(model, recipe.lora):
            raise RecipeError(problems, "the recipe")
        for name, parameter in model.named_parameters():
            if (parameter.requires_grad or ".lora_" in name) and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        return model

    def _what_cannot_work(self, lora: LoraRecipe) -> list[str]:
        from peft import LoraConfig

        known = {field.name for field in dataclasses.fields(LoraConfig)}
        problems = []
        for key in lora.options:
            if key not in known:
                hint = did_you_mean(key, known - REFUSED_OPTIONS.keys())
                problems.append(f"lora.options.{key}: peft.LoraConfig has no such option{hint}")
            elif key in OWN_PLACE:
                problems.append(f"lora.options.{key}: write {OWN_PLACE[key]}")
            elif key in REFUSED_OPTIONS:
                problems.append(f"lora.options.{key} cannot be used: {REFUSED_OPTIONS[key]}")
        init = lora.init_lora_weights
        if isinstance(init, str):
            kind = init.lower()  # as PEFT compares some of them
            if self.four_bit and kind.startswith(REWRITES_BASE):
                problems.append(
                    f"lora.init_lora_weights {init!r} rewrites the base weight, which qlora holds in 4 bits; "
                    "use method lora, or init_lora_weights=true or gaussian"
                )
            if kind.startswith(NEEDS_PREPARATION):
                problems.append(
                    f"lora.init_lora_weights {init!r} needs a preparation step that is not built in; "
                    "use true, gaussian, pissa, olora or orthogonal"
                )
            if kind.startswith("pissa_niter"):
                problems.append(
                    f"lora.init_lora_weights {init!r} draws random factors that the saved adapter does not "
                    "keep, so it reloads wrongly; use pissa"
                )
        return problems

    def between_steps(self, recipe: Recipe, step: int, steps: int) -> None:
        return None

    def save(self, model: nn.Module, folder: Path) -> None:
        save_adapter(model, folder, model.peft_config["default"])  # type: ignore[index]

    def load(self, model: nn.Module, folder: Path) -> None:
        load_adapter_weights(model, folder)

    def export(self, model: nn.Module, loaded: LoadedModel, folder: Path) -> None:
        self.save(model, folder)
        loaded.tokenizer.save_pretrained(str(folder))


def save_adapter(model: nn.Module, folder: Path, config: Any) -> None:
    """The adapter's tensors and its configuration, as PEFT names them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # Cloned, because weights that are tied share their memory and safetensors writes each byte once.
    tensors = {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _make_plain(config: Any, recipe: Recipe) -> None:
    """The configuration as it is written: the base by its public name, and no set, whose order changes each time."""
    folder = Path(recipe.model.name).expanduser()
    is_folder = recipe.model.name != "pocket" and folder.is_dir()
    config.base_model_name_or_path = str(folder.resolve()) if is_folder else recipe.model.name
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)


def can_carry_lora(module: nn.Module) -> bool:
    """Linears (4-bit ones and GPT-2's Conv1D among them) and embeddings."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, nn.Embedding, Conv1D))


def find_targets(model: nn.Module, wanted: str | list[str]) -> tuple[str | list[str], list[str]]:
    """The target modules as PEFT takes them, and what is wrong with them: a name or expression that matches no linear,
    or something else than linears and embeddings. PEFT itself ignores a name that matches nothing."""
    if wanted == "all-linear":
        return wanted, []
    modules = dict(model.named_modules())
    carriers = {name for name, module in modules.items() if can_carry_lora(module)}
    listed = ", ".join(
        sorted({name.split(".")[-1] for name in carriers if not isinstance(modules[name], nn.Embedding)})
    )
    if isinstance(wanted, str):
        try:
            matched = {name for name in modules if re.fullmatch(wanted, name)}
        except re.error as error:
            return wanted, [f"lora.target_modules {wanted!r} is no regular expression: {error}"]
        if not matched:
            return find_targets(model, [word.strip() for word in wanted.split(",") if word.strip()])
        odd = sorted(matched - carriers)
        if odd:
            return wanted, [
                f"lora.target_modules {wanted!r} matches {odd[0] or 'the whole model'!r}, which is no linear"
            ]
        return wanted, []
    problems = []
    for name in wanted:
        found = {known for known in modules if known == name or known.endswith(f".{name}")}
        if not found:
            hint = did_you_mean(name, [known.split(".")[-1] for known in carriers])
            problems.append(f"lora.target_modules: {name!r} matches no module of this model{hint}; it has {listed}")
        elif found - carriers:
            problems.append(f"lora.target_modules: {name!r} is no linear; this model has {listed}")
    if not wanted:
        problems.append("lora.target_modules is empty; name linear layers or use all-linear")
    return wanted, problems


def _unmatched(model: nn.Module, lora: LoraRecipe) -> list[str]:
    """Names of modules and tokens in other options that the model does not have. PEFT takes most of them in silence."""
    modules = [name for name, _ in model.named_modules()]
    leaves = {name.split(".")[-1] for name in modules}
    problems = []
    excluded = lora.options.get("exclude_modules")
    for option, wanted in (("modules_to_save", lora.modules_to_save), ("options.exclude_modules", excluded)):
        for name in wanted if isinstance(wanted, list) else []:
            if not any(known == name or known.endswith(f".{name}") for known in modules):
                problems.append(f"lora.{option}: {name!r} matches no module of this model{did_you_mean(name, leaves)}")
    tokens = lora.options.get("trainable_token_indices")
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens is not None:
        lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
        numbers = [number for part in lists for number in (part if isinstance(part, list) else [part])]
        if not numbers or not all(type(number) is int and 0 <= number < rows for number in numbers):
            problems.append(f"lora.options.trainable_token_indices: expects a list of token ids from 0 to {rows - 1}")
    for option in ("rank_pattern", "alpha_pattern"):
        pattern = lora.options.get(option, {})
        whole = option == "rank_pattern"
        good = isinstance(pattern, dict) and all(
            type(value) in ((int,) if whole else (int, float)) and value > 0 for value in pattern.values()
        )
        if not good:
            kind = "whole number" if whole else "number"
            problems.append(f"lora.options.{option}: expects module names, each with a {kind} above 0")
    return problems


def _unmatched_patterns(model: nn.Module, lora: LoraRecipe) -> list[str]:
    """Patterns and layer numbers that none of the adapted modules answers to."""
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    problems = []
    for option in ("rank_pattern", "alpha_pattern"):
        for key in lora.options.get(option, {}):
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in adapted):
                hint = did_you_mean(key, {name.split(".")[-1] for name in adapted})
                problems.append(f"lora.options.{option}: {key!r} matches no adapted module{hint}")
    layers = lora.options.get("layers_to_transform")
    for number in layers if isinstance(layers, list) else [layers]:
        if number is not None and not any(f".{number}." in name for name in adapted):
            problems.append(f"lora.options.layers_to_transform: no adapted module is in layer {number}")
    return problems


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

    from thriftune.model_files import tensor_shapes

    try:
        tensor_shapes(path)
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except (ModelError, SafetensorError, OSError) as error:
        raise CheckpointError(
            given=str(getattr(error, "given", f"{path} cannot be read: {error}")),
            allowed="an adapter or checkpoint that was written to its end",
            do="take an earlier checkpoint, or train again",
        ) from None


def compare_tensors(path: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless both have the same names and shapes and what was found is finite."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    odd = [name for name in sorted(found.keys() & expected.keys()) if found[name].shape != expected[name].shape]
    if missing or unexpected or odd:
        parts = [
            f"{len(names)} {word} (first: {names[0]})"
            for names, word in ((missing, "missing"), (unexpected, "unexpected"), (odd, "of another shape"))
            if names
        ]
        raise CheckpointError(
            given=f"{path} does not belong to this model and recipe: tensors {', '.join(parts)}",
            allowed="exactly the tensors of this model's adapter",
            do="use the model and the recipe that it was trained with",
        )
    broken = [name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointError(
            given=f"{path} has values that are not finite in {len(broken)} tensors (first: {broken[0]})",
            allowed="finite weights",
            do="take an earlier checkpoint, or train again with a lower learning rate",
        )
