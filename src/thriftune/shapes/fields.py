"""Reading a config.json's values: every wrong one is collected, and all are named in one ModelError.

A value that is missing or wrong is replaced by 1, false or nothing, so that a family's arithmetic goes on to find the
rest; `Fields.check` then raises, and no shape made of such values is ever handed out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from thriftune.errors import ModelError

MOST_LAYERS = 10_000
LARGEST = 10**12  # of any size or count; beyond it sums no longer fit the numbers that plans are made with


class Fields:
    """The text part's values of one config.json. `outer` is the whole config where the text part lies inside it."""

    def __init__(self, values: Mapping[str, Any], name: str, outer: Mapping[str, Any] | None = None) -> None:
        self.values = values
        self.outer = outer or {}
        self.name = name
        self.problems: list[str] = []
        self.conflicts: list[str] = []  # between values that are fine alone; told when no problem hides behind them
        self.notes: list[str] = []

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def whole(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """The first of these keys that is there and not null; `default` when none is. A problem without either."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if type(value) is int and least <= value <= LARGEST:
                return value
            self.wrong(name, f"a whole number from {least} to {LARGEST:,}", value)
            return max(1, least)
        if default is None:
            self.problems.append(f"{names[0]} is missing")
            return 1
        return default

    def maybe_whole(self, name: str, default: int | None = None) -> int | None:
        """None where the key holds null, `default` where it is not there at all."""
        if name not in self.values:
            return default
        return self.whole(name) if self.has(name) else None

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.wrong(name, "true or false", value)
        return default

    def whole_list(self, name: str) -> list[int] | None:
        """None where the key is null or not there."""
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, list) and all(type(entry) is int for entry in value):
            return value
        self.wrong(name, "a list of whole numbers", value)
        return None

    def word_list(self, name: str, known: Iterable[str], length: int) -> list[str] | None:
        """A list of `length` of the known words; None where the key is null or not there."""
        value = self.values.get(name)
        if value is None:
            return None
        words = list(known)
        if isinstance(value, list) and len(value) == length and all(entry in words for entry in value):
            return value
        self.wrong(name, f"a list of {length} entries out of {', '.join(words)}", value)
        return None

    def layer_count(self, *names: str) -> int:
        count = self.whole(*(names or ("num_hidden_layers",)))
        if count > MOST_LAYERS:
            self.problems.append(f"{names[0] if names else 'num_hidden_layers'} is above {MOST_LAYERS:,}: {count:,}")
            return 1
        return count

    def tied(self, default: bool) -> bool:
        """Whether head and embedding share their weights: the text part says, else the whole config."""
        for values in (self.values, self.outer):
            value = values.get("tie_word_embeddings")
            if isinstance(value, bool):
                return value
            if value is not None:
                self.wrong("tie_word_embeddings", "true or false", value)
        return default

    def stored_dtype(self) -> str | None:
        """'bfloat16' and so on, as the config names it; None when it does not."""
        for values in (self.values, self.outer):
            for key in ("dtype", "torch_dtype"):
                value = values.get(key)
                if isinstance(value, str):
                    return value.removeprefix("torch.")
        return None

    def wrong(self, name: str, wanted: str, value: object) -> None:
        shown = repr(value)
        self.problems.append(f"{name} must be {wanted}, got {shown if len(shown) <= 60 else shown[:57] + '...'}")

    def check(self) -> None:
        """Raise ModelError when anything was missing or wrong."""
        found = self.problems or self.conflicts
        if found:
            listed = "".join(f"\n    - {problem}" for problem in dict.fromkeys(found))
            raise ModelError(
                given=f"the config of {self.name} describes no model whose size can be computed:{listed}",
                allowed="sizes and counts as whole numbers above 0, with the names that transformers gives them",
                do="correct config.json, or download the model again",
            )
