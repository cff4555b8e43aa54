"""Verdicts on data, each on rows where it must come and on rows where it must not; and how eval rows are chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from thriftune.data import Encoded, Example, PreparedData, audit, audit_lines, example_segments, prepare
from thriftune.errors import DataError
from thriftune.recipe import DataRecipe, Recipe
from thriftune.records import DataAudit

BEGIN, END = 1, 2


def characters(eos: bool = True, template: str | None = None) -> Any:
    """One token a character; its id is the character's code."""
    special = {"<s>": BEGIN, "</s>": END}
    vocabulary = {**special, **{chr(code): code for code in (10, *range(32, 127))}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.decoder = decoders.Fuse()
    ends = {"eos_token": "</s>"} if eos else {}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **ends)
    made.chat_template = template
    return made


def row(prompt: str, completion: str = "Yo") -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def prepared(folder: Path, rows: list[dict[str, Any]], tokenizer: Any = None, **data: Any) -> PreparedData:
    path = write(folder / "train.jsonl", rows)
    recipe = Recipe.build({"data": {"name": str(path), **data}}, "the test")
    return prepare(recipe, tokenizer or characters())


def verdicts(audit: DataAudit, part: str) -> list[str]:
    return [verdict for verdict, text in audit_lines(audit) if part in text]


def test_a_clean_set(tmp_path: Path) -> None:
    audit = prepared(tmp_path, [row("a"), row("bb"), row("cccc", "Yes")]).audit
    assert (audit.rows_read, audit.rows_used, audit.rows_dropped) == (3, 3, {})
    assert audit.shape == "prompt/completion"
    assert audit.rendering == "plain text (the tokenizer has no chat template)"
    assert (audit.token_lengths.median, audit.token_lengths.max) == (5, 8)
    assert (audit.tokens, audit.trained_tokens) == (17, 10)
    assert audit.trained_share == 10 / 17
    assert audit.eos_trained
    assert audit.eos_token == "</s>"
    assert not audit.bos_doubled
    assert (audit.prompts_cut, audit.answers_cut.rows, audit.duplicate_rows, audit.eval_rows) == (0, 0, 0, 0)
    assert {verdict for verdict, _ in audit_lines(audit)} == {"ok"}
    looked_for = "no rows dropped, no prompts cut, no answers cut, no begin tokens doubled, no rows repeated"
    assert verdicts(audit, looked_for) == ["ok"]
    assert DataAudit.model_validate_json(audit.model_dump_json()) == audit


def test_answers_cut_are_counted_with_what_they_lost(tmp_path: Path) -> None:
    audit = prepared(tmp_path, [row("a"), row("a", "x" * 10), row("a", "x" * 8)], max_length=8).audit
    assert audit.answers_cut.rows == 2
    assert audit.answers_cut.share == 2 / 3
    assert audit.answers_cut.tokens_lost_mean == 2  # (3 + 1) / 2, end tokens included
    assert audit.eos_trained  # of the answers that are whole
    assert verdicts(audit, "lost their end") == ["warn"]
    assert verdicts(audit, "no answers cut") == []


def test_prompts_cut_are_a_note(tmp_path: Path) -> None:
    audit = prepared(tmp_path, [row("a"), row("a" * 20)], max_length=8).audit
    assert (audit.prompts_cut, audit.answers_cut.rows, audit.token_lengths.max) == (1, 0, 8)
    assert verdicts(audit, "shortened") == ["note"]


def test_end_verdict_comes_from_the_tokens(tmp_path: Path) -> None:
    audit = prepared(tmp_path, [row("a")], characters(eos=False)).audit
    assert not audit.eos_trained
    assert audit.eos_token is None
    assert verdicts(audit, "no end token") == ["warn"]


def test_one_answer_without_its_end_is_seen() -> None:
    whole = Example(np.array([97, 98, END], np.int32), np.array([False, True, True]))
    without = Example(np.array([97, 98, 99], np.int32), np.array([False, True, True]))
    untrained_end = Example(np.array([97, 98, END], np.int32), np.array([False, True, False]))
    cut = Example(without.tokens, without.trained, answer_tokens_lost=4)
    for others, verdict in (([], True), ([cut], True), ([without], False), ([untrained_end], False)):
        encoded = Encoded([whole, *others], 2, {}, 0, "prompt", "plain text", ())
        assert audit("rows", encoded, [], characters(), DataRecipe(name="rows.jsonl")).eos_trained is verdict


def test_all_answers_cut_is_no_end_learned(tmp_path: Path) -> None:
    audit = prepared(tmp_path, [row("a", "x" * 10)], max_length=8).audit
    assert not audit.eos_trained
    assert verdicts(audit, "may not stop") == ["warn"]


def test_doubled_begin_is_seen(tmp_path: Path) -> None:
    template = "<s><s>{% for m in messages %}{{ m.content }}{% endfor %}"
    audit = prepared(tmp_path, [row("a")], characters(template=template)).audit
    assert audit.bos_doubled
    assert verdicts(audit, "two begin tokens") == ["warn"]
    once = characters(template=template.replace("<s><s>", "<s>"))
    assert not prepared(tmp_path, [row("<s>a")], once).audit.bos_doubled


def test_dropped_rows_are_counted_by_reason(tmp_path: Path) -> None:
    audit = prepared(tmp_path, [row("a")] * 29 + [row("b", " ")]).audit
    assert audit.rows_dropped == {"empty completion": 1}
    assert verdicts(audit, "1 rows dropped: empty completion") == ["note"]


def test_duplicates_and_rows_shared_with_eval(tmp_path: Path) -> None:
    others = write(tmp_path / "eval.jsonl", [row("b"), row("z")])
    audit = prepared(tmp_path, [row("a"), row("b"), row("a"), row("a")], eval_path=str(others)).audit
    assert audit.duplicate_rows == 2
    assert audit.rows_shared_with_eval == 1
    assert audit.eval_rows == 2
    assert verdicts(audit, "repetitions") == ["warn"]
    assert verdicts(audit, "among the 2 eval rows") == ["warn"]


def test_columns_that_are_not_used_are_named(tmp_path: Path) -> None:
    """A text with a label that nobody asked for would be trained without it; nobody should find out afterwards."""
    audit = prepared(tmp_path, [{"text": "a good film", "label": 1}]).audit
    assert audit.shape == "text"
    assert "every token is trained" in audit.rendering
    assert "columns not used: label" in audit.rendering


def test_fingerprint_is_of_tokens_and_masks(tmp_path: Path) -> None:
    rows = [row("a"), row("b")]
    first = prepared(tmp_path, rows).audit.fingerprint
    assert len(first) == 64
    assert prepared(tmp_path, rows).audit.fingerprint == first
    assert prepared(tmp_path, rows[::-1]).audit.fingerprint != first
    assert prepared(tmp_path, rows, train_on_prompt=True).audit.fingerprint != first
    # The same tokens in rows of other lengths are other rows.
    ab = prepared(tmp_path, [{"text": "abc"}, {"text": "de"}], characters(eos=False)).audit.fingerprint
    assert prepared(tmp_path, [{"text": "ab"}, {"text": "cde"}], characters(eos=False)).audit.fingerprint != ab


def test_too_many_rows_without_an_answer_are_refused(tmp_path: Path) -> None:
    template = (
        "{{ messages[0].content }}{% if messages[0].content %}{% endif %}"
        + "." * 30
        + ("{% if messages|length > 1 %}{{ messages[1].content }}{% endif %}")
    )
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, [row("a")] * 10, characters(template=template), max_length=16)
    assert "10 of 10 rows (100.0 %)" in caught.value.given
    assert "max_length 16" in caught.value.given
    with pytest.raises(DataError, match=r"no row is left.*2 rows: empty completion"):
        prepared(tmp_path, [row("a", "")] * 2)


# ---------------------------------------------------------------- which rows


def prompts(prepared_rows: list[Any]) -> list[str]:
    return ["".join(map(chr, example.tokens[~example.trained])) for example in prepared_rows]


ROWS = [row(f"{number:03d}") for number in range(100)]


def test_held_out_rows_are_never_trained(tmp_path: Path) -> None:
    data = prepared(tmp_path, ROWS, eval_fraction=0.2)
    assert (len(data.train), len(data.eval)) == (80, 20)
    assert sorted(prompts(data.train) + prompts(data.eval)) == [each["prompt"] for each in ROWS]
    assert data.audit.rows_shared_with_eval == 0
    assert prompts(prepared(tmp_path, ROWS, eval_fraction=0.2).eval) == prompts(data.eval)
    with pytest.raises(DataError, match="nothing to train on"):
        prepared(tmp_path, ROWS[:2], eval_fraction=0.9)


def test_samples_are_drawn_by_the_seed(tmp_path: Path) -> None:
    data = prepared(tmp_path, ROWS, max_samples=10, eval_fraction=0.5, max_eval_samples=7)
    assert (len(data.train), len(data.eval)) == (10, 7)
    assert not set(prompts(data.train)) & set(prompts(data.eval))
    assert prompts(data.train) == sorted(prompts(data.train))
    assert prompts(data.train) != [each["prompt"] for each in ROWS[:10]]
    path = tmp_path / "train.jsonl"
    recipe = Recipe.build({"data": {"name": str(path), "max_samples": 10}, "seed": 5}, "the test")
    assert prompts(prepare(recipe, characters()).train) != prompts(prepared(tmp_path, ROWS, max_samples=10).train)


def test_eval_split_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS[:3])
    recipe = Recipe.build({"data": {"name": str(tmp_path), "eval_split": "test"}}, "the test")
    data = prepare(recipe, characters())
    assert len(data.eval) == 3
    assert data.audit.rows_shared_with_eval == 3
    write(tmp_path / "test.jsonl", [row("a", "")])
    with pytest.raises(DataError, match="no eval row is left"):
        prepare(recipe, characters())


def test_examples_know_their_rows(tmp_path: Path) -> None:
    data = prepared(tmp_path, [row("a", ""), *ROWS], max_samples=50)
    for index, example in enumerate(data.train):
        text = prompts([example])[0]
        assert data.place_of(index) == f"{tmp_path / 'train.jsonl'} row {int(text) + 2}"


# ---------------------------------------------------------------- one example, to be looked at


def test_example_in_pieces(tmp_path: Path) -> None:
    example = prepared(tmp_path, [row("Hi")]).train[0]
    assert example_segments(example, characters(), longest=40) == [("Hi", False), ("Yo</s>", True)]
    example = prepared(tmp_path, [row("start" + "x" * 100 + "finish")]).train[0]
    (prompt, trained), answer = example_segments(example, characters(), longest=10)
    assert prompt == "start [... 101 characters ...] inish"
    assert not trained
    assert answer == ("Yo</s>", True)
