"""The learning-rate search: each method's rate by the loss on held-out rows of the training split, never on test rows.

The runs are short, and short runs favour higher rates a little: a rate that is too high for the whole run may still be
the best after a third of it. Every rate that was tried is kept with its loss.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thriftune.compare.grid import Cell
from thriftune.errors import InputError
from thriftune.recipe import Recipe
from thriftune.recipe.schema import LEARNING_RATE_BY_METHOD, MAX_SEED
from thriftune.records import write_text_atomically

FIRST_FACTORS = (1, 4, 16)  # of the method's default rate
STRIDE = 4  # between neighbours, until the best rate has one on each side
MOST_RATES = 8  # before the last refinement by a factor of two
LOWEST, HIGHEST = 1e-8, 10.0
SHARE_OF_STEPS = 0.3
FEWEST_STEPS = 50  # or all, where a cell has fewer
MOST_HELD_OUT = 1000
SHARE_HELD_OUT = 0.1
USUAL_RATES = 6  # tried a method, for the plan of what a search takes
FILE = "search.json"
NOTE = (
    "learning rates were searched on held-out rows of the training split with runs of {share} of the steps; short runs "
    "favour higher rates a little"
)


@dataclass(frozen=True)
class Tried:
    """`loss` None: the run diverged or did not run, for `reason`."""

    rate: float
    loss: float | None
    reason: str = ""


def waves_of_rates(default: float) -> Generator[list[float], list[Tried], None]:
    """Rates on a log grid around `default`: walk on until the best is no edge of it, refine once by two.

    Yields rates that can be tried at the same time, and is sent what came of them.
    """
    tried: dict[float, Tried] = {}

    def attempt(*rates: float) -> Generator[list[float], list[Tried], None]:
        rounded = [rate for rate in (float(f"{rate:.3g}") for rate in rates) if LOWEST <= rate <= HIGHEST]
        new = [rate for rate in dict.fromkeys(rounded) if rate not in tried]
        if new:
            found = yield new
            tried.update((one.rate, one) for one in found)

    yield from attempt(*(default * first for first in FIRST_FACTORS))
    while len(tried) < MOST_RATES:
        rates, best = sorted(tried), best_rate(tried.values())
        # Where everything diverged the way is down.
        if best is None or best == rates[0]:
            following = rates[0] / STRIDE
        elif best == rates[-1]:
            following = best * STRIDE
        else:
            break
        before = len(tried)
        yield from attempt(following)
        if len(tried) == before:  # the end of what a recipe takes
            break
    best = best_rate(tried.values())
    if best is not None:
        yield from attempt(best * 0.5, best * 2.0)


def best_rate(tried: Any) -> float | None:
    """The rate of the lowest loss, the lower one of equals; None when none was finite."""
    finite = [(one.loss, one.rate) for one in tried if one.loss is not None and math.isfinite(one.loss)]
    return min(finite)[1] if finite else None


def default_rate(method: str) -> float:
    return LEARNING_RATE_BY_METHOD[method]


def search_steps(steps: int) -> int:
    """Optimizer steps of a run of the search, of cells with so many."""
    return min(steps, max(FEWEST_STEPS, math.ceil(SHARE_OF_STEPS * steps)))


def held_out_share(rows: int) -> float:
    """`data.eval_fraction` of a search over so many training rows."""
    return min(SHARE_HELD_OUT, MOST_HELD_OUT / rows)


def search_seed(seeds: Sequence[int]) -> int:
    """A seed that no cell has."""
    return next(seed % MAX_SEED for seed in range(max(seeds) + 1000, MAX_SEED * 2) if seed % MAX_SEED not in seeds)


def search_recipe(cell: Cell, rate: float, steps: int, rows: int, seeds: Sequence[int], output: Path) -> Recipe:
    """The recipe of a try: the cell's, on the training split less what is held out, for fewer steps."""
    tree = copy.deepcopy(cell.tree)
    data = {key: value for key, value in tree.get("data", {}).items() if key not in ("eval_split", "eval_path")}
    data |= {"eval_fraction": held_out_share(rows), "max_eval_samples": MOST_HELD_OUT}
    short = search_steps(steps)
    train = {**tree.get("train", {}), "learning_rate": rate, "max_steps": short}
    train |= {"eval_strategy": "steps", "eval_steps": short, "load_best_model_at_end": False, "save_strategy": "no"}
    if train.get("warmup_steps"):
        train["warmup_steps"] = math.ceil(train["warmup_steps"] * short / steps)
    changed = {"data": data, "train": train, "seed": search_seed(seeds), "output": str(output), "report_to": []}
    return Recipe.build({**tree, **changed}, source=f"the search of {cell.method}")


def read_search(folder: Path) -> dict[str, Any]:
    """search.json, or an empty search. Raises InputError when it cannot be read."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {**found, "methods": dict(found["methods"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        given = f"{path} cannot be read: {error}"
        raise InputError(given=given, allowed="the file that a comparison wrote", do="restore or remove it") from None


def write_search(
    folder: Path, search: dict[str, Any], method: str, tried: Sequence[Tried], chosen: float | None, facts: Any
) -> dict[str, Any]:
    """search.json with what one method's search has found so far; `chosen` None while it goes on."""
    rows = [
        {"learning_rate": one.rate, "value": one.loss, "low": None, "high": None, "reason": one.reason} for one in tried
    ]
    methods = {**search.get("methods", {}), method: {"chosen": chosen, "tried": rows}}
    found = {"metric": "eval loss", "higher_is_better": False, **facts, "methods": methods}
    write_text_atomically(folder / FILE, json.dumps(found, indent=2) + "\n")
    return found
