"""What the training rows really are, counted on the tokens that will be used; a warning before hours are spent."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from thriftune.data.encoding import Encoded, Example, stop_token_ids
from thriftune.data.formats import SHAPE_WORDS
from thriftune.errors import DataError
from thriftune.recipe import DataRecipe
from thriftune.records import CutAnswers, DataAudit, Lengths
from thriftune.units import format_count, format_share

Verdict = Literal["ok", "note", "warn"]

# More rows than this share without anything to learn mean that the data or max_length is wrong, not single rows.
MOST_UNTRAINED_SHARE = 0.3
# From this share on, something is worth a warning and not only a note.
_WARN_FROM_SHARE = 0.05


def audit(
    source: str, encoded: Encoded, eval_examples: Sequence[Example], tokenizer: Any, data: DataRecipe
) -> DataAudit:
    """Verdicts on encoded training rows; `source` says in words what they are.

    Raises DataError when nothing is left to train on, or when more than 30 % of the rows have no trained token.
    """
    refuse_hopeless(source, encoded, data)
    examples = encoded.examples
    lengths = np.array([len(example) for example in examples])
    tokens = int(lengths.sum())
    trained = sum(int(example.trained[1:].sum()) for example in examples)
    lost = [example.answer_tokens_lost for example in examples if example.answer_tokens_lost]
    hashes = [_hash(example) for example in examples]
    eval_hashes = {_hash(example) for example in eval_examples}
    rendering = encoded.rendering
    if encoded.unused_columns:
        rendering += f"; columns not used: {', '.join(encoded.unused_columns[:8])}"
    return DataAudit(
        source=source,
        shape=SHAPE_WORDS[encoded.shape],
        rendering=rendering,
        rows_read=encoded.rows_read,
        rows_used=len(examples),
        rows_dropped=encoded.dropped,
        token_lengths=Lengths(
            median=round(float(np.median(lengths))),
            p95=round(float(np.percentile(lengths, 95))),
            max=int(lengths.max()),
        ),
        max_length=data.max_length,
        tokens=tokens,
        trained_tokens=trained,
        trained_share=trained / tokens,
        rows_without_trained_token=encoded.rows_without_trained_token,
        prompts_cut=sum(example.prompt_cut for example in examples),
        answers_cut=CutAnswers(
            rows=len(lost),
            share=len(lost) / len(examples),
            tokens_lost_mean=sum(lost) / len(lost) if lost else 0.0,
        ),
        eos_trained=_end_is_trained(examples, stop_token_ids(tokenizer, None, data)),
        eos_token=tokenizer.eos_token,
        bos_doubled=any(_begin_is_doubled(example, tokenizer.bos_token_id) for example in examples),
        duplicate_rows=len(hashes) - len(set(hashes)),
        rows_shared_with_eval=sum(each in eval_hashes for each in hashes),
        eval_rows=len(eval_examples),
        fingerprint=_fingerprint(examples),
    )


def refuse_hopeless(source: str, encoded: Encoded, data: DataRecipe) -> None:
    """Raise DataError when nothing is left to train on, or when more than 30 % of the rows have no trained token."""
    reasons = "; ".join(f"{count:,} rows: {reason}" for reason, count in encoded.dropped.items()) or "none was read"
    untrained = encoded.rows_without_trained_token
    candidates = len(encoded.examples) + untrained
    if untrained and untrained > MOST_UNTRAINED_SHARE * candidates:
        raise DataError(
            given=f"{source}: {untrained:,} of {candidates:,} rows ({format_share(untrained, candidates)}) have no "
            f"token to learn within max_length {data.max_length} ({reasons})",
            allowed=f"at most {MOST_UNTRAINED_SHARE:.0%} such rows",
            do="raise data.max_length, or check that the answers are where they should be",
        )
    if not encoded.examples:
        raise DataError(
            given=f"{source}: no row is left to train on ({reasons})",
            allowed="at least one row with an answer",
            do="check the rows and data.columns",
        )


def _end_is_trained(examples: Sequence[Example], stop_ids: Sequence[int]) -> bool:
    """True when the last trained token of every uncut row is one that ends an answer."""
    ends = set(stop_ids)
    uncut = [example for example in examples if not example.answer_tokens_lost]
    return bool(uncut) and all(int(example.tokens[np.flatnonzero(example.trained)[-1]]) in ends for example in uncut)


def _begin_is_doubled(example: Example, begin_id: int | None) -> bool:
    return begin_id is not None and len(example) > 1 and bool((example.tokens[:2] == begin_id).all())


def _hash(example: Example) -> bytes:
    return hashlib.blake2b(example.tokens.tobytes(), digest_size=16).digest()


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.tokens.astype("<i4").tobytes())
        digest.update(np.packbits(example.trained).tobytes())
    return digest.hexdigest()


def audit_lines(audit: DataAudit) -> list[tuple[Verdict, str]]:
    """The audit as lines to print, each with a verdict: ok, note (worth knowing) or warn (probably wrong)."""
    lengths = audit.token_lengths
    lines: list[tuple[Verdict, str]] = [
        ("ok", f"{audit.source}; {audit.rows_used:,} rows used, shape {audit.shape}, {audit.rendering}"),
        (
            "ok",
            f"{format_count(audit.tokens)} tokens, {lengths.median} a row (median; 95 % have at most {lengths.p95}, "
            f"the longest {lengths.max})",
        ),
        (
            "ok",
            f"{format_count(audit.trained_tokens)} tokens are trained "
            f"({format_share(audit.trained_tokens, audit.tokens)} of all)",
        ),
    ]
    return lines + _end_lines(audit) + _loss_lines(audit) + _overlap_lines(audit) + _clean_line(audit)


def _clean_line(audit: DataAudit) -> list[tuple[Verdict, str]]:
    """What was looked for and not found, so that silence is not mistaken for not having looked."""
    found = {
        "rows dropped": sum(audit.rows_dropped.values()),
        "prompts cut": audit.prompts_cut,
        "answers cut": audit.answers_cut.rows,
        "begin tokens doubled": int(audit.bos_doubled),
        "rows repeated": audit.duplicate_rows,
    }
    if audit.eval_rows:
        found["rows shared with the eval rows"] = audit.rows_shared_with_eval
    clean = [what for what, count in found.items() if not count]
    return [("ok", f"no {', no '.join(clean)}")] if clean else []


def _graded(count: int, whole: int) -> Verdict:
    return "warn" if count >= _WARN_FROM_SHARE * whole else "note"


def _end_lines(audit: DataAudit) -> list[tuple[Verdict, str]]:
    lines: list[tuple[Verdict, str]] = []
    if audit.eos_trained:
        lines.append(("ok", "every whole answer ends in a trained end token"))
    elif audit.eos_token is None:
        lines.append(("warn", "the tokenizer has no end token: the model will not learn to stop"))
    else:
        lines.append(("warn", f"not every answer ends in a trained end token ({audit.eos_token}): it may not stop"))
    if audit.bos_doubled:
        lines.append(("warn", "rows begin with two begin tokens; take one out of the text or the template"))
    return lines


def _loss_lines(audit: DataAudit) -> list[tuple[Verdict, str]]:
    lines: list[tuple[Verdict, str]] = []
    for reason, count in sorted(audit.rows_dropped.items(), key=lambda item: -item[1]):
        lines.append((_graded(count, audit.rows_read), f"{count:,} rows dropped: {reason}"))
    if audit.prompts_cut:
        share = format_share(audit.prompts_cut, audit.rows_used)
        lines.append(
            ("note", f"{audit.prompts_cut:,} prompts ({share}) shortened to fit {audit.max_length} tokens; their "
             "answers are whole")
        )  # fmt: skip
    cut = audit.answers_cut
    if cut.rows:
        lines.append(
            (
                _graded(cut.rows, audit.rows_used),
                f"{cut.rows:,} answers ({format_share(cut.rows, audit.rows_used)}) lost their end to max_length "
                f"{audit.max_length}, {cut.tokens_lost_mean:,.0f} tokens each on average; these rows do not teach the "
                "model to stop",
            )
        )
    return lines


def _overlap_lines(audit: DataAudit) -> list[tuple[Verdict, str]]:
    lines: list[tuple[Verdict, str]] = []
    if audit.duplicate_rows:
        share = format_share(audit.duplicate_rows, audit.rows_used)
        lines.append((_graded(audit.duplicate_rows, audit.rows_used), f"{audit.duplicate_rows:,} rows ({share}) are "
                      "repetitions of others"))  # fmt: skip
    if audit.rows_shared_with_eval:
        lines.append(
            ("warn", f"{audit.rows_shared_with_eval:,} training rows stand among the {audit.eval_rows:,} eval rows too")
        )
    return lines


def example_segments(example: Example, tokenizer: Any, longest: int) -> list[tuple[str, bool]]:
    """The example as text pieces with their trained flag, in order, for printing in two colours.

    Pieces that are not trained are shortened in the middle to about `longest` characters.
    """
    borders = [0, *(np.flatnonzero(np.diff(example.trained)) + 1).tolist(), len(example)]
    pieces = []
    for start, end in itertools.pairwise(borders):
        trained = bool(example.trained[start])
        text = str(tokenizer.decode(example.tokens[start:end].tolist(), skip_special_tokens=False))
        if not trained and len(text) > longest:
            half = longest // 2
            text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
        pieces.append((text, trained))
    return pieces
