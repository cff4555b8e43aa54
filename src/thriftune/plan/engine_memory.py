"""Bytes at the peak of a run through the engine, part by part.

Every term is counted by the functions with which the engine itself looks for room (`engine.sizes`); what is held beside
that is what its code holds. Notation in comments: T tokens at once, N positions whose logits are made together.
"""

from __future__ import annotations

from thriftune.engine.sizes import Choice, Keep, LayerSizes, ProgramSizes, gradient_rows, kept_bytes, working_bytes
from thriftune.engine.takes import DOWN, GATE_UP, OUT, QKV
from thriftune.plan.engine import EngineCase
from thriftune.plan.memory import FRAGMENTS_FIXED, WIDE, in_all, optimizer_states, outside
from thriftune.plan.values import PARTS, Memory, Packed

# What the allocator has taken and cannot use at the peak: shares of what a layer's backward pass works with, always and
# where steps differ in length, and of the gradients. Set by hand to all points in benchmarks/results/plan-h200.
FRAGMENTS, FRAGMENTS_VARIED, FRAGMENTS_GRADIENTS = 0.3, 0.7, 0.75
SCORES = 4  # a row's attention scores and gradients by the reference kernel on a CPU, all heads, float32


def engine_memory(case: EngineCase, choice: Choice, packed: Packed) -> Memory:
    """The parts at the moment of the step that needs most, on each GPU; without a GPU, in a process on a CPU."""
    runtime, cublas_workspace = outside(case.gpu)
    states, paged = optimizer_states(case.adapter, case.setup)
    sizes, held = case.sizes, case.resident
    peak = max(_moments(case, choice, packed), key=lambda moment: sum(moment.values()))
    parts = dict.fromkeys(PARTS, 0.0) | {"weights": held.weights, "adapter": held.adapter, "optimizer": states}
    for part, size in peak.items():
        parts[part] += size
    parts["workspace"] += cublas_workspace + held.unpacked
    parts["workspace"] += choice.held * sizes.unpacked_bytes
    if case.gpu is None:
        parts["workspace"] += float(SCORES * WIDE * sizes.layers[0][0].heads * packed.longest**2)
    share = FRAGMENTS + (FRAGMENTS_VARIED if packed.varied else 0.0)
    fragments = FRAGMENTS_FIXED + share * choice.most_tokens * sizes.working_bytes(Keep.ALL)
    fragments += FRAGMENTS_GRADIENTS * gradient_bytes(case)
    return in_all(parts, fragments, paged, runtime)


def _moments(case: EngineCase, choice: Choice, packed: Packed) -> list[dict[str, float]]:
    """At the loss; in the last layer's backward pass; in the first one's, when all gradients are there."""
    sizes, tokens, element = case.sizes, choice.most_tokens, case.sizes.element
    gradients = gradient_bytes(case)
    before = gradients if packed.largest > tokens else 0.0  # of the step's earlier parts
    kept = float(tokens * sizes.kept_bytes(choice.keep))
    last, first = sizes.layers[-1][0], sizes.layers[0][0]
    # The last layer's output and its gradient; N rows of the output, normed.
    rows = min(sizes.rows_at_once(tokens), tokens)
    at_head = element * (tokens * (2 * sizes.width + last.down.rank) + 2 * rows * sizes.width)
    return [
        {
            "activations": kept + at_head,
            "logits": float(rows * sizes.vocabulary * element),
            "gradients": before,
        },
        {
            "activations": kept + tokens * working_bytes(last, choice.keep, element, sizes.fp8),
            "gradients": before,
        },
        {"activations": float(tokens * _one_layer(first, choice.keep, sizes)), "gradients": gradients},
    ]


def _one_layer(layer: LayerSizes, keep: Keep, sizes: ProgramSizes) -> int:
    return kept_bytes(layer, keep, sizes.element) + working_bytes(layer, keep, sizes.element, sizes.fp8)


def gradient_bytes(case: EngineCase) -> float:
    """The gradients of a stack's A factors are parts of one product; with dropout each is one."""
    found = 0
    for (layer, indices), (stacks, _) in zip(case.shape.layers, case.sizes.layers, strict=True):
        for names, stack in zip((QKV, OUT, GATE_UP, DOWN), stacks.stacks, strict=True):
            ranks = [(case.adapter.rank_of(linear), linear) for linear in layer.linears if linear.name in names]
            of_b = sum(rank * linear.out_features for rank, linear in ranks)
            rows = sum(rank for rank, _ in ranks)
            of_a = (rows if stacks.drops else gradient_rows(rows)) * stack.size_in
            found += len(indices) * (of_a + of_b)
    return float(WIDE * found)
