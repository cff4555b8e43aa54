"""The `merge` verb: open a target, fold the adapter in, write, reload what was written, compare."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from thriftune.data import encode_prompt
from thriftune.infer.merge import (
    compare,
    folder_written_whole,
    merge_adapter,
    probe_logits,
    refuse_a_lost_tune,
    refuse_taken,
    write_model,
)
from thriftune.methods.full import STORED_DTYPES
from thriftune.models import LoadedModel, load_model
from thriftune.models.surgery import dequantise
from thriftune.recipe import DataRecipe, ModelRecipe
from thriftune.target import attach_adapter, find_adapter, load_base

PROBES = (
    "What is the capital of France, and why is it known?",
    "This film was far too long, but the ending made up for it.",
    "Tom has 12 apples and gives 5 to Anna. How many are left?",
    "Write one sentence about the sea.",
)


def merge(name: str, output: Path, device: torch.device) -> dict[str, Any]:
    """Merge a run's adapter into its base and write a whole model to `output`. Returns what to print.

    Raises InputError when the target has no adapter, OutputError when `output` is taken, ModelError when the written
    model is not the tuned one. After an error there is no `output`.
    """
    target, adapter = find_adapter(name, "merge")
    refuse_taken(output)
    loaded = load_base(target, device)
    dtype = STORED_DTYPES.get(loaded.description.stored_dtype or "", torch.bfloat16)
    probes = _probes(loaded, target.recipe.data)
    base_NV = probe_logits(loaded.model, probes)
    adapted = attach_adapter(loaded.model, adapter)
    adapter_NV = probe_logits(adapted, probes)
    if target.four_bit:
        plain: Any = adapted.unload()  # type: ignore[operator]
        adapted = attach_adapter(dequantise(plain), adapter)
    with folder_written_whole(output) as folder:
        write_model(merge_adapter(adapted), loaded.tokenizer, folder, dtype)
        base_dtype = loaded.base_dtype
        del adapted, loaded  # two models at a time would not fit where one just does
        again = load_model(ModelRecipe(name=str(folder)), device=device, dtype=base_dtype, quant=None)
        check = compare(adapter_NV, base_NV, probe_logits(again.model, probes))
        refuse_a_lost_tune(check)
    return {
        "merged": str(output),
        "base": target.base.name,
        "adapter": str(adapter),
        "dtype": str(dtype).removeprefix("torch."),
        **dataclasses.asdict(check),
    }


def _probes(loaded: LoadedModel, data: DataRecipe) -> list[list[int]]:
    positions = loaded.description.max_positions
    if positions is not None:
        data = data.model_copy(update={"max_length": min(data.max_length, positions)})
    return [encode_prompt([{"role": "user", "content": text}], loaded.tokenizer, data) for text in PROBES]
