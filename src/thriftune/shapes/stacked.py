"""LoRA on stacked experts: the families whose expert and router tensors PEFT adapts under their linears' old names.

Since transformers 5 these families keep a layer's experts in two tensors and the router outside any linear. PEFT 0.21
takes the names that the linears had before (`gate_proj`, or Mixtral's `w1`) to mean those tensors, in every layer, and
no longer the linears of the same name in dense layers and shared experts. A text is first made a list of last names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from thriftune.errors import InputError
from thriftune.shapes.shape import Linear, ModelShape

GATE_UP, DOWN, ROUTER = "gate_up_proj", "down_proj", "gate.weight"

# model_type -> old name of a linear -> the tensor that holds it now.
QWEN_NAMES = {"gate": ROUTER, "gate_proj": GATE_UP, "up_proj": GATE_UP, "down_proj": DOWN}
RENAMED: dict[str, dict[str, str]] = {
    "mixtral": {"gate": ROUTER, "w1": GATE_UP, "w3": GATE_UP, "w2": DOWN},
    "olmoe": QWEN_NAMES,
    "qwen3_moe": QWEN_NAMES,
    "deepseek_v3": QWEN_NAMES,
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor that an adapter can sit on: its full path, its last name as above, and its sizes."""

    path: str
    name: str
    linear: Linear


def tensors(shape: ModelShape) -> list[Tensor]:
    """Every stacked tensor and router of a family whose tensors PEFT adapts; none for the others."""
    if shape.model_type not in RENAMED:
        return []
    found = []
    for layer, indices in shape.layers:
        stacked = [linear for linear in layer.linears if not linear.is_module]
        for index in indices:
            found += [Tensor(shape.full_path(linear, index), linear.name, linear) for linear in stacked]
            for linear in stacked:
                if linear.name == GATE_UP:
                    router = Linear(f"mlp.{ROUTER}", linear.in_features, linear.copies, is_module=False)
                    found.append(Tensor(shape.full_path(router, index), ROUTER, router))
    return found


def last_names(shape: ModelShape, target_modules: str, linear_names: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The names that a text stands for in such a family: the `linear_names` and all old ones for all-linear, else the
    last names of the `paths` and tensors that the expression matches."""
    renamed = RENAMED[shape.model_type]
    if target_modules.lower() == "all-linear":
        return sorted({*linear_names, *renamed})
    places = tensors(shape)
    known = [*paths, *(tensor.path for tensor in places), *(tensor.path.removesuffix(".weight") for tensor in places)]
    names = {path.rsplit(".", 1)[-1] for path in known if re.fullmatch(target_modules, path)}
    for tensor in places:
        around = tensor.path.rpartition(".")[0]
        names.update(
            old
            for old, new in renamed.items()
            if tensor.name == new != ROUTER and _matches(target_modules, around, old)
        )
    return sorted(names - {"weight", GATE_UP})  # which are last names of tensors, and of no linear


def _matches(expression: str, around: str, name: str) -> bool:
    return re.fullmatch(expression, f"{around}.{name}") is not None


def split_names(shape: ModelShape, names: Sequence[str]) -> tuple[list[str], set[str]]:
    """The names that still stand for modules, and the tensors that the others stand for.

    Raises InputError when only one of two linears is named that lie in one tensor.
    """
    renamed = RENAMED.get(shape.model_type, {})
    modules, wanted, named = [], set(), set()
    for name in names:
        old = next((old for old in renamed if name == old or name.endswith(f".{old}")), None)
        if old is None:
            modules.append(name)
        else:
            wanted.add(renamed[old])
            named.add(old)
    fused = {old for old, new in renamed.items() if new == GATE_UP}
    if named & fused and not fused <= named:
        raise InputError(
            given=f"target_modules names {', '.join(sorted(named & fused))} of {shape.name} alone",
            allowed=f"{' and '.join(sorted(fused))} together: they lie in one tensor, {GATE_UP}",
            do="name both or neither in lora.target_modules",
        )
    return modules, wanted
