"""Writes docs/recipe.md from the recipe's schema:  .venv/bin/python docs/make_recipe_page.py"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from thriftune.recipe.read import ALIASES, FOUR_BIT_SWITCHES, INVERTED
from thriftune.recipe.schema import Recipe, Section

PAGE = Path(__file__).parent / "recipe.md"

INTRODUCTION = """\
# The recipe

<!-- Written by docs/make_recipe_page.py from src/thriftune/recipe/schema.py: change the schema, then run it again. -->

A recipe says everything about a run. It is a YAML file (`thriftune train --config recipe.yaml`), words on the command
line (`thriftune train MODEL learning_rate=1e-4`), or both; words count over the file, and the last word counts. Every
key is optional. An unknown key, a key given twice and a value of the wrong kind are refused, all of them at once.

A key is written in its section, with dots, or, where its name is unique, alone. These three say the same:

    train:                      train.learning_rate: 1e-4           learning_rate: 1e-4
      learning_rate: 1e-4

`model: NAME` and `data: NAME` are short for `model.name` and `data.name`. In YAML, only `true` and `false` are
switches (`no` is the text "no"), 1e-4 is a number, and tags, anchors and aliases are not supported.
"""

SECTION_TITLES = {
    "": "Top level",
    "model": "model: what is adapted",
    "data": "data: what it learns from",
    "train": "train: how it learns",
    "lora": "lora: the adapter of methods lora, qlora and dynamic",
    "quant": "quant: the frozen weights of method qlora",
    "dynamic": "dynamic: the falling rank of method dynamic (docs/dynamic_rank.md)",
    "generation": "generation: how answers are written by `predict`, `chat` and `eval`",
    "federated": "federated: of the `federate` verbs",
}


def page() -> str:
    sections: dict[str, list[tuple[str, FieldInfo]]] = {"": []}
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            sections[name] = [(f"{name}.{leaf}", below) for leaf, below in kind.model_fields.items()]
        else:
            sections[""].append((name, field))
    parts = [INTRODUCTION]
    for section, fields in sections.items():
        parts.append(f"## {SECTION_TITLES[section]}\n")
        parts.append("| Key | Default | Values | Meaning | Other names |\n|---|---|---|---|---|")
        parts.append("\n".join(row(place, field) for place, field in fields) + "\n")
    parts.append(other_tools())
    return "\n".join(parts)


def row(place: str, field: FieldInfo) -> str:
    others = [f"`{name}`" for name, at in ALIASES.items() if at == place]
    others += [f"`{name}` (the opposite)" for name, at in INVERTED.items() if at == place]
    values = kinds(field.annotation, [*field.metadata])
    cells = [f"`{place}`", f"`{default(field)}`", values, field.description or "", ", ".join(others)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)


def kinds(annotation: Any, limits: list[Any]) -> str:
    """A type in words: 'integer above 0', 'one of nf4, fp4', 'text or null'."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kinds(parts[0], [*limits, *(limit for info in parts[1:] for limit in info.metadata)])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kinds(part, limits if part is not type(None) else []) for part in parts)
    if origin is typing.Literal:
        return "one of " + ", ".join(f"`{part}`" for part in parts)
    if origin is list:
        return f"list of {kinds(parts[0], [])}".replace("list of text", "list of texts")
    if origin is dict:
        return "keys and values"
    words = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}[annotation]
    bounds = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
    for limit in limits:
        for sign, word in bounds.items():
            bound = getattr(limit, sign, None)
            if bound is not None:
                words += f" {word} {int(bound) if bound == int(bound) else bound}"
    return words


def other_tools() -> str:
    switches = " and ".join(f"`{name}: {str(value).lower()}`" for name, value in FOUR_BIT_SWITCHES.items())
    return f"""\
## Coming from another tool

The last column holds the names that axolotl, LLaMA-Factory, TRL and transformers' scripts use; they are accepted
wherever the key is. {switches} turn method `lora` into `qlora`.

`batch_size` alone is refused, because tools differ in what it means: write `per_device_train_batch_size` or
`generation.batch_size`. `q_proj,v_proj` stands for a list of modules, and `all` for `all-linear`.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
