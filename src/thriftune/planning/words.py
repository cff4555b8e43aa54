"""The words of `thriftune plan` made into a question that the planner answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thriftune.errors import InputError
from thriftune.plan.advise import PREFERENCES, Prefer
from thriftune.plan.plan import KNOWN_METHODS, METHODS, Question, make_plan
from thriftune.plan.search import Case
from thriftune.plan.work import Rows, assumed_rows
from thriftune.planning.devices import capped, find_devices, read_market
from thriftune.planning.model import FoundModel, find_planned_model
from thriftune.recipe import Recipe
from thriftune.records import Plan

SAMPLE_ROWS = 500  # of a person's data, which are tokenised


def plan_words(
    recipe: Recipe,
    *,
    gpu_names: Sequence[str],
    gpus: int | None,
    methods: Sequence[str],
    prefer: str,
) -> Plan:
    """The plan of a recipe on the GPUs of these names (`2xa100-80gb` is two), else on this machine's, else on a few
    usual ones. A recipe that names data is planned with that data's lengths.

    Raises InputError, ModelError and DataError for what cannot be found or read.
    """
    market = read_market()
    found, notes = find_devices(gpu_names, gpus, market)
    devices = [capped(device, recipe) for device in found]
    question, _ = ask(recipe, methods=methods, prefer=prefer, notes=notes)
    return make_plan(question, devices, market)


def ask(
    recipe: Recipe, *, methods: Sequence[str], prefer: str, notes: Sequence[str]
) -> tuple[Question, Mapping[str, Any]]:
    """The question that these words put, and the model's config.json. `notes` are to stand in the plan.

    Raises InputError, ModelError and DataError for what cannot be found or read.
    """
    wanted = _preference(prefer)
    data_named = bool({"name", "path"} & recipe.data.model_fields_set)
    chosen_methods = _methods(methods, recipe)
    model = find_planned_model(recipe.model)
    rows, recipe, row_notes = _rows(recipe, model, data_named)
    named = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": model.name})})
    question = Question(
        case=Case(model.shape, named, rows),
        methods=chosen_methods,
        prefer=wanted,
        data_named=data_named,
        model_source=model.source,
        notes=(*model.notes, *notes, *row_notes),
        methods_named=bool(methods) and list(methods) != ["auto"],
    )
    return question, model.config


def _preference(text: str) -> Prefer:
    for known in PREFERENCES:
        if text == known:
            return known
    raise InputError(given=f"--prefer {text}", allowed=", ".join(PREFERENCES), do="take one of these, or leave it out")


def _methods(asked: Sequence[str], recipe: Recipe) -> tuple[str, ...]:
    """Those asked for, else the recipe's, else all; 8-bit floats are of frozen weights, which full has not."""
    if not asked or list(asked) == ["auto"]:
        every = METHODS if recipe.precision == "auto" else tuple(name for name in METHODS if name != "full")
        return every if recipe.method == "auto" else (recipe.method,)
    wrong = [word for word in asked if word not in KNOWN_METHODS]
    if wrong:
        raise InputError(
            given=f"method {', '.join(wrong)}",
            allowed=", ".join(KNOWN_METHODS),
            do=f"name some of these, or none for {', '.join(METHODS)}",
        )
    return tuple(dict.fromkeys(asked))


def _rows(recipe: Recipe, model: FoundModel, data_named: bool) -> tuple[Rows, Recipe, tuple[str, ...]]:
    """The rows' lengths, the recipe that they hold for, and what to know of them."""
    positions = model.shape.max_positions
    if not data_named:
        if (
            positions is not None
            and recipe.data.max_length > positions
            and "max_length" not in recipe.data.model_fields_set
        ):
            data = recipe.data.model_copy(update={"max_length": positions})
            recipe = recipe.model_copy(update={"data": data})
        refuse_too_long(recipe.data.max_length, positions, model.name)
        note = (
            "no data was named: every row is taken to be as long as max_length, and rows.jsonl in the command "
            "stands for yours; with --data the plan is for it"
        )
        return assumed_rows(recipe), recipe, (note,)
    from thriftune.data.lengths import measure_lengths

    measured = measure_lengths(recipe, model.folder, SAMPLE_ROWS)
    refuse_too_long(max(measured.tokens), positions, model.name)
    doubt = () if measured.exact else ("the rows' lengths are estimates: download the model's tokenizer to count them",)
    return Rows(measured.tokens, measured.targets, measured.rows, measured.source), recipe, doubt


def refuse_too_long(longest: int, positions: int | None, name: str) -> None:
    """Raises InputError when a row has more tokens than the model has positions."""
    if positions is not None and longest > positions:
        raise InputError(
            given=f"longest row: {longest} tokens; positions of {name}: {positions}",
            allowed=f"data.max_length up to {positions}",
            do=f"run again with max_length={positions}",
        )
