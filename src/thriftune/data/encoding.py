"""From segments to token ids and a mask of what is trained; too long rows are cut in the prompt, never in the answer.

Shapes: T tokens of one row. Every segment (see `rendering.py`) is encoded by itself, in training and in asking alike:

    tokens_T = [begin] prompt_1 | answer_1 end | prompt_2 | answer_2 end | ...

so `encode_rows` gives exactly `encode_prompt` followed by `encode_answer` for an uncut row of one turn. Encoding the
whole text at once would let a prompt's last characters merge with the answer's first ("A: " + "4"), which the model
never meets when it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from thriftune.data.cutting import Fitted, Tokens, fit
from thriftune.data.formats import Conversation, Malformed, Message, Shape, conversations, refuse_rows
from thriftune.data.rendering import Renderer, Segment, renderer_for, special_texts, strip_end
from thriftune.data.sources import Rows
from thriftune.errors import DataError
from thriftune.recipe import DataRecipe

ROWS_A_CHUNK = 1000

# Texts put before a segment that continues a line, for tokenizers that write a space before every text's first word
# (sentencepiece). The first one that stays a token of its own serves.
_ANCHORS = ("\n", "\t", "\x01", "|")


@dataclass(frozen=True, slots=True)
class Example:
    """One row, ready for the model. `tokens` int32 [T], `trained` bool [T]; a token is a target where `trained`.

    `row` is the index among the rows it was made from. `prompt_cut`: its prompt was shortened to fit.
    """

    tokens: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    row: int = 0
    prompt_cut: bool = False
    answer_tokens_lost: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Trained tokens that something stands before: position 0 is never predicted."""
        return int(self.trained[1:].sum())


@dataclass(frozen=True)
class Encoded:
    """Examples of a set of rows, and what happened on the way. `dropped` counts rows by reason."""

    examples: list[Example]
    rows_read: int
    dropped: dict[str, int]
    rows_without_trained_token: int
    shape: Shape
    rendering: str
    unused_columns: tuple[str, ...]


@dataclass(frozen=True)
class Encoder:
    """What encoding needs to know of a tokenizer, found out once."""

    tokenizer: Any
    renderer: Renderer
    begin_id: int | None
    anchor: str | None

    def encode_plainly(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text by itself, nothing added. Warnings about a model's length are not for here."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Ids of each text by itself, and where in it each token begins."""
        if not self.tokenizer.is_fast:
            return [Tokens(ids, None) for ids in self.encode_plainly(texts)]
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        found = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [Tokens(ids, [begin for begin, _ in spans]) for ids, spans in found]

    def continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that go on from what stands before them, so without the space a sentencepiece writes first."""
        if self.anchor is None:
            return self.encode_plainly(texts)
        before = self.encode_plainly([self.anchor])[0]
        found = []
        for text, ids in zip(texts, self.encode_plainly([self.anchor + text for text in texts]), strict=True):
            fits = ids[: len(before)] == before
            found.append(ids[len(before) :] if fits else self.encode_plainly([text])[0])
        return found

    def encode(self, rows: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """Ids of every segment of every row, tokenised in two batches (first segments, continuations)."""
        firsts = iter(self.encode_plainly([row[0].text for row in rows]))
        texts = [segment.text for row in rows for segment in row[1:]]
        distinct = list(dict.fromkeys(texts))
        ids_by_text = dict(zip(distinct, self.continuations(distinct), strict=True))
        end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        result = []
        for row in rows:
            parts = [self._with_begin(next(firsts), row[0]), *(list(ids_by_text[segment.text]) for segment in row[1:])]
            for part, segment in zip(parts, row, strict=True):
                if segment.add_end:
                    part += end
            result.append(parts)
        return result

    def _with_begin(self, ids: list[int], first: Segment) -> list[int]:
        """The begin token before plain text, where the tokenizer writes one by habit and the text has none yet."""
        if self.begin_id is None or (ids and ids[0] == self.begin_id):
            return list(ids)
        return [self.begin_id, *ids]


def encoder_for(tokenizer: Any, data: DataRecipe, raw_text: bool = False) -> Encoder:
    """`raw_text` is for rows of text, which no template touches."""
    renderer = renderer_for(tokenizer, data)
    if raw_text:
        renderer = Renderer(tokenizer, None, "as it is", None)
    usual = tokenizer("a", return_attention_mask=False)["input_ids"]
    bare = tokenizer("a", add_special_tokens=False, return_attention_mask=False)["input_ids"]
    adds_begin = len(usual) > len(bare) and usual[0] == tokenizer.bos_token_id
    begin_id = tokenizer.bos_token_id if adds_begin and renderer.template is None else None
    return Encoder(tokenizer, renderer, begin_id, _anchor(tokenizer, renderer, bare))


def _anchor(tokenizer: Any, renderer: Renderer, ids_of_a: list[int]) -> str | None:
    """None for a tokenizer that writes no space of its own before a text. Raises DataError when no anchor serves."""
    first = tokenizer.convert_ids_to_tokens(ids_of_a[:1])
    if not first or not str(first[0]).startswith(("▁", "Ġ")):
        return None
    for anchor in _ANCHORS:
        alone, with_a = (
            tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            for text in (anchor, anchor + "a")
        )
        if with_a[: len(alone)] == alone and len(with_a) > len(alone):
            return anchor
    raise DataError(
        given=f"the tokenizer {type(tokenizer).__name__} joins every text with what stands before it",
        allowed="a tokenizer that can encode an answer apart from its prompt",
        do="use the model's fast tokenizer (tokenizer.json)",
    )


def _segments(conversation: Conversation, encoder: Encoder) -> list[Segment]:
    """Raises Malformed when the template refuses the messages."""
    ends = encoder.renderer.end_texts
    if conversation.text is not None:
        return [Segment(strip_end(conversation.text, ends), True, True)]
    if conversation.joined and encoder.renderer.template is None:
        prompt, completion = (message["content"] for message in conversation.messages)
        return [Segment(prompt, False, False), Segment(strip_end(completion, ends), True, True)]
    return encoder.renderer.segments(conversation.messages, generation_prompt=False)


def encode_rows(rows: Rows, tokenizer: Any, data: DataRecipe) -> Encoded:
    """Every row as an Example of at most `data.max_length` tokens, in row order.

    Rows that are empty, or of which no trained token is left, are dropped and counted by reason. Raises DataError when
    rows are malformed (all of them counted, five named) or the tokenizer or template cannot be used.
    """
    found = conversations(rows, data)
    encoder = encoder_for(tokenizer, data, raw_text=found.shape == "text")
    examples: list[Example] = []
    wrong: list[tuple[int, str]] = []
    for start in range(0, len(found.kept), ROWS_A_CHUNK):
        chunk = found.kept[start : start + ROWS_A_CHUNK]
        indices = found.indices[start : start + ROWS_A_CHUNK]
        made, refused = _encode_chunk(chunk, indices, encoder, data)
        examples += made
        wrong += refused
    if wrong:
        refuse_rows(rows, wrong, f"rows that {encoder.renderer.words} can render")
    kept = [example for example in examples if example.trained[1:].any()]
    dropped = dict(found.dropped)
    untrained = len(examples) - len(kept)
    if untrained:
        dropped[f"no trained token within max_length {data.max_length}"] = untrained
    rendering = encoder.renderer.words
    if found.shape == "text":
        rendering = "text as it is; every token is trained"
    return Encoded(kept, len(rows), dropped, untrained, found.shape, rendering, found.unused_columns)


def _encode_chunk(
    chunk: Sequence[Conversation], indices: Sequence[int], encoder: Encoder, data: DataRecipe
) -> tuple[list[Example], list[tuple[int, str]]]:
    """Examples of the rows, and the rows (index, reason) that the template refuses."""
    examples, wrong = [], []
    rows = [(conversation, partial(_segments, encoder=encoder)) for conversation in chunk]
    for index, found in zip(indices, fit(rows, encoder, data), strict=True):
        if isinstance(found, Malformed):
            wrong.append((index, str(found)))
        else:
            examples.append(_example(found, index, data))
    return examples, wrong


def _example(found: Fitted, row: int, data: DataRecipe) -> Example:
    """Tokens and mask of a row; what exceeds max_length is cut from its end. A tail without an answer is left out."""
    segments, parts = found.segments, found.parts
    if not data.train_on_prompt:
        last = max((number for number, segment in enumerate(segments) if segment.answer), default=-1)
        segments, parts = segments[: last + 1], parts[: last + 1]
    tokens_T = np.concatenate([np.zeros(0, np.int32), *(np.array(part, np.int32) for part in parts)])
    flags = [segment.answer or data.train_on_prompt for segment in segments]
    trained_T = np.repeat(np.array(flags, np.bool_), [len(part) for part in parts])
    kept = data.max_length
    return Example(tokens_T[:kept], trained_T[:kept], row, found.cut, int(trained_T[kept:].sum()))


Prompt = str | Sequence[Message] | Conversation


def encode_prompt(prompt: Prompt, tokenizer: Any, data: DataRecipe, reserve: int = 0) -> list[int]:
    """The ids a model sees before its answer: a list [T], T <= data.max_length - reserve.

    `prompt` is a Conversation's `.prompt`: messages (earlier answers among them), or a text, which a chat template
    makes a user message and plain rendering leaves as it is. A Conversation stands for its own prompt. Too long prompts
    are cut as in training, to leave `reserve` tokens for the answer. Raises DataError.
    """
    return encode_prompts([prompt], tokenizer, data, reserve)[0]


def encode_prompts(prompts: Sequence[Prompt], tokenizer: Any, data: DataRecipe, reserve: int = 0) -> list[list[int]]:
    """`encode_prompt` of each. Most are tokenised together, which the tokenizer may do on several threads."""
    encoder = encoder_for(tokenizer, data)
    room = data.model_copy(update={"max_length": data.max_length - reserve})
    found: list[list[int]] = []
    for start in range(0, len(prompts), ROWS_A_CHUNK):
        asked = [_AskedPrompt.of(prompt) for prompt in prompts[start : start + ROWS_A_CHUNK]]
        rows = [(one.conversation, partial(one.segments, encoder=encoder)) for one in asked]
        for one, fitted in zip(asked, fit(rows, encoder, room), strict=True):
            if isinstance(fitted, Malformed):
                raise one.refused(fitted, encoder) from fitted
            found.append(_within([token for part in fitted.parts for token in part], room, reserve))
    return found


def _within(ids: list[int], room: DataRecipe, reserve: int) -> list[int]:
    """The ids of a prompt that is cut as far as it may be. Raises DataError where they are still too many."""
    if len(ids) > room.max_length:
        raise DataError(
            given=f"a prompt of {len(ids)} tokens when everything that may be cut is cut, with {reserve} tokens "
            f"for the answer and max_length {room.max_length + reserve}",
            allowed=f"at most {max(room.max_length, 0)} tokens",
            do="raise data.max_length or ask for a shorter answer",
        )
    return ids


@dataclass(frozen=True)
class _AskedPrompt:
    """A prompt on its way to ids. `is_text`: it came as a text and not as messages."""

    conversation: Conversation
    is_text: bool

    @staticmethod
    def of(prompt: Prompt) -> _AskedPrompt:
        if isinstance(prompt, Conversation):
            prompt = prompt.prompt
        messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
        return _AskedPrompt(Conversation(messages, False, None), isinstance(prompt, str))

    def segments(self, conversation: Conversation, encoder: Encoder) -> list[Segment]:
        """Of this conversation or a shorter form of it. Raises Malformed when the template refuses it."""
        if self.is_text and encoder.renderer.template is None:
            return [Segment(conversation.messages[0]["content"], False, False)]
        return encoder.renderer.segments(conversation.messages, generation_prompt=True)

    def refused(self, problem: Malformed, encoder: Encoder) -> DataError:
        messages = self.conversation.messages
        told = messages[0]["content"] if self.is_text else str(messages)
        return DataError(
            given=f"the prompt {told[:80]!r}: {problem}",
            allowed=f"messages that {encoder.renderer.words} can render",
            do="correct the messages, or use data.chat_template=none",
        )


def encode_answer(text: str, tokenizer: Any, data: DataRecipe) -> list[int]:
    """Ids of an answer that follows a prompt, with its end token: a list [T]. Raises DataError."""
    encoder = encoder_for(tokenizer, data)
    answer = {"role": "assistant", "content": text}
    try:
        if encoder.renderer.template is None:
            segment = Segment(strip_end(text, encoder.renderer.end_texts), True, True)
        else:
            found = encoder.renderer.segments([{"role": "user", "content": "?"}, answer], generation_prompt=False)
            segment = next(segment for segment in found if segment.answer)
    except Malformed as problem:
        raise DataError(
            given=f"the answer {text[:80]!r}: {problem}",
            allowed=f"an answer that {encoder.renderer.words} can render",
            do="use data.chat_template=none",
        ) from problem
    end = [tokenizer.eos_token_id] if segment.add_end and tokenizer.eos_token_id is not None else []
    return [*encoder.continuations([segment.text])[0], *end]


def stop_token_ids(tokenizer: Any, generation_config: Any = None, data: DataRecipe | None = None) -> list[int]:
    """Ids that end an answer, sorted: the end tokens of tokenizer and generation config, and the special token that the
    chat template (of `data` when given, else the tokenizer's own) writes after an assistant message."""
    found = {tokenizer.eos_token_id}
    configured = getattr(generation_config, "eos_token_id", None)
    found |= set(configured) if isinstance(configured, list | tuple) else {configured}
    renderer = renderer_for(tokenizer, data or DataRecipe())
    if renderer.end_of_turn is not None and renderer.end_of_turn in special_texts(tokenizer):
        found.add(tokenizer.convert_tokens_to_ids(renderer.end_of_turn))
    return sorted(int(token) for token in found if token is not None)
