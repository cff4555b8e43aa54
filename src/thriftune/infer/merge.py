"""Merge an adapter into its base: in the 16-bit (de-quantised) weights, never into 4-bit ones, and compared after.

Adding the update to NF4 weights and re-quantising erases it: updates of up to 2 % of the weight's norm keep a cosine of
0.03 with themselves. So a 4-bit base is de-quantised to the values it was trained against, and the sum is rounded once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thriftune.errors import ModelError, OutputError

MOST_OF_THE_TUNE = 0.5  # a merged model further from the adapter's than this share of the adapter's effect has lost it


@dataclass(frozen=True)
class MergeCheck:
    """Logits over the probe positions. `difference` is ||merged - adapter|| / ||adapter||, `effect` ||adapter - base||
    / ||adapter||; `same_token` the share of positions where both rank the same token first."""

    difference: float
    effect: float
    max_abs_difference: float
    same_token: float
    positions: int


def probe_logits(model: nn.Module, probes_BT: Sequence[Sequence[int]]) -> Tensor:
    """float32 logits of every position of every probe, one probe at a time: (positions, vocabulary), on the CPU."""
    device = next(model.parameters()).device
    found = []
    with torch.inference_mode():
        for probe in probes_BT:
            tokens_1T = torch.tensor([list(probe)], device=device)
            found.append(model(input_ids=tokens_1T, use_cache=False).logits[0].float().cpu())
    return torch.cat(found)


def merge_adapter(adapted: nn.Module) -> nn.Module:
    """Fold the adapter into its (16-bit or float32) base and return the plain model. Raises ModelError on NaN."""
    if any(hasattr(parameter, "quant_state") for parameter in adapted.parameters()):
        raise ModelError(
            given="the base is still in 4 bits", allowed="a de-quantised base: merging into 4-bit weights loses the tune",
            do="de-quantise it first",
        )
    try:
        merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(
            given=f"the adapter cannot be merged: {str(error).splitlines()[0]}", allowed="finite adapter weights",
            do="train again with a lower learning rate",
        ) from None
    return merged


def write_merged(model: nn.Module, tokenizer: Any, output: Path, dtype: torch.dtype) -> None:
    """Save the plain model and its tokenizer, aside first. Raises OutputError when `output` is taken or unwritable."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(given=f"{output} exists and is not empty", allowed="a new or empty folder", do="name another")
    aside = output.with_name(f".{output.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config
        model.to(dtype).save_pretrained(str(aside))
        tokenizer.save_pretrained(str(aside))
        if output.exists():
            output.rmdir()
        aside.rename(output)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OutputError(
            given=f"{output} cannot be written: {error.strerror or error}", allowed="a folder you may write to, with room",
            do="name another --output",
        ) from None


def compare(adapter_NV: Tensor, base_NV: Tensor, merged_NV: Tensor) -> MergeCheck:
    """How far the merged model's logits are from the adapter's, beside how far the adapter's are from the base's."""
    scale = float(adapter_NV.norm())
    return MergeCheck(
        difference=float((merged_NV - adapter_NV).norm()) / scale,
        effect=float((adapter_NV - base_NV).norm()) / scale,
        max_abs_difference=float((merged_NV - adapter_NV).abs().max()),
        same_token=float((merged_NV.argmax(-1) == adapter_NV.argmax(-1)).float().mean()),
        positions=adapter_NV.shape[0],
    )


def refuse_a_lost_tune(check: MergeCheck, remove: Callable[[], None]) -> None:
    """Raise ModelError, after removing what was written, when the merged model is not the tuned one."""
    if check.effect > 0 and check.difference > MOST_OF_THE_TUNE * check.effect and check.difference > 1e-3:
        remove()
        raise ModelError(
            given=f"the merged model's logits are {check.difference:.1%} away from the adapter's, whose whole effect is "
            f"{check.effect:.1%}",
            allowed=f"a merge that keeps the tune (difference below {MOST_OF_THE_TUNE:.0%} of the effect)",
            do="serve the adapter unmerged, or merge in dtype=float32",
        )
