"""A merge that never has a whole 16-bit model in memory: the base's files, one tensor at a time, into files of the same
names.

Each linear that has an adapter becomes W + scale B A, added in float32 and rounded once to the stored type. W is the
value that was trained against: the stored one in the base's type, and of a 4-bit base quantised as loading does and
de-quantised. Where that covers the adapter, the files hold what merging the whole model would have written; on a GPU,
whose products of B and A may be rounded otherwise, to the last place.

Shape legend: O rows of a matrix, I columns.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thriftune.errors import ModelError
from thriftune.methods.full import STORED_DTYPES
from thriftune.methods.lora import REPLACES_BASE
from thriftune.model_files import tensor_shapes, weight_files
from thriftune.models.outline import Weights
from thriftune.models.surgery import as_in_four_bits
from thriftune.recipe import QuantRecipe

STORED = {dtype: name for name, dtype in STORED_DTYPES.items()}
ROWS_COUNTED = 4096  # at once, of a matrix: what is counted needs no second one of its size
LEAST_KEPT = 0.5  # of the update, along itself; less than this and rounding has swallowed it


@dataclass
class Kept:
    """What of the update is in the tensors that were written, over all that have one: `added` is their difference from
    the base's value, `wanted` scale B A."""

    tensors: int = 0
    added_by_wanted: float = 0.0
    wanted_squared: float = 0.0
    missed_squared: float = 0.0

    def add(self, added_OI: Tensor, wanted_OI: Tensor) -> None:
        self.tensors += 1
        for added, wanted in zip(added_OI.split(ROWS_COUNTED), wanted_OI.split(ROWS_COUNTED), strict=True):
            self.added_by_wanted += float((added * wanted).sum(dtype=torch.float64))
            self.wanted_squared += float((wanted * wanted).sum(dtype=torch.float64))
            self.missed_squared += float((added - wanted).square().sum(dtype=torch.float64))

    @property
    def share(self) -> float:
        """<added, wanted> / |wanted|^2: 1 where rounding only adds noise, 0 where it swallows the update."""
        return self.added_by_wanted / self.wanted_squared if self.wanted_squared else 1.0

    @property
    def noise(self) -> float:
        """|added - wanted| / |wanted|."""
        return (self.missed_squared / self.wanted_squared) ** 0.5 if self.wanted_squared else 0.0

    def refuse_a_lost_update(self) -> None:
        """Raise ModelError when rounding has swallowed most of it."""
        if not self.share >= LEAST_KEPT:  # also when it is NaN
            raise ModelError(
                given=f"of the adapter's update {self.share:.2%} is in the merged weights",
                allowed=f"a merge that keeps the tune (at least {LEAST_KEPT:.0%} of the update)",
                do="serve the adapter unmerged: rounding to the base's stored type would swallow it",
            )


@dataclass(frozen=True)
class FileMerge:
    """`updates` are PEFT's layers by the name of their weight, `quantised` the weights that were trained against in 4
    bits. Values are of type `base_dtype` when something is added, of `dtype` in the files."""

    sources: dict[Path, list[str]]
    shapes: dict[str, list[int]]
    updates: dict[str, Any]
    quantised: set[str]
    quant: QuantRecipe | None
    base_dtype: torch.dtype
    dtype: torch.dtype
    device: torch.device
    kept: Kept = field(default_factory=Kept)

    def write(self, folder: Path) -> Kept:
        """Raises ModelError where a merged weight is not finite."""
        from safetensors import safe_open

        for path, names in self.sources.items():
            with safe_open(path, framework="pt") as file, (folder / path.name).open("wb") as written:
                written.write(header_of({name: self.shapes[name] for name in names}, self.dtype))
                for name in names:
                    tensor = self.merged(name, file.get_tensor(name)).cpu().contiguous()
                    written.write(tensor.flatten().view(torch.uint8).numpy().data)
        self._write_index(folder)
        return self.kept

    @torch.no_grad()
    def merged(self, name: str, stored: Tensor) -> Tensor:
        """The tensor of that name as it is written; on the device only where there is something to compute."""
        value = stored.to(self.base_dtype)
        if name in self.quantised:
            assert self.quant is not None
            value = as_in_four_bits(value.to(self.device), self.quant, self.device)
        if name not in self.updates:
            return value.to(self.dtype)
        value = value.to(self.device)
        wanted_OI = self.updates[name].get_delta_weight("default").float()
        result_OI = (value.float() + wanted_OI).to(self.dtype)
        if not bool(torch.isfinite(result_OI).all()):
            raise ModelError(
                given=f"the adapter cannot be merged: {name} would have values that are not finite",
                allowed="an adapter of finite weights that adds to its base's weights",
                do="serve the adapter unmerged",
            )
        self.kept.add(result_OI.to(torch.float32, copy=True).sub_(value), wanted_OI)
        return result_OI

    def _write_index(self, folder: Path) -> None:
        if [path.name for path in self.sources] == ["model.safetensors"]:
            return
        weight_map = {name: path.name for path, names in self.sources.items() for name in names}
        size = sum(_bytes_of(self.shapes[name], self.dtype) for name in weight_map)
        content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(content, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def header_of(shapes: dict[str, list[int]], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file whose tensors follow in this order, all of one type."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + _bytes_of(shape, dtype)
        content[name] = {"dtype": STORED[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def why_not_this_adapter(config: Any) -> str | None:
    """What of an adapter's configuration needs the whole model, in words; None when nothing does."""
    if str(config.init_lora_weights).lower() in REPLACES_BASE:
        return "its start replaced the base's weights"
    if config.use_dora:
        return "DoRA scales whole columns of the base"
    for option in ("lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters"):
        if getattr(config, option, None):
            return f"more than matrices that are added ({option})"
    return None if config.bias == "none" else "biases were trained too"


def file_merge(
    weights: Weights,
    adapted: nn.Module,
    folder: Path,
    *,
    quant: QuantRecipe | None,
    base_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> FileMerge | str:
    """The merge of the files in `folder`, or in words why it needs the whole model. `adapted` is PEFT's model around
    the outline that `weights` are of."""
    from peft.tuners.lora import Linear, LoraLayer

    updates: dict[str, Any] = {}
    for name, module in adapted.get_base_model().named_modules():  # type: ignore[operator]
        if isinstance(module, LoraLayer):
            if type(module) is not Linear or module.lora_variant or list(module.active_adapters) != ["default"]:
                return f"an adapter on {name} that is no pair of matrices beside a linear"
            updates[f"{name}.weight"] = module
    if quant is not None and weights.transposed:
        return "its linears are stored the other way round, and quantised"
    sources: dict[Path, list[str]] = {}
    for path in weight_files(folder):
        for name, (kind, shape) in tensor_shapes(path).items():
            if name in weights.tied:
                return f"its files have {name} beside the tensor that it is tied to"
            if name not in weights.shapes:
                continue  # loading leaves it out too
            if weights.shapes[name] != shape or kind not in STORED.values():
                return f"{name} is stored in another form than the model's"
            sources.setdefault(path, []).append(name)
    stored = {name for names in sources.values() for name in names}
    if missing := sorted((weights.shapes.keys() | updates.keys()) - stored):
        return f"its files have no tensor of the name {missing[0]}"
    quantised = weights.quantised if quant is not None else set()
    return FileMerge(sources, weights.shapes, updates, quantised, quant, base_dtype, dtype, device)


def _bytes_of(shape: list[int], dtype: torch.dtype) -> int:
    return dtype.itemsize * math.prod(shape)
