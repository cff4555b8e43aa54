"""The models of the catalogue: what their config.json says, found by any of the ways people write their names.

A row's `config` has the keys from which the shape is computed, under the names that transformers gives them.
`parameters` is the count of what transformers builds for causal language modelling, on the row's date; `source` is the
public place of its config.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from dataclasses import dataclass
from datetime import date
from importlib import resources
from typing import Any

# Words that name a variant of the same architecture, or whose model it is.
VARIANTS = frozenset({"instruct", "it", "chat", "base", "pt", "hf", "meta", "deduped"})
LONGEST_NAME = 200  # characters of a name that are looked at


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """One model. `hub_ids` are its names on the Hugging Face hub, the one of its config first."""

    name: str
    hub_ids: tuple[str, ...]
    aliases: tuple[str, ...]
    config: dict[str, Any]
    parameters: int | None  # None where transformers has no class for it
    source: str
    date: date

    @property
    def text_config(self) -> dict[str, Any]:
        """What describes the text model: the whole config, or its text part."""
        inner: dict[str, Any] = self.config.get("text_config", self.config)
        return inner

    @property
    def model_type(self) -> str:
        return str(self.text_config["model_type"])

    @property
    def stored_dtype(self) -> str | None:
        return self.config.get("dtype")

    @property
    def max_positions(self) -> int | None:
        return self.text_config.get("max_position_embeddings") or self.text_config.get("n_positions")


@functools.cache
def all_models() -> tuple[CatalogModel, ...]:
    """Every model, in the order of the file."""
    text = resources.files("thriftune.catalog").joinpath("models.json").read_text(encoding="utf-8")
    return tuple(
        CatalogModel(
            name=row["name"],
            hub_ids=tuple(row["hub"]),
            aliases=tuple(row.get("aliases", ())),
            config=row["config"],
            parameters=row["parameters"],
            source=row["source"],
            date=date.fromisoformat(row["date"]),
        )
        for row in json.loads(text)["models"]
    )


def find_model(text: str) -> CatalogModel | None:
    """The model of this name, without regard to case, punctuation, the hub's owner and words such as Instruct.

    None when there is no such model or when more than one answers; `near_models` then says what was meant.
    """
    if text.count("/") > 1:
        return None  # a path, not a name
    words = _words(text)
    by_words, by_letters = _names()
    found = by_words.get(" ".join(words), set())
    if not found and re.fullmatch(r"[a-zA-Z0-9]+", text):
        found = by_letters.get("".join(words), set())
    return all_models()[next(iter(found))] if len(found) == 1 else None


def near_models(text: str) -> list[str]:
    """Up to three names of the catalogue that look like this one: those that begin with it, then the nearest."""
    by_words, _ = _names()
    asked = " ".join(_words(text))
    longer = [near for near in by_words if asked and near.startswith(f"{asked} ")]
    names: list[str] = []
    for near in [*longer, *difflib.get_close_matches(asked, list(by_words), n=9, cutoff=0.6)]:
        names += [all_models()[index].name for index in sorted(by_words[near])]
    return list(dict.fromkeys(names))[:3]


def _words(text: str) -> list[str]:
    """'meta-llama/Llama-3.1-8B-Instruct' -> llama, 3.1, 8, b. What stands in parentheses is a remark."""
    name = re.sub(r"\([^()]*\)", "", text[:LONGEST_NAME].lower().rsplit("/", 1)[-1])
    return [word for word in re.findall(r"[0-9]+(?:\.[0-9]+)*|[a-z]+", name) if word not in VARIANTS]


@functools.cache
def _names() -> tuple[dict[str, set[int]], dict[str, set[int]]]:
    """Each way to write a name -> the models it may mean: with words apart, and as letters and digits alone."""
    by_words: dict[str, set[int]] = {}
    by_letters: dict[str, set[int]] = {}
    for index, model in enumerate(all_models()):
        for name in (model.name, *model.hub_ids, *model.aliases):
            written = " ".join(_words(name))
            for way in (written, written.replace(".", ""), written.replace(".", " ")):  # 3.1, 31, 3_1
                by_words.setdefault(way, set()).add(index)
            by_letters.setdefault(re.sub(r"[^a-z0-9]", "", written), set()).add(index)
    return by_words, by_letters
