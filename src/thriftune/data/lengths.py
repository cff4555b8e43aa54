"""How long the training rows are, in tokens, found out without torch: what a plan needs to know of a person's data.

The rows go the way they go in training (`prepare.py`): the same reading, drawing, rendering, encoding and cutting. Only
the tokenizer is loaded otherwise: transformers' AutoTokenizer imports torch, its tokenizer classes do not, so the class
that it would take is found here by its rules. Where they leave a doubt, `exact` says so.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thriftune.data.audit import refuse_hopeless
from thriftune.data.encoding import Encoded, encode_rows
from thriftune.data.formats import Conversation, conversations
from thriftune.data.prepare import training_rows
from thriftune.errors import ModelError, first_line
from thriftune.recipe import DataRecipe, Recipe

# A sample always has this many of the rows with the most characters, and among them the longest in tokens: so on GSM8K
# and IMDb with three tokenizers, though rows of many short tokens can hide from it.
LONGEST_ROWS = 8

# Measured with Llama 3's tokenizer (128,256 ids) on 2,000 rows each, tokens without templates: 4.49 characters a token
# on IMDb reviews, 4.25 on books, 4.09 on GSM8K's questions; but 2.87 on GSM8K's answers, which are full of numbers.
# Prose and chat lie near 4.2. Texts of numbers, code and other languages have more tokens than this says.
CHARACTERS_A_TOKEN = 4.2
# What a chat template writes around a message. Llama 3's: begin and end of the header, the role, a line, end of turn.
TEMPLATE_TOKENS_A_MESSAGE = 5

# The class that takes tokenizer.json as it stands, under all its names (without "Fast" at the end).
_GENERIC = "PreTrainedTokenizerFast"
_GENERIC_NAMES = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
# AutoTokenizer's rules, as of transformers 5.23: for these model types one class, whatever tokenizer_config.json names,
_CLASS_BY_MODEL_TYPE = {
    **dict.fromkeys(("mistral", "mixtral", "phi3", "phimoe", "granite", "granitemoe", "olmo2", "olmo3"), _GENERIC),
    **dict.fromkeys(("glm", "glm4", "glm4_moe", "stablelm", "nemotron", "minimax_m2"), _GENERIC),
    "qwen2": "Qwen2Tokenizer",
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"), "Qwen3_5Tokenizer"),
}
# and for these the class that tokenizer_config.json names.
_NAMED_CLASS_TYPES = (
    *("llama", "llama4_text", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "smollm3", "gpt_oss"),
    *("gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "gptj", "phi", "opt", "falcon"),
    *("deepseek_v2", "deepseek_v3", "cohere", "cohere2", "olmo", "olmoe", "starcoder2"),
)


@dataclass(frozen=True)
class RowLengths:
    """Tokens and targets (trained tokens that are predicted) of each measured row, in row order, after cutting.

    `rows` is the number of rows that training would use in the whole set. Of more rows than were asked for, a sample is
    measured: drawn by the seed, and besides the longest rows by characters, so its mean is a little too high.
    `exact`: counted with the tokenizer that training takes. `source` says in words what was measured, and how.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    rows: int
    exact: bool
    source: str


def measure_lengths(recipe: Recipe, tokenizer_folder: Path | None, sample_rows: int) -> RowLengths:
    """The lengths of the recipe's training rows, or of about `sample_rows` of them. Imports no torch.

    Without a folder that holds a tokenizer.json they are estimated from the rows' characters. Raises DataError as
    `prepare` does for the training rows (of a sample: what only encoding finds, in its rows), and ModelError for a
    damaged tokenizer.
    """
    data = recipe.data
    rows, _ = training_rows(recipe)
    found = conversations(rows, data)
    if not found.kept:
        refuse_hopeless(rows.description, Encoded([], len(rows), found.dropped, 0, found.shape, "", ()), data)
    chosen = _chosen(found.kept, sample_rows, recipe.seed)
    if tokenizer_folder is None or not (tokenizer_folder / "tokenizer.json").is_file():
        how = f"estimated at {CHARACTERS_A_TOKEN:g} characters a token, without the model's tokenizer"
        lengths = [_estimated(found.kept[place], data) for place in chosen]
        return _row_lengths(lengths, len(found.kept), False, rows.description, how)
    tokenizer, is_certain = open_tokenizer(tokenizer_folder)
    how = f"counted with the tokenizer in {tokenizer_folder}"
    if not is_certain:
        how += ", its tokenizer.json taken as it stands (training may read it otherwise)"
    description = rows.description
    is_sample = len(chosen) < len(found.kept)
    if is_sample:
        # Row 0 comes along because it decides which shape the rows have.
        rows = rows.select(sorted({0, *(found.indices[place] for place in chosen)}), "a sample")
    encoded = encode_rows(rows, tokenizer, data)
    if not is_sample or not encoded.examples:
        refuse_hopeless(rows.description, encoded, data)
    share_used = len(encoded.examples) / (len(encoded.examples) + encoded.rows_without_trained_token)
    lengths = [(len(example), example.num_targets) for example in encoded.examples]
    return _row_lengths(lengths, round(len(found.kept) * share_used), is_certain, description, how)


def _row_lengths(lengths: Sequence[tuple[int, int]], rows: int, exact: bool, what: str, how: str) -> RowLengths:
    """`lengths` are (tokens, targets) of each row; `what` and `how` they were measured becomes the source."""
    if len(lengths) < rows:
        what += f", {len(lengths):,} of them measured"
    return RowLengths(
        tuple(tokens for tokens, _ in lengths), tuple(targets for _, targets in lengths), rows, exact, f"{what}; {how}"
    )


def _chosen(kept: Sequence[Conversation], most: int, seed: int) -> list[int]:
    """Places among `kept`, ascending: all, or `most` drawn by the seed and the longest."""
    if len(kept) <= most:
        return list(range(len(kept)))
    drawn = np.random.default_rng([seed, 2]).permutation(len(kept))[:most].tolist()
    longest = heapq.nlargest(LONGEST_ROWS, range(len(kept)), key=lambda place: _characters(kept[place])[0])
    return sorted({*drawn, *longest})


def _characters(conversation: Conversation) -> tuple[int, int]:
    """(all of them, those of the answers)"""
    if conversation.text is not None:
        return len(conversation.text), len(conversation.text)
    whole = sum(len(message["content"]) for message in conversation.messages)
    return whole, sum(len(message["content"]) for message in conversation.messages if message["role"] == "assistant")


def _estimated(conversation: Conversation, data: DataRecipe) -> tuple[int, int]:
    """(tokens, targets) of a row by its characters: prompts are cut to fit `data.max_length`, answers only if alone."""
    whole, answered = _characters(conversation)
    messages = len(conversation.messages)
    answers = sum(message["role"] == "assistant" for message in conversation.messages)
    around = TEMPLATE_TOKENS_A_MESSAGE * messages if messages else 2  # a text: its begin and end
    tokens = min(round(whole / CHARACTERS_A_TOKEN) + around, data.max_length)
    if conversation.text is not None or data.train_on_prompt:
        return tokens, tokens - 1
    return tokens, min(round(answered / CHARACTERS_A_TOKEN) + answers, tokens - 1)


def open_tokenizer(folder: Path) -> tuple[Any, bool]:
    """The tokenizer of a model's folder, and whether training certainly takes the same one.

    Like `models.load_tokenizer` without torch, and without running code that a repository ships. Raises ModelError.
    """
    import transformers

    try:
        name = _class_name(folder)
        kind = getattr(transformers, name or _GENERIC, transformers.PreTrainedTokenizerFast)
        return kind.from_pretrained(folder, local_files_only=True), name is not None
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise ModelError(
            given=f"no tokenizer can be loaded from {folder}: {first_line(error)}",
            allowed="tokenizer.json and tokenizer_config.json beside the model",
            do="download the model again",
        ) from None


def _class_name(folder: Path) -> str | None:
    """The class in transformers that AutoTokenizer would take for the folder; None when that is not known here."""
    config, settings = _json_object(folder / "config.json"), _json_object(folder / "tokenizer_config.json")
    model_type = config.get("model_type")
    if "auto_map" in settings or (folder / "tekken.json").is_file():
        return None
    if model_type in _CLASS_BY_MODEL_TYPE:
        return _CLASS_BY_MODEL_TYPE[model_type]
    named = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or "").removesuffix("Fast")
    if named in _GENERIC_NAMES:
        return _GENERIC
    if not named.endswith("Tokenizer") or model_type not in _NAMED_CLASS_TYPES:
        return None
    if named == "LlamaTokenizer" and '"ByteLevel"' in (folder / "tokenizer.json").read_text(encoding="utf-8"):
        return _GENERIC
    return named


def _json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty when there is no such file. Raises ValueError or OSError."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if isinstance(content, dict) else {}
