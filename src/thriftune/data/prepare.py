"""A recipe's data, ready to train on: rows drawn, held out, encoded and audited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from thriftune.data.audit import audit
from thriftune.data.encoding import Example, encode_rows
from thriftune.data.sources import Rows, load_file, load_rows
from thriftune.errors import DataError
from thriftune.recipe import Recipe
from thriftune.records import DataAudit


@dataclass(frozen=True)
class PreparedData:
    train: list[Example]
    eval: list[Example]
    audit: DataAudit
    train_rows: Rows

    def place_of(self, index: int) -> str:
        """Where training example `index` came from: 'rows.jsonl row 17'."""
        return self.train_rows.places[self.train[index].row]


def prepare(recipe: Recipe, tokenizer: Any) -> PreparedData:
    """Load, draw, hold out, encode and audit. Eval rows come from `eval_split`, `eval_path` or `eval_fraction` (held
    out by the seed, never also trained); without these there are none. Raises DataError."""
    data = recipe.data
    rows, eval_rows = training_rows(recipe)
    if data.eval_split is not None:
        eval_rows = load_rows(data, data.eval_split)
    elif data.eval_path is not None:
        eval_rows = load_file(data.eval_path, "data.eval_path")
    encoded = encode_rows(rows, tokenizer, data)
    eval_examples: list[Example] = []
    if eval_rows is not None:
        eval_examples = encode_rows(_drawn(eval_rows, data.max_eval_samples, recipe.seed), tokenizer, data).examples
        if not eval_examples:
            raise DataError(
                given=f"{eval_rows.description}: no eval row is left after dropping those that are empty",
                allowed="at least one eval row with an answer",
                do="check the eval rows, or train without them",
            )
    return PreparedData(
        encoded.examples, eval_examples, audit(rows.description, encoded, eval_examples, tokenizer, data), rows
    )


def training_rows(recipe: Recipe) -> tuple[Rows, Rows | None]:
    """(the rows to train on, those of the same source held out by `eval_fraction`). Raises DataError."""
    data = recipe.data
    rows, held_out = load_rows(data, data.split), None
    if data.eval_fraction and data.eval_split is None and data.eval_path is None:
        rows, held_out = _held_out(rows, data.eval_fraction, recipe.seed)
    return _drawn(rows, data.max_samples, recipe.seed), held_out


def _drawn(rows: Rows, most: int | None, seed: int) -> Rows:
    """At most `most` rows, drawn by the seed, in their old order."""
    if most is None or len(rows) <= most:
        return rows
    chosen = np.random.default_rng([seed, 1]).permutation(len(rows))[:most]
    return rows.select(sorted(chosen.tolist()), f"{most:,} drawn by seed {seed}")


def _held_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """(rows to train on, rows held out), disjoint, together all."""
    count = max(1, round(fraction * len(rows)))
    if count >= len(rows):
        raise DataError(
            given=f"data.eval_fraction {fraction:g} of {len(rows):,} rows leaves nothing to train on",
            allowed="a share that leaves rows on both sides",
            do="lower data.eval_fraction or name eval rows with data.eval_path",
        )
    order = np.random.default_rng([seed, 0]).permutation(len(rows)).tolist()
    return (
        rows.select(sorted(order[count:]), f"{count:,} of them held out by seed {seed}"),
        rows.select(sorted(order[:count]), "held out"),
    )
