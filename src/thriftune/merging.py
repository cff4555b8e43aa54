"""The `merge` verb: open a target, fold the adapter in, write, reload what was written, compare."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from thriftune.data import encode_prompt
from thriftune.errors import InputError
from thriftune.infer.merge import compare, merge_adapter, probe_logits, refuse_a_lost_tune, write_merged
from thriftune.models import load_model
from thriftune.recipe import ModelRecipe
from thriftune.target import attach_adapter, find_target, load_base

PROBES = (
    "What is the capital of France, and why is it known?",
    "This film was far too long, but the ending made up for it.",
    "Tom has 12 apples and gives 5 to Anna. How many are left?",
    "Write one sentence about the sea.",
)


def merge(name: str, output: Path, device: torch.device) -> dict[str, Any]:
    """Merge a run's adapter into its base and write a whole model to `output`. Returns what to print.

    Raises InputError when the target has no adapter, ModelError when the written model is not the tuned one.
    """
    target = find_target(name)
    if target.adapter is None:
        raise InputError(given=f"{name} has no adapter to merge", allowed="a lora or qlora run, or an adapter's folder",
                         do="use it as it is: it is a whole model already")
    loaded = load_base(target, device)
    data = target.recipe.data
    probes = [encode_prompt([{"role": "user", "content": text}], loaded.tokenizer, data) for text in PROBES]
    base_NV = probe_logits(loaded.model, probes)
    adapted = attach_adapter(loaded.model, target.adapter)
    adapter_NV = probe_logits(adapted, probes)
    if target.four_bit:
        plain = adapted.unload()
        adapted = attach_adapter(plain.dequantize(), target.adapter)
    dtype = loaded.base_dtype if loaded.base_dtype == torch.float32 and not target.four_bit else torch.bfloat16
    stored = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    dtype = stored.get(loaded.description.stored_dtype or "", dtype)
    write_merged(merge_adapter(adapted), loaded.tokenizer, output, dtype)
    del adapted
    again = load_model(ModelRecipe(name=str(output)), device=device, dtype=loaded.base_dtype, quant=None)
    check = compare(adapter_NV, base_NV, probe_logits(again.model, probes))
    refuse_a_lost_tune(check, lambda: shutil.rmtree(output))
    return {"merged": str(output), "base": target.base.name, "adapter": str(target.adapter),
            "dtype": str(dtype).removeprefix("torch."), **dataclasses.asdict(check)}
