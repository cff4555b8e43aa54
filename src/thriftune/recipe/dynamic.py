"""Method dynamic: what its recipe cannot have, and when it cuts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thriftune.recipe.schema import DynamicRecipe, Recipe

PLAIN_STARTS = (True, "gaussian")  # of lora.init_lora_weights: B is zero and the base stays as it is
REFUSED_OPTIONS = ("rank_pattern", "alpha_pattern", "lora_bias", "trainable_token_indices", "target_parameters")


def contradictions_of_dynamic(recipe: Recipe) -> list[str]:
    """One text for each problem; it names the field and the way out."""
    dynamic, lora, problems = recipe.dynamic, recipe.lora, []
    if lora.r != type(lora)().r:
        problems.append("lora.r has no effect with method dynamic; write dynamic.r_start")
    if dynamic.first_cut > dynamic.last_cut:
        problems.append(f"dynamic.first_cut {dynamic.first_cut} comes after dynamic.last_cut {dynamic.last_cut}")
    if dynamic.min_rank > dynamic.keep * dynamic.r_start:
        problems.append(
            f"dynamic.min_rank {dynamic.min_rank} in every module is more than dynamic.keep {dynamic.keep} of "
            f"dynamic.r_start {dynamic.r_start}"
        )
    if recipe.train.load_best_model_at_end:
        problems.append(
            "train.load_best_model_at_end could go back to before a cut, to a larger adapter than asked for; drop it "
            "with method dynamic"
        )
    if recipe.quant != type(recipe.quant)():
        problems.append(
            "quant.* is of bases in 4 bits, and those of method dynamic are in 16; drop it, or use method qlora"
        )
    if recipe.precision == "fp8":
        problems.append("precision fp8 is not built in for a rank that changes; use precision=auto with method dynamic")
    unlike_plain = {
        "lora.use_dora": lora.use_dora,
        "lora.bias": lora.bias != "none",
        "lora.modules_to_save": bool(lora.modules_to_save),
        "lora.init_lora_weights": lora.init_lora_weights not in PLAIN_STARTS,
        **{f"lora.options.{name}": bool(lora.options.get(name)) for name in REFUSED_OPTIONS},
    }
    problems += [
        f"{place} is not supported by method dynamic, which cuts plain pairs of factors; drop it"
        for place, given in unlike_plain.items()
        if given
    ]
    return problems


def cut_schedule(dynamic: DynamicRecipe, steps: int) -> dict[int, float]:
    """After which steps a run of so many is cut, and the share of the adapter's parameters that may then be left.

    Cuts are evenly spaced from `first_cut` to `last_cut`; what is still to go falls with the cube of the cuts to come,
    so the first takes most (the schedule of Zhu and Gupta 2017, arXiv:1710.01878). Cuts that fall on one step are one.
    """
    schedule = {}
    for number in range(dynamic.n_cuts):
        way = number / (dynamic.n_cuts - 1) if dynamic.n_cuts > 1 else 0.0
        fraction = dynamic.first_cut + way * (dynamic.last_cut - dynamic.first_cut)
        left = (1 - (number + 1) / dynamic.n_cuts) ** 3
        schedule[min(steps, max(1, round(fraction * steps)))] = dynamic.keep + (1 - dynamic.keep) * left
    return schedule
