"""Merge an adapter into its base: in the 16-bit (de-quantised) weights, never into 4-bit ones, and compared after.

Adding the update to NF4 weights and re-quantising erases it: updates of up to 2 % of the weight's norm keep a cosine of
0.03 with themselves. So a 4-bit base is de-quantised to the values it was trained against, and the sum is rounded once.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from thriftune.errors import DiskFullError, ModelError, OutputError, first_line

ROUNDING = 1e-3  # a difference of the logits below this share is rounding, whatever the adapter's effect
# A merged model further from the adapter's than this share of the adapter's effect has lost it: half where 16-bit
# weights are rounded, next to nothing where they stay float32.
MOST_OF_THE_TUNE = 0.5
MOST_IN_FLOAT32 = 0.02


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
            given="the base is still in 4 bits",
            allowed="a de-quantised base: merging into 4-bit weights loses the tune",
            do="de-quantise it first",
        )
    _untie_where_an_adapter_is(adapted)
    try:
        merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:  # PEFT: NaN in the weights, a bias that the base has no place for
        raise ModelError(
            given=f"the adapter cannot be merged: {first_line(error)}",
            allowed="an adapter of finite weights that adds to its base's weights",
            do="serve the adapter unmerged",
        ) from None
    return merged


def _untie_where_an_adapter_is(adapted: Any) -> None:
    """Give the head a matrix of its own where it shares one with an embedding and either has an adapter: what is added
    to one end of the tie would else be added to the other too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = adapted.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    plain: list[Any] = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    if None in plain or plain[0].weight is not plain[1].weight or plain == ends:
        return
    plain[1].weight = nn.Parameter(plain[1].weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = False


def refuse_taken(output: Path) -> None:
    """Raise OutputError unless `output` is a new or an empty folder."""
    try:
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    except OSError as error:
        raise _unwritable(output, error) from None
    if taken:
        raise OutputError(given=f"{output} exists and is not empty", allowed="a new or empty folder", do="name another")


@contextmanager
def folder_written_whole(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into, which takes its name at the end; after any error nothing is left.

    Raises OutputError when `output` is taken or cannot be written to, and DiskFullError when there is no room.
    """
    output = output.resolve()
    refuse_taken(output)
    aside = output.with_name(f".{output.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        umask = os.umask(0)
        os.umask(umask)
        for part in aside.iterdir():
            part.chmod(0o666 & ~umask)
        if output.exists():
            output.rmdir()
        aside.rename(output)
    except (OSError, SafetensorError) as error:
        raise _unwritable(output, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _unwritable(output: Path, error: Exception) -> OutputError | DiskFullError:
    why = getattr(error, "strerror", None) or first_line(error)
    given = f"{output} cannot be written: {why}"
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return DiskFullError(
            given=given, allowed="a disk with room for the whole model", do="free some, or name another"
        )
    return OutputError(given=given, allowed="a folder you may write to", do="name another --output")


def write_model(model: nn.Module, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Save a plain model of type `dtype` and its tokenizer into a folder."""
    network: Any = model
    if getattr(network.config, "quantization_config", None) is not None:
        del network.config.quantization_config
    network.to(dtype).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


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


def refuse_a_lost_tune(check: MergeCheck, rounded: bool) -> None:
    """Raise ModelError when the merged model is not the tuned one. `rounded`: its weights are of a 16-bit type."""
    share = MOST_OF_THE_TUNE if rounded else MOST_IN_FLOAT32
    kept = check.difference <= max(ROUNDING, share * check.effect)  # False when either is NaN
    if not kept:
        raise ModelError(
            given=f"the merged model's logits are {check.difference:.2%} away from the adapter's, whose whole effect "
            f"is {check.effect:.2%}",
            allowed=f"a merge that keeps the tune (difference below {share:.0%} of the effect)",
            do="serve the adapter unmerged"
            + (": rounding to the base's stored type would swallow it" if rounded else ""),
        )
