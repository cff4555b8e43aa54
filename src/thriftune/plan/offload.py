"""Memory and time of a run whose 4-bit layers are streamed: what stays, what crosses the link, what hides that.

The choice is the engine's own (`engine.offload`). Layers cross the link once in the forward and once in the backward
pass, whatever the step's length, so there is a length T* from which on the forward pass, the shorter one, hides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from thriftune.catalog.rows import Gpu
from thriftune.engine.offload import (
    GRADIENT_BYTES,
    SLOTS,
    Demand,
    Offload,
    choose_offload,
    fragment_bytes,
    host_bytes,
    least_offload,
    needed_bytes,
)
from thriftune.engine.offload import slab_bytes as bytes_of_slab
from thriftune.engine.sizes import Choice, Keep, later_bytes
from thriftune.plan.engine import EngineCase
from thriftune.plan.engine_memory import gradient_bytes
from thriftune.plan.engine_time import engine_amounts, engine_efficiency_of, engine_time
from thriftune.plan.memory import NF4_BYTES, in_all, optimizer_states, outside
from thriftune.plan.values import PARTS, LimitedBy, Memory, Time, Work
from thriftune.recipe import Recipe
from thriftune.units import format_bytes


@dataclass(frozen=True, slots=True)
class Streamed:
    """How such a run goes, what it takes, and the tokens of a step from which on transfers are hidden (None on a CPU,
    for which no time is known). `least_bytes` is the peak that it could do with."""

    offload: Offload
    memory: Memory
    time: Time | None
    host_bytes: int
    hidden_from_tokens: int | None
    least_bytes: int

    @property
    def choice(self) -> Choice:
        return Choice(Keep.INPUT, self.offload.most_tokens, 0, self.offload.layers)

    @property
    def settings(self) -> dict[str, int | str | None]:
        where = "host" if self.offload.inputs_on_host else "gpu"
        return {
            "layers_resident": self.offload.resident,
            "layers_streamed": self.offload.layers - self.offload.resident,
            "inputs_wait_on": where,
            "host_bytes": self.host_bytes,
            "hidden_from_tokens": self.hidden_from_tokens,
        }

    def notes(self, work: Work) -> list[str]:
        """Sentences without their subject, the method."""
        offload = self.offload
        streamed = offload.layers - offload.resident
        found = [
            f"keeps {offload.resident} of {offload.layers} layers on the GPU and streams {streamed} from the "
            f"computer's memory, of which it pins {format_bytes(self.host_bytes)}",
            f"takes a step layer by layer, in parts of up to {offload.most_tokens:,} tokens; layers keep their input "
            f"alone, on the {'host' if offload.inputs_on_host else 'GPU'}",
        ]
        if self.hidden_from_tokens is not None:
            tokens, needed = round(work.packed.tokens), self.hidden_from_tokens
            how = "so its transfers are hidden" if tokens >= needed else "so it waits for the link"
            found.append(f"hides all transfers from {needed:,} tokens a step on; a step here has {tokens:,}, {how}")
        return found


def streamed(case: EngineCase, recipe: Recipe, work: Work, usable: int) -> Streamed:
    """What the engine will choose with so many `usable` bytes of the GPU."""
    packed = work.packed
    slab = max(bytes_of_slab(layer, NF4_BYTES[case.setup.double_quant]) for layer, _ in case.sizes.layers)
    later = later_bytes(case.setup.optimizer, case.adapter.trained)
    later += round(gradient_bytes(case)) - GRADIENT_BYTES * case.adapter.trained  # the padding between them
    demand = Demand(packed.largest, packed.longest, packed.varied, later, slab, recipe.resident_layers)
    free = None
    if case.gpu is not None:
        before = _other_weights(case) + case.resident.adapter + case.resident.unpacked
        free = round(usable - outside(case.gpu)[0] - before)
    chosen, least = choose_offload(case.sizes, free, demand), least_offload(case.sizes, demand)
    time, hidden_from = None, None
    if case.gpu is not None:
        time, hidden_from = _time(case, chosen, demand, work, case.gpu)
    return Streamed(
        offload=chosen,
        memory=_memory(case, chosen, demand),
        time=time,
        host_bytes=host_bytes(case.sizes, demand, chosen),
        hidden_from_tokens=hidden_from,
        least_bytes=_memory(case, least, demand).peak_bytes,
    )


def _other_weights(case: EngineCase) -> float:
    """What lies on the GPU besides layers' linears: norms, biases and the head. The embedding waits on the host, unless
    it is the head too."""
    shape, setup = case.shape, case.setup
    embedding = 0 if shape.tied else shape.embedding
    return float((shape.total_parameters - shape.quantised_weights - embedding) * setup.value_bytes)


def _memory(case: EngineCase, chosen: Offload, demand: Demand) -> Memory:
    runtime, cublas_workspace = outside(case.gpu)
    states, paged = optimizer_states(case.adapter, case.setup)
    held = (chosen.resident + SLOTS) * demand.slab_bytes
    fragments = fragment_bytes(case.sizes, demand, chosen.most_tokens)
    step = needed_bytes(case.sizes, demand, chosen.most_tokens, chosen.inputs_on_host) - fragments
    parts = dict.fromkeys(PARTS, 0.0) | {
        "weights": _other_weights(case) + held,
        "adapter": case.resident.adapter,
        "gradients": gradient_bytes(case),
        "optimizer": states,
        "activations": float(step - SLOTS * demand.slab_bytes - demand.later_bytes),
        "workspace": cublas_workspace + case.resident.unpacked,
    }
    return in_all(parts, fragments, paged, runtime)


def _time(case: EngineCase, chosen: Offload, demand: Demand, work: Work, gpu: Gpu) -> tuple[Time, int]:
    """The engine's time for such a step, and what of the transfers it does not hide; tokens from which all are hidden.

    Layers are unpacked once a pass, however many parts a step has; without streaming they are for each part."""
    choice = Choice(Keep.INPUT, chosen.most_tokens, 0, chosen.layers)
    alone, amounts = engine_time(case, choice, work, gpu, 1), engine_amounts(case, choice, work)
    unpacking_s = amounts.dequantised / (engine_efficiency_of(gpu).dequantise * gpu.bandwidth_bytes_per_s)
    saved_s = min(unpacking_s * (1 - 1 / amounts.parts), alone.step_s - alone.launch_s)
    computing_s = alone.compute_s + alone.memory_s - saved_s
    forward_s = computing_s * _forward_share(case)
    layers_s = (chosen.layers - chosen.resident) * demand.slab_bytes / gpu.link_bytes_per_s
    inputs_s = 0.0
    if chosen.inputs_on_host:
        inputs_s = work.packed.tokens * case.sizes.element * case.sizes.width * chosen.layers / gpu.link_bytes_per_s
    waits_s = max(0.0, layers_s - forward_s) + max(0.0, layers_s + inputs_s - (computing_s - forward_s))
    step_s = alone.step_s - saved_s + waits_s
    limited: LimitedBy = "link" if waits_s > 0.1 * step_s else alone.limited_by
    found = replace(
        alone,
        step_s=step_s,
        memory_s=alone.memory_s - saved_s,
        link_s=2 * layers_s + inputs_s,
        limited_by=limited,
        tokens_per_s=work.tokens_per_step / step_s,
    )
    return found, round(work.packed.tokens * layers_s / forward_s)


def _forward_share(case: EngineCase) -> float:
    """Of the products of a step whose layers keep their input alone: `down` is not computed again."""
    layers: Sequence[tuple[int, int]] = [
        (sum(stack.size_in * stack.size_out for stack in layer.stacks) * count,
         layer.down.size_in * layer.down.size_out * count)
        for layer, count in case.sizes.layers
    ]  # fmt: skip
    once, down = sum(weights for weights, _ in layers), sum(weights for _, weights in layers)
    return once / (3 * once - down)
