"""What trains: the adapter's matrices as the recipe asks for them, or the whole model."""

from __future__ import annotations

from dataclasses import dataclass

from thriftune.recipe import LoraRecipe
from thriftune.shapes import Linear, ModelShape, adapted_linears, saved_parameters

PAGED_FROM = 100_000  # elements; bitsandbytes keeps the optimizer states of smaller tensors unpaged


@dataclass(frozen=True, slots=True)
class Adapter:
    """`trained` counts every parameter that gets a gradient, `small` those in tensors that a paged optimizer leaves in
    ordinary memory. `ranks` has each adapted linear's highest rank, by its path in the layer."""

    trained: int
    ranks: dict[str, int]
    small: int = 0
    dora: bool = False

    def has(self, linear: Linear) -> bool:
        return linear.path in self.ranks

    def rank_of(self, linear: Linear) -> int:
        return self.ranks.get(linear.path, 0)


def adapter_of(shape: ModelShape, lora: LoraRecipe, method: str) -> Adapter:
    """Raises InputError when the recipe's targets match nothing in this shape."""
    if method == "full":
        return Adapter(shape.total_parameters, {})
    options = lora.options
    adapted = adapted_linears(
        shape,
        lora.r,
        lora.target_modules,
        rank_pattern=options.get("rank_pattern"),
        layers_to_transform=options.get("layers_to_transform"),
        exclude_modules=options.get("exclude_modules"),
        modules_to_save=lora.modules_to_save,
    )
    trained = sum(part.parameters + (part.magnitudes if lora.use_dora else 0) for part in adapted)
    if lora.modules_to_save:
        trained += saved_parameters(shape, lora.modules_to_save)[0]
    if lora.bias != "none":
        trained += sum(part.repeats * part.linear.out_features for part in adapted if part.linear.bias)
    ranks: dict[str, int] = {}
    for part in adapted:
        ranks[part.linear.path] = max(part.rank, ranks.get(part.linear.path, 0))
    small = sum(_small(part.rank * side) * part.repeats for part in adapted for side in _sides(part.linear))
    return Adapter(trained, ranks, small, lora.use_dora)


def _sides(linear: Linear) -> tuple[int, int]:
    return linear.copies * linear.in_features, linear.copies * linear.out_features


def _small(elements: int) -> int:
    return elements if elements < PAGED_FROM else 0
