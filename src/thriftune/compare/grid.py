"""The grid of a comparison: methods x seeds x swept options, each cell with its whole recipe.

    KEY=VALUE          for every method on which the option has an effect
    KEY=A,B,C          a sweep: one variant for each value; so is a KEY that is written twice
    METHOD:KEY=VALUE   for that method only; with several values, a sweep of that method

Options that take a list or a text themselves (lora.target_modules=q_proj,v_proj) are swept by writing them twice.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thriftune.errors import InputError
from thriftune.recipe import Recipe, did_you_mean, option_place, read_recipe

BASE = "base"
METHODS = (BASE, "full", "lora", "qlora", "dynamic")
TRAINED = METHODS[1:]
RATE = "train.learning_rate"
LISTS = ("lora.target_modules", "lora.modules_to_save", "report_to")  # a comma inside is part of one value
# Option or section -> the methods on which it has an effect.
EFFECT = {
    "lora.r": ("lora", "qlora"),
    "lora": ("lora", "qlora", "dynamic"),
    "quant": ("qlora",),
    "precision": ("lora", "qlora", "dynamic"),
    "dynamic": ("dynamic",),
}
LONGEST_NAME = 100
# What may differ between cells without making them incomparable: whole sections, and single options.
SWEPT_SECTIONS = ("lora", "quant", "dynamic")
SWEPT = {
    *{RATE, "model.dtype", "model.attn_implementation", "train.optim", "train.weight_decay", "train.max_grad_norm"},
    *{"train.adam_beta1", "train.adam_beta2", "train.adam_epsilon", "train.lr_scheduler_type", "train.warmup_steps"},
    *{"train.warmup_ratio", "train.gradient_checkpointing", "precision"},
}
OWNED = {
    "method": "name the methods with --methods",
    "seed": "name the seeds with --seeds, as a count or with commas",
    "output": "name the comparison's folder with --output",
    "train.resume_from_checkpoint": "give the same command again: a comparison goes on by itself",
    "model.name": "write the model as a word without KEY=, and run one comparison a model",
}


@dataclass(frozen=True)
class Cell:
    """One cell. `tree` is the recipe as far as it was given, with method and seed; None for the base model.

    `rate_given`: the learning rate was asked for, so that none is searched.
    """

    method: str
    variant: str
    seed: int | None
    overrides: dict[str, Any]
    tree: dict[str, Any]
    rate_given: bool

    @property
    def name(self) -> str:
        """The name of its folder: 'base', 'lora-seed42', 'lora-lora.r_8-seed42'."""
        stem = re.sub(r"[^A-Za-z0-9._+-]+", "_", self.variant.replace(" ", "-"))
        if len(stem) > LONGEST_NAME:
            stem = f"{stem[:LONGEST_NAME]}-{hashlib.sha256(self.variant.encode()).hexdigest()[:8]}"
        return stem if self.seed is None else f"{stem}-seed{self.seed}"

    def recipe(self, output: str, rate: float | None = None) -> Recipe:
        """The recipe to run, with the searched learning rate where there is one."""
        train = dict(self.tree.get("train", {}))
        if rate is not None:
            train["learning_rate"] = rate
        return Recipe.build({**self.tree, "train": train, "output": output}, source=f"cell {self.name}")


@dataclass(frozen=True)
class Grid:
    """`recipe` is what all cells have in common. Cells are in the order in which they run: the base, then seed by seed,
    so that a comparison that stops early has whole seeds."""

    recipe: Recipe
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]


@dataclass
class _Words:
    """Values by dotted option, as written: for all methods, and for one of them."""

    shared: dict[str, list[str]] = field(default_factory=dict)
    own: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def make_grid(
    words: Sequence[str], config: Path | None, values: dict[str, Any], methods: Sequence[str], seeds: str
) -> Grid:
    """The grid that a command line asks for.

    Args:
        words: KEY=VALUE and METHOD:KEY=VALUE, in which a repeated KEY or a comma makes a sweep.
        config: a recipe file that they are laid over; None without one.
        values: what options of the verb name: model, data.
        methods: of METHODS, in any order.
        seeds: '3' for the recipe's seed and the two after it, '1,5,9' for these.

    Raises:
        InputError: an unknown method, a sweep that would make cells incomparable, words without effect.
        RecipeError: what a recipe refuses.
    """
    chosen = _methods(methods)
    found = _read_words(words, chosen)
    shared_words = [f"{place}={texts[0]}" for place, texts in found.shared.items() if len(texts) == 1]
    recipe = _common_recipe(config, shared_words, values)
    numbers = _seeds(seeds, recipe.seed)
    variants = [variant for method in chosen if method != BASE for variant in _variants(method, found)]
    cells = [Cell(BASE, BASE, None, {}, _tree(recipe, BASE, recipe.seed), True)] if BASE in chosen else []
    for seed in numbers if variants else ():
        for method, variant, options in variants:
            read = _with_options(config, shared_words, values, method, options)
            overrides = {place: _value_at(read, place) for place in options}
            tree = _tree(read, method, seed)
            cells.append(Cell(method, variant, seed, overrides, tree, RATE.split(".")[1] in tree.get("train", {})))
    for cell in cells[: 1 + len(variants)]:
        cell.recipe("checked")
    return Grid(recipe, chosen, numbers if variants else (), tuple(cells))


def _methods(asked: Sequence[str]) -> tuple[str, ...]:
    wrong = [word for word in asked if word not in METHODS]
    if wrong or not asked:
        raise InputError(
            given=f"--methods {','.join(asked)}{did_you_mean(wrong[0], METHODS) if wrong else ''}",
            allowed=f"some of {', '.join(METHODS)}, with commas",
            do="correct --methods",
        )
    return tuple(method for method in METHODS if method in asked)


def _seeds(text: str, first: int) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(re.fullmatch(r"\d{1,10}", part) for part in parts):
        raise InputError(
            given=f"--seeds {text}", allowed="a count such as 3, or seeds with commas: 1,5,9", do="correct --seeds"
        )
    numbers = [int(part) for part in parts]
    if "," not in text:
        if not 1 <= numbers[0] <= 100:
            raise InputError(
                given=f"--seeds {text}: a number alone is how many seeds there are",
                allowed="a count from 1 to 100, or seeds with commas",
                do=f"write --seeds {text}, with the comma for this one seed",
            )
        numbers = [first + place for place in range(numbers[0])]
    if len(set(numbers)) < len(numbers):
        raise InputError(given=f"--seeds {text}", allowed="each seed once", do="drop those that are there twice")
    return tuple(numbers)


def _read_words(words: Sequence[str], methods: Sequence[str]) -> _Words:
    found = _Words()
    for word in words:
        match = re.match(r"([a-z]+):(?=[\w.]+=)", word)
        method = match.group(1) if match else None
        key, equals, text = word[match.end() if match else 0 :].partition("=")
        place = option_place(key.strip()) if equals else None
        if place is None:
            hint = did_you_mean(key, TRAINED) if not equals else did_you_mean(key, _all_places())
            found.problems.append(f"{word}: unknown option{hint}" if equals else f"{word}: not of the form KEY=VALUE")
        elif place in OWNED:
            found.problems.append(f"{word}: {OWNED[place]}")
        else:
            # `completion_only_loss=true` means the opposite of its place: such words stay as they are written.
            written = key.strip() if place not in (key.strip(),) and _is_inverted(key.strip()) else place
            _add(found, method, written, place, text, word, methods)
    found.problems += _sweep_problems(found, methods)
    if found.problems:
        listed = "".join(f"\n    - {problem}" for problem in found.problems)
        raise InputError(
            given=f"the words of the comparison have {len(found.problems)} problems:{listed}"
            if len(found.problems) > 1
            else f"{found.problems[0]}",
            allowed="KEY=VALUE for all methods, METHOD:KEY=VALUE for one; several values of lora.*, quant.*, "
            "dynamic.*, precision, learning_rate and the optimizer's options make a sweep",
            do="correct that and run again",
        )
    return found


def _is_inverted(key: str) -> bool:
    from thriftune.recipe.read import INVERTED

    return key in INVERTED


def _all_places() -> list[str]:
    from thriftune.recipe.read import FLAT

    return [*FLAT, *FLAT.values()]


def _add(
    found: _Words, method: str | None, written: str, place: str, text: str, word: str, methods: Sequence[str]
) -> None:
    splits = place in SWEPT or place.partition(".")[0] in (*SWEPT_SECTIONS, "train")
    splits = splits and place not in LISTS and not place.startswith("lora.options")
    texts = [part.strip() for part in text.split(",")] if splits and not text.lstrip().startswith("[") else [text]
    if method is None:
        found.shared.setdefault(written, []).extend(texts)
        return
    if method not in methods or method == BASE:
        why = "the base is not trained" if method == BASE else f"{method} is not among --methods {','.join(methods)}"
        found.problems.append(f"{word}: {why}")
    elif method not in _methods_of(place):
        found.problems.append(f"{word}: has no effect with {method}")
    else:
        found.own.setdefault(method, {}).setdefault(written, []).extend(texts)


def _methods_of(place: str) -> tuple[str, ...]:
    return EFFECT.get(place, EFFECT.get(place.partition(".")[0], TRAINED))


def _sweep_problems(found: _Words, methods: Sequence[str]) -> list[str]:
    problems = []
    for owner, options in (("", found.shared), *((f"{method}:", own) for method, own in found.own.items())):
        for place, texts in options.items():
            section = place.partition(".")[0]
            if len(set(texts)) < len(texts):
                problems.append(f"{owner}{place}: {','.join(texts)} has a value twice")
            several = len(texts) > 1 or owner
            if several and section not in SWEPT_SECTIONS and place not in SWEPT:
                what = f"{owner}{place}={','.join(texts)}"
                problems.append(
                    f"{what}: cells that differ in it cannot stand in one table, because they would see other rows, "
                    "steps or questions; run a comparison for each value"
                )
            if len(texts) > 1 and not owner and not set(_methods_of(place)) & set(methods):
                problems.append(f"{place}={','.join(texts)}: has no effect with {', '.join(methods)}")
    return problems


def _variants(method: str, found: _Words) -> list[tuple[str, str, dict[str, str]]]:
    """(method, variant, option -> value as written) of one method: the product of its sweeps."""
    shared = {place: texts for place, texts in found.shared.items() if len(texts) > 1 and method in _methods_of(place)}
    options = {**shared, **found.own.get(method, {})}
    variants = []
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        swept = [f"{place}={text}" for place, text in chosen.items() if len(options[place]) > 1]
        variants.append((method, " ".join([method, *swept]), chosen))
    return variants


def _common_recipe(config: Path | None, words: Sequence[str], values: dict[str, Any]) -> Recipe:
    return read_recipe(config, words, {**values, "method": "lora"})


def _with_options(
    config: Path | None, words: Sequence[str], values: dict[str, Any], method: str, options: dict[str, str]
) -> Recipe:
    mine = [f"{place}={text}" for place, text in options.items()]
    words = [word for word in words if method in _methods_of(word.partition("=")[0])]
    return read_recipe(config, [*words, *mine], {**values, "method": "lora" if method == "full" else method})


def _tree(recipe: Recipe, method: str, seed: int) -> dict[str, Any]:
    """What was given, and no defaults: the planner chooses where nothing was. Method full refuses options of lora."""
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    tree = {key: value for key, value in tree.items() if key != "output" and not (method == "full" and key == "lora")}
    return {**tree, "method": "lora" if method == BASE else method, "seed": seed}


def _value_at(recipe: Recipe, place: str) -> Any:
    value: Any = recipe.dump()
    for part in place.split(".", 2):
        value = value[part]
    return value
