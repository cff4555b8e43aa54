"""Parameters in an optimizer replaced by others, with AdamW's two moments carried through the change.

The gradient of a new parameter is `left` @ that of the old one @ `right`. The first moment, a mean of gradients, goes
through the same product exactly. The second, a mean of their squares, goes through it with squared factors, which is
exact where gradients are independent of each other. The number of steps stays, so that no warm-up of the moments starts
again. 8-bit states are dequantised, carried and quantised again, block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thriftune.methods.base import Replacement

BLOCK = 256  # numbers that share a scale in bitsandbytes' 8-bit states
# An optimizer's first and second moment, by their names in its state.
MOMENTS = (("exp_avg", "exp_avg_sq"), ("state1", "state2"))


def replace_parameters(optimizer: torch.optim.Optimizer, replacements: Sequence[Replacement]) -> None:
    """Have the optimizer train the new parameters, in the old ones' places. The old ones and their states are let go.

    Without this it would go on with tensors that no model uses, and nothing would be trained."""
    by_old = {id(replacement.old): replacement for replacement in replacements}
    for group in optimizer.param_groups:
        live = []
        for parameter in group["params"]:
            replacement = by_old.get(id(parameter))
            if replacement is None:
                live.append(parameter)
                continue
            state = optimizer.state.pop(parameter, {})
            if replacement.new is not None:
                live.append(replacement.new)
                if state:
                    optimizer.state[replacement.new] = _carried(state, replacement, replacement.new)
        group["params"] = live


def held_bytes(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Of these parameters, their gradients and the optimizer's states, counted from the tensors' sizes."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    once = {value.data_ptr(): value.nbytes for value in states}  # 8-bit states share the map of their values
    return sum(2 * parameter.nbytes for parameter in parameters) + sum(once.values())


def _carried(state: dict[str, Any], replacement: Replacement, new: nn.Parameter) -> dict[str, Any]:
    first, second = next(names for names in MOMENTS if names[0] in state)
    found = {name: value for name, value in state.items() if name not in (first, second)}
    for number, name in ((1, first), (2, second)):
        moment = _turned(_plain(state, name, number, new.device), replacement, power=number)
        found |= _as_before(moment, state, name, number)
    return found


def _turned(moment: Tensor, replacement: Replacement, power: int) -> Tensor:
    if replacement.left is not None:
        moment = replacement.left.to(moment.dtype).pow(power) @ moment
    if replacement.right is not None:
        moment = moment @ replacement.right.to(moment.dtype).pow(power)
    return moment.contiguous()


def _plain(state: dict[str, Any], name: str, number: int, device: torch.device) -> Tensor:
    """A moment as float32 on the parameter's device."""
    stored: Tensor = state[name].to(device)  # paged states look like tensors of the CPU
    if stored.dtype != torch.uint8:
        return stored
    from bitsandbytes.functional import dequantize_blockwise

    scales, values = state[f"absmax{number}"], state[f"qmap{number}"]
    plain: Tensor = dequantize_blockwise(stored, absmax=scales, code=values, blocksize=BLOCK)
    return plain


def _as_before(moment: Tensor, state: dict[str, Any], name: str, number: int) -> dict[str, Any]:
    """The moment in the type that the state had it in, with its scales where it has some."""
    old = state[name]
    if old.dtype != torch.uint8:
        return {name: _placed(moment, old)}
    from bitsandbytes.functional import quantize_blockwise

    quantised, scales = quantize_blockwise(moment, code=state[f"qmap{number}"], blocksize=BLOCK)
    return {name: _placed(quantised, old), f"absmax{number}": scales.absmax}


def _placed(value: Tensor, old: Tensor) -> Tensor:
    """A paged state stays in its managed memory, of which bitsandbytes gives nothing back; it uses less of it."""
    if not getattr(old, "is_paged", False):
        return value
    place: Any = old.flatten()[: value.numel()].view(value.shape)
    place.is_paged, place.page_deviceid = True, old.page_deviceid  # type: ignore[attr-defined]
    place.copy_(value)
    return place  # type: ignore[no-any-return]
