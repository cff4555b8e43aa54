"""The `shrink` verb: a finished adapter cut to a share of its parameters, by the mathematics of method dynamic.

Only the adapter's files are read: its singular directions are its own, whatever base it lies on.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from thriftune.errors import InputError, ModelError
from thriftune.infer.merge import folder_written_whole, refuse_taken
from thriftune.lowrank import LowRank, lowrank_svd
from thriftune.methods.cuts import directions_to_keep, energy
from thriftune.methods.lora import ADAPTER_FILE, CONFIG_FILE, REPLACES_BASE, read_tensors
from thriftune.methods.ranked import config_of_ranks
from thriftune.recipe import DynamicRecipe
from thriftune.target import adapter_config, find_adapter

A_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_A\.weight")
OF_A_CHECKPOINT = ("optimizer.safetensors", "optimizer.json", "state.json", "manifest.json")


@dataclass(frozen=True)
class _Pair:
    """A module's factors as they are stored, and the scale of their product."""

    b: Tensor
    a: Tensor
    scale: float

    @property
    def size(self) -> int:
        """Parameters of one direction."""
        return self.b.shape[0] + self.a.shape[1]


def shrink(name: str, output: Path, keep: float, round_to: int | None) -> dict[str, Any]:
    """Write an adapter with at most `keep` of a target's adapter's parameters to `output`. Returns what to print.

    Raises InputError for a target without an adapter or a share out of range, ModelError for an adapter of another kind
    than plain LoRA, OutputError when `output` is taken. After an error there is no `output`.
    """
    if not 0 < keep <= 1 or (round_to is not None and round_to < 1):
        given = f"--keep {keep:g}" if not 0 < keep <= 1 else f"--round-to {round_to}"
        raise InputError(given=given, allowed="a share above 0, up to 1; whole blocks of 1 or more", do="correct it")
    _, adapter = find_adapter(name, "shrink")
    refuse_taken(output)
    config = adapter_config(adapter / CONFIG_FILE)
    tensors = read_tensors(adapter / ADAPTER_FILE)
    pairs = _pairs(adapter, tensors, config)
    views = {module: lowrank_svd(pair.b.double(), pair.a.double()) for module, pair in pairs.items()}
    whole = sum(pair.a.shape[0] * pair.size for pair in pairs.values())
    kept = directions_to_keep(
        {module: energy(pairs[module].scale * view.values_R, pairs[module].size) for module, view in views.items()},
        {module: pair.size for module, pair in pairs.items()},
        budget=int(keep * whole),
        block=round_to or DynamicRecipe().round_to,
        least=0,
    )
    if not any(kept.values()):
        raise InputError(
            given=f"--keep {keep:g} of {whole:,} parameters leaves no whole block of directions in any module",
            allowed="a share in which at least one fits",
            do="raise --keep, or lower --round-to",
        )
    with folder_written_whole(output) as folder:
        _write(folder, adapter, tensors, config, pairs, views, kept)
    return {
        "shrunk": str(output),
        "adapter": str(adapter),
        "parameters_before": whole,
        "parameters_after": sum(len(directions) * pairs[module].size for module, directions in kept.items()),
        "kept_energy": _kept_energy(pairs, views, kept),
        "ranks": {module: len(directions) for module, directions in kept.items()},
    }


def _pairs(folder: Path, tensors: Mapping[str, Tensor], config: Any) -> dict[str, _Pair]:
    from peft.utils.other import get_pattern_key

    odd = [name for name in tensors if "lora_" in name and not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    init = str(config.init_lora_weights).lower()
    if odd or config.use_dora or init in REPLACES_BASE:
        kind = odd[0] if odd else "use_dora" if config.use_dora else f"init_lora_weights={init}"
        raise ModelError(
            given=f"{folder} is no plain LoRA: {kind}",
            allowed="an adapter of pairs lora_A and lora_B over the base as it was",
            do="shrink another adapter, or train with method dynamic",
        )
    found = {}
    for name, a in tensors.items():
        if match := A_NAME.fullmatch(name):
            module = match["module"]
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
            rank = a.shape[0]
            scale = alpha / (rank**0.5 if config.use_rslora else rank)
            found[module] = _Pair(tensors[name.replace(".lora_A.", ".lora_B.")], a, float(scale))
    return found


def _write(
    folder: Path,
    source: Path,
    tensors: Mapping[str, Tensor],
    config: Any,
    pairs: Mapping[str, _Pair],
    views: Mapping[str, LowRank],
    kept: Mapping[str, list[int]],
) -> None:
    """The cut factors, their configuration, and every other file and tensor as it was."""
    from safetensors.torch import save_file

    written = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    for module, directions in kept.items():
        if not directions:
            continue
        pair = pairs[module]
        view, stem = views[module], f"base_model.model.{module}"
        roots_S = view.values_R[directions].sqrt()  # half of each value to either factor
        written[f"{stem}.lora_A.weight"] = (roots_S[:, None] * view.right_RI[directions]).to(pair.a.dtype).contiguous()
        written[f"{stem}.lora_B.weight"] = (view.left_OR[:, directions] * roots_S).to(pair.b.dtype).contiguous()
    save_file(written, folder / ADAPTER_FILE, metadata={"format": "pt"})
    ranks = {module: len(directions) for module, directions in kept.items()}
    config_of_ranks(config, ranks, {module: pair.scale for module, pair in pairs.items()}).save_pretrained(str(folder))
    for path in source.iterdir():
        if path.is_file() and path.name not in (ADAPTER_FILE, CONFIG_FILE, *OF_A_CHECKPOINT):
            shutil.copy2(path, folder / path.name)


def _kept_energy(pairs: Mapping[str, _Pair], views: Mapping[str, LowRank], kept: Mapping[str, list[int]]) -> float:
    """The share of the squared norm of all modules' updates that stays."""
    total = stays = 0.0
    for module, view in views.items():
        energies = (pairs[module].scale * view.values_R).square()
        total += float(energies.sum())
        stays += float(energies[kept[module]].sum())
    return stays / total if total else 1.0
