"""The name that a person may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' with the nearest of the known names, matched by their last part; '' when none is near."""
    by_leaf: dict[str, str] = {}
    for name in known:
        by_leaf.setdefault(name.split(".")[-1].lower(), name)
        by_leaf.setdefault(name.lower(), name)
    near = difflib.get_close_matches(word.lower(), list(by_leaf), n=1, cutoff=0.6)
    return f" (did you mean {by_leaf[near[0]]}?)" if near else ""
