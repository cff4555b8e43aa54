"""A transformers model with PEFT's LoRA on it, read as a program; or the reason why it cannot be.

The frozen weights move into the stacks' buffers, and the model's own linears become views of them: the model goes on
working, and nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thriftune.engine.attention import Kind
from thriftune.engine.fp8 import Fp8Values, fp8_to_be_read, read_fp8
from thriftune.engine.head import Head
from thriftune.engine.layer import Layer, Norm
from thriftune.engine.part import Part
from thriftune.engine.program import Angles, Program
from thriftune.engine.sizes import Keep, working_bytes
from thriftune.engine.takes import DOWN, GATE_UP, LINEARS, OUT, QKV, why_not_model
from thriftune.engine.weights import Stack, padded_rank
from thriftune.kernels.four_bit import FourBit


def base_of(model: Any) -> Any:
    """The transformers model under PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def why_not(model: nn.Module) -> str | None:
    """What the engine cannot compute of this model, in words; None when it can compute all of it."""
    from peft.tuners.lora import Linear, LoraLayer

    linears: tuple[type, ...] = (Linear,)
    if getattr(base_of(model), "is_loaded_in_4bit", False):
        from peft.tuners.lora.bnb import Linear4bit

        linears = (Linear, Linear4bit)
    base = base_of(model)
    config = base.config
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if reason := why_not_model(config.model_type, getattr(config, "hidden_act", ""), rope_type):
        return reason
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if not isinstance(module, linears) or name.rsplit(".", 1)[-1] not in LINEARS:
            return f"an adapter on {name}"
        if reason := _why_not_adapter(module):
            return f"{reason} on {name}"
    lora = {name for name, _ in base.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    others = [name for name, parameter in base.named_parameters() if parameter.requires_grad and name not in lora]
    return f"{others[0]} is trained too" if others else None


def _why_not_adapter(module: Any) -> str | None:
    if list(module.active_adapters) != ["default"] or module.merged:
        return "more than one adapter, or a merged one,"
    if getattr(module, "lora_variant", None):
        return "a variant of LoRA"
    if not isinstance(module.lora_dropout["default"], (nn.Identity, nn.Dropout)):
        return f"dropout of another kind ({type(module.lora_dropout['default']).__name__})"
    if module.lora_B["default"].bias is not None:
        return "a bias of the adapter"
    if getattr(module, "fan_in_fan_out", False):
        return "a transposed weight"
    return None


def read_program(model: nn.Module, longest: int, rank_multiple: int, fp8: bool) -> Program:
    """The program of a model for which `why_not` is None; `longest` is the longest row it will see, in tokens; ranks
    are padded to a multiple of `rank_multiple`; with `fp8` the frozen products of the layers are in 8-bit floats."""
    base = base_of(model)
    inner, config = base.model, base.config
    with torch.no_grad():
        shared = SharedBuffers(rank_multiple, base.lm_head.weight, fp8)  # the embedding may lie on the host
        layers = [_layer(module, config, number, shared) for number, module in enumerate(inner.layers)]
        _find_traces([stack for layer in layers for stack in layer.stacks if stack.shared])
        weight_VD = base.lm_head.weight
        positions = torch.arange(longest, device=weight_VD.device)[None]
        cos, sin = inner.rotary_emb(weight_VD[:1], positions)
    half = cos.shape[-1] // 2
    return Program(
        embedding_VD=inner.embed_tokens.weight.detach(),
        layers=layers,
        angles=Angles(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()),
        head=Head(
            _norm(inner.norm),
            weight_VD.detach(),
            max(working_bytes(layer.sizes, Keep.ALL, weight_VD.element_size(), fp8) for layer in layers),
        ),
        base=base,
        rank_multiple=rank_multiple,
    )


def follow_adapters(program: Program) -> None:
    """Take over the adapters as the model has them now: with other factors, of other ranks, or gone. Buffers change
    their size one after the other, so that never two models lie in memory. Not with products in 8-bit floats."""
    assert not program.fp8, "recipes with ranks that change refuse precision=fp8"
    found: list[tuple[Stack, tuple[str, ...], list[Part]]] = []
    for number, (layer, module) in enumerate(zip(program.layers, program.base.model.layers, strict=True)):
        parents = (module.self_attn, module.self_attn, module.mlp, module.mlp)
        for stack, parent, names in zip(layer.stacks, parents, (QKV, OUT, GATE_UP, DOWN), strict=True):
            found.append((stack, names, _parts(parent, names, number)))
    ranks = {id(stack): padded_rank(parts, program.rank_multiple) for stack, _, parts in found}
    for members in _that_share([stack for stack, _, _ in found]):
        largest = max(ranks[id(stack)] for stack in members)
        ranks.update({id(stack): largest for stack in members})
    with torch.no_grad():
        shared = SharedBuffers(program.rank_multiple, program.embedding_VD, fp8=False)
        for stack, names, parts in found:
            rank, common = ranks[id(stack)], None
            if stack.packed:
                common = stack.home if rank == stack.rank else shared.of(names, stack.size_out, stack.size_in, rank)
            stack.take_up(parts, rank, common)
    _find_traces([stack for stack, _, _ in found if stack.packed])
    program.forget_copies()


def _that_share(stacks: Sequence[Stack]) -> list[list[Stack]]:
    """The stacks of 4-bit weights, by the buffer that they share."""
    groups: dict[int, list[Stack]] = {}
    for stack in stacks:
        if stack.packed:
            groups.setdefault(stack.home.data_ptr(), []).append(stack)
    return list(groups.values())


def _layer(module: Any, config: Any, number: int, shared: SharedBuffers) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    head_size = attention.head_dim
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Layer(
        input_norm=_norm(module.input_layernorm),
        qkv=_stack(attention, QKV, number, shared),
        query_norm=_norm(query_norm) if query_norm is not None else None,
        key_norm=_norm(key_norm) if key_norm is not None else None,
        o=_stack(attention, OUT, number, shared),
        mlp_norm=_norm(module.post_attention_layernorm),
        gate_up=_stack(mlp, GATE_UP, number, shared),
        down=_stack(mlp, DOWN, number, shared),
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_size=head_size,
        attention=Kind(float(attention.scaling), _window(attention, config)),
    )


def _window(attention: Any, config: Any) -> int | None:
    """Tokens that a token may look back on, itself included, or None."""
    if config.model_type == "mistral":
        return config.sliding_window
    return getattr(attention, "sliding_window", None)


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), float(module.variance_epsilon))


@dataclass
class SharedBuffers:
    """What 4-bit layers are unpacked into, one buffer for each of a layer's stacks, by linears and sizes: the stacks of
    one layer are there at once, so they never share. Products are in the type of `like`, or with `fp8` in 8 bits."""

    rank_multiple: int
    like: Tensor
    fp8: bool
    buffers: dict[tuple[Sequence[str], int, int, int], Tensor] = field(default_factory=dict)
    fp8_values: dict[tuple[Sequence[str], int, int, int], Fp8Values] = field(default_factory=dict)

    def of(self, names: Sequence[str], size_out: int, size_in: int, rank: int) -> Tensor:
        key = (names, size_out, size_in, rank)
        if key not in self.buffers:
            self.buffers[key] = self.like.new_zeros(size_out + rank, size_in + rank)
        return self.buffers[key]

    def values_of(self, names: Sequence[str], size_out: int, size_in: int, rank: int) -> Fp8Values:
        key = (names, size_out, size_in, rank)
        if key not in self.fp8_values:
            self.fp8_values[key] = Fp8Values.empty(size_out, size_in, rank, self.like.device)
        return self.fp8_values[key]


def _stack(parent: Any, names: Sequence[str], number: int, shared: SharedBuffers) -> Stack:
    """One stack of linears of the layer of this number. 16-bit weights are copied into its buffer, and the linears
    become views of it; with products in 8-bit floats the linears keep them."""
    parts = _parts(parent, names, number)
    linears = [part.linear for part in parts]
    size_in, size_out = linears[0].in_features, parts[-1].rows.stop
    rank = padded_rank(parts, shared.rank_multiple)
    stack = Stack(parts, size_in, size_out, rank, None, _bias(linears, shared.like))
    if hasattr(linears[0].weight, "quant_state"):
        # Streamed layers have no weights here: `residency.Streaming` gives them theirs while they are visited.
        weights = [linear.weight for linear in linears if linear.weight.quant_state is not None]
        stack.packed, stack.shared = [FourBit.of(weight) for weight in weights], True
    if shared.fp8:
        if stack.shared:
            values = shared.values_of(names, size_out, size_in, rank)
        else:
            values = Fp8Values.empty(size_out, size_in, rank, shared.like.device)
        if stack.shared and not stack.packed:
            stack.fp8 = fp8_to_be_read(size_out, size_in, rank, values, shared.like)
        else:
            stack.fp8 = read_fp8(parts, stack.packed, size_in, rank, values, shared.like)
    elif stack.shared:
        stack.buffer_YX = shared.of(names, size_out, size_in, rank)
    else:
        stack.buffer_YX = shared.like.new_zeros(size_out + rank, size_in + rank)
        for part in parts:
            place = stack.buffer_YX[part.rows, :size_in]
            place.copy_(part.linear.weight)
            part.linear.weight = nn.Parameter(place, requires_grad=False)
    return stack


def _find_traces(stacks: Sequence[Stack]) -> None:
    """Mark the stacks of a shared buffer whose adapters do not all lie in the same places of it."""
    layouts: dict[int, set[tuple[Any, ...]]] = {}
    for stack in stacks:
        layout = tuple((part.rows.start, part.ranks.start, part.ranks.stop) for part in stack.parts)
        layouts.setdefault(stack.home.data_ptr(), set()).add(layout)
    for stack in stacks:
        stack.leaves_traces = len(layouts[stack.home.data_ptr()]) > 1


def _parts(parent: Any, names: Sequence[str], number: int) -> list[Part]:
    parts, first_row, first_rank = [], 0, 0
    for name in names:
        module = getattr(parent, name)
        linear = getattr(module, "base_layer", module)
        of_model = number * len(LINEARS) + LINEARS.index(name)
        part = Part(slice(first_row, first_row + linear.out_features), linear, of_model)
        first_row = part.rows.stop
        if linear is not module:
            part.a, part.b = module.lora_A["default"].weight, module.lora_B["default"].weight
            part.scale = float(module.scaling["default"])
            part.dropout = float(getattr(module.lora_dropout["default"], "p", 0.0))
            part.ranks = slice(first_rank, first_rank + part.a.shape[0])
            first_rank = part.ranks.stop
        parts.append(part)
    return parts


def _bias(linears: Sequence[Any], like: Tensor) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    absent = [
        linear.bias.detach() if linear.bias is not None else like.new_zeros(linear.out_features) for linear in linears
    ]
    return torch.cat(absent)
