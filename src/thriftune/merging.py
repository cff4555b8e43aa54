"""The `merge` verb: fold the adapter in, write, reload what was written, compare.

The base's files are gone through tensor by tensor (`infer.merge_files`), so that no whole 16-bit model is needed to
write one. An adapter that this cannot merge has its base loaded whole, and the result says why.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thriftune.data import encode_prompt
from thriftune.engine.host_memory import available_bytes
from thriftune.engine.room import free_bytes
from thriftune.errors import DoesNotFitError, first_line
from thriftune.infer.merge import (
    MergeCheck,
    compare,
    folder_written_whole,
    merge_adapter,
    probe_logits,
    refuse_a_lost_tune,
    refuse_taken,
    write_model,
)
from thriftune.infer.merge_files import FileMerge, Kept, file_merge, why_not_this_adapter
from thriftune.methods.full import STORED_DTYPES
from thriftune.models import LoadedModel, describe_model, load_model, load_tokenizer, weight_files
from thriftune.models.load import ModelDescription, choose_dtype
from thriftune.models.outline import Weights, outline, write_description
from thriftune.models.surgery import dequantise
from thriftune.recipe import DataRecipe, ModelRecipe
from thriftune.run_path import hold_memory
from thriftune.target import Target, adapter_config, attach_adapter, find_adapter, load_base

# A 16-bit model is loaded to compare logits where it leaves this free: what the probes compute with.
WORKING_BYTES = 1024**3
PROBES = (
    "What is the capital of France, and why is it known?",
    "This film was far too long, but the ending made up for it.",
    "Tom has 12 apples and gives 5 to Anna. How many are left?",
    "Write one sentence about the sea.",
)


@dataclass(frozen=True)
class ByTensor:
    files: FileMerge
    network: nn.Module
    tokenizer: Any


@dataclass(frozen=True)
class Probed:
    """What the written model must answer to the probes: float32 logits before and after the adapter was put on."""

    probes: list[list[int]]
    base_NV: Tensor  # noqa: N815
    adapter_NV: Tensor  # noqa: N815


def merge(name: str, output: Path, device: torch.device) -> dict[str, Any]:
    """Merge a run's adapter into its base and write a whole model to `output`. Returns what to print.

    Where a whole 16-bit model fits on the device, the logits of what was written are compared with the adapter's; else
    it is counted how much of the update is in the tensors that were written, and the result's `positions` is None.

    Raises InputError when the target has no adapter, OutputError when `output` is taken, DoesNotFitError, and
    ModelError when the written model is not the tuned one. After an error there is no `output`.
    """
    target, adapter = find_adapter(name, "merge")
    refuse_taken(output)
    hold_memory(device, target.recipe, 0)
    try:
        return _merge(target, adapter, output, device)
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            given=f"merging into {target.base.name} runs out of memory on {device}: {first_line(error)}",
            allowed="a device with room for its largest tensor several times over",
            do="merge on the CPU: put CUDA_VISIBLE_DEVICES= (set to nothing) before the command",
        ) from None


def _merge(target: Target, adapter: Path, output: Path, device: torch.device) -> dict[str, Any]:
    description = describe_model(target.base)
    dtype = STORED_DTYPES.get(description.stored_dtype or "", torch.bfloat16)
    ready = by_tensor(target, adapter, description, dtype, device)
    if isinstance(ready, str):
        check = merge_whole(target, adapter, output, dtype, device)
        return _told(target, adapter, output, dtype, check, None, ready)
    probed = _probed(target, adapter, device) if _fits(target, description, device) else None
    with folder_written_whole(output) as folder:
        kept = ready.files.write(folder)
        write_description(ready.network, ready.tokenizer, folder, dtype)
        if probed is not None:
            written = _check(probed, folder, choose_dtype(target.base, device), dtype, device)
        else:
            weight_files(folder)  # each is there and of the size that its header says
            kept.refuse_a_lost_update()
            written = None
    return _told(target, adapter, output, dtype, written, kept, None)


def by_tensor(
    target: Target, adapter: Path, description: ModelDescription, dtype: torch.dtype, device: torch.device
) -> ByTensor | str:
    """How to merge an adapter into its base's files, or in words why that needs the whole model."""
    tokenizer = load_tokenizer(target.base, description.folder)
    if target.base.trust_remote_code:
        return "its model's code comes with it"
    if reason := why_not_this_adapter(adapter_config(adapter / "adapter_config.json")):
        return reason
    network = outline(description.folder, target.base.attn_implementation, device)
    weights = Weights.of(network)
    files = file_merge(
        weights,
        attach_adapter(network, adapter),
        description.folder,
        quant=target.recipe.quant if target.four_bit else None,
        base_dtype=choose_dtype(target.base, device),
        dtype=dtype,
        device=device,
    )
    return files if isinstance(files, str) else ByTensor(files, network, tokenizer)


def merge_whole(target: Target, adapter: Path, output: Path, dtype: torch.dtype, device: torch.device) -> MergeCheck:
    """The same with the base loaded whole, for any adapter that PEFT can merge."""
    loaded = load_base(target, device)
    probes = _probes(loaded, target.recipe.data)
    base_NV = probe_logits(loaded.model, probes)
    adapted = attach_adapter(loaded.model, adapter)
    probed = Probed(probes, base_NV, probe_logits(adapted, probes))
    plain: Any = None
    if target.four_bit:
        plain = adapted.unload()  # type: ignore[operator]
        adapted = attach_adapter(dequantise(plain), adapter)
    with folder_written_whole(output) as folder:
        write_model(merge_adapter(adapted), loaded.tokenizer, folder, dtype)
        base_dtype = loaded.base_dtype
        plain = None
        del adapted, loaded  # two models at a time would not fit where one just does
        return _check(probed, folder, base_dtype, dtype, device)


def _fits(target: Target, description: ModelDescription, device: torch.device) -> bool:
    """Whether the device holds the whole model in the type that it is loaded in."""
    free = free_bytes(device) if device.type == "cuda" else available_bytes()
    needed = description.total_parameters * choose_dtype(target.base, device).itemsize + WORKING_BYTES
    return free is None or needed <= free


def _probed(target: Target, adapter: Path, device: torch.device) -> Probed:
    loaded = load_base(target, device)
    probes = _probes(loaded, target.recipe.data)
    base_NV = probe_logits(loaded.model, probes)
    return Probed(probes, base_NV, probe_logits(attach_adapter(loaded.model, adapter), probes))


def _check(
    probed: Probed, folder: Path, dtype: torch.dtype, stored_dtype: torch.dtype, device: torch.device
) -> MergeCheck:
    """What was written, loaded again in the type that the adapter's base had. Raises ModelError when it is not the
    tuned model."""
    again = load_model(ModelRecipe(name=str(folder)), device=device, dtype=dtype, quant=None)
    check = compare(probed.adapter_NV, probed.base_NV, probe_logits(again.model, probed.probes))
    refuse_a_lost_tune(check, rounded=not dtype == stored_dtype == torch.float32)
    return check


def _told(
    target: Target,
    adapter: Path,
    output: Path,
    dtype: torch.dtype,
    check: MergeCheck | None,
    kept: Kept | None,
    whole: str | None,
) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(MergeCheck)]
    return {
        "merged": str(output),
        "base": target.base.name,
        "adapter": str(adapter),
        "dtype": str(dtype).removeprefix("torch."),
        **(dataclasses.asdict(check) if check else dict.fromkeys(names)),
        "tensors": kept.tensors if kept else None,
        "kept": kept.share if kept else None,
        "rounding": kept.noise if kept else None,
        "loaded_whole": whole,
    }


def _probes(loaded: LoadedModel, data: DataRecipe) -> list[list[int]]:
    positions = loaded.description.max_positions
    if positions is not None:
        data = data.model_copy(update={"max_length": min(data.max_length, positions)})
    return [encode_prompt([{"role": "user", "content": text}], loaded.tokenizer, data) for text in PROBES]
