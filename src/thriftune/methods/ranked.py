"""A LoRA whose modules have ranks of their own, as PEFT's configuration says it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any


def config_of_ranks(config: Any, ranks: Mapping[str, int], scales: Mapping[str, float]) -> Any:
    """A copy of a LoraConfig for modules of these ranks and scales, by their full names; those of rank 0 are left out,
    because PEFT and vLLM refuse that rank.

    alpha is scale x rank, so that readers which know one alpha / r only have the right scale too where it is the same
    everywhere. What else chose modules or a scale (layers, exclusions, rsLoRA) is said by these and taken out.
    """
    ranks = {name: rank for name, rank in sorted(ranks.items()) if rank}
    found = copy.deepcopy(config)
    found.r = max(ranks.values())
    found.lora_alpha = found.r * next(scales[name] for name, rank in ranks.items() if rank == found.r)
    found.rank_pattern = {re.escape(name): rank for name, rank in ranks.items()}
    found.alpha_pattern = {re.escape(name): scales[name] * rank for name, rank in ranks.items()}
    found.target_modules = list(ranks)
    found.exclude_modules = found.layers_to_transform = found.layers_pattern = None
    found.use_rslora = False
    return found


def ranks_of_config(content: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """Rank and scale of each module, as `config_of_ranks` wrote them into an adapter_config.json. Raises KeyError,
    TypeError or ValueError for one that it did not write."""
    ranks, alphas = content["rank_pattern"], content["alpha_pattern"]
    found = {}
    for name in content["target_modules"]:
        rank = int(ranks[re.escape(name)])
        found[name] = (rank, float(alphas[re.escape(name)]) / rank)
    if len(found) != len(ranks):
        raise ValueError("rank_pattern has other modules than target_modules")
    return found
