"""Too long rows: the longest message that is not an answer is shortened until the row fits, the template stays whole.

A text that is plainly much too long is reduced to a window first, so that a row of ten megabytes costs what its last
pages cost. The steps of one row are written as they follow each other (`_fit`); many rows take them together, so that
the tokenizer gets a list of texts at each step, which it may encode on several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from thriftune.data.formats import Conversation, Malformed, Message
from thriftune.data.rendering import Segment
from thriftune.recipe import DataRecipe

if TYPE_CHECKING:
    from thriftune.data.encoding import Encoder

# A window has this many characters for every token wanted; English has 4 to 5 a token.
CHARACTERS_A_TOKEN = 5

Segmenter = Callable[[Conversation], list[Segment]]


@dataclass(frozen=True)
class Fitted:
    """A row's segments, the ids of each, and whether a prompt of it was shortened."""

    segments: list[Segment]
    parts: list[list[int]]
    cut: bool


@dataclass(frozen=True)
class Tokens:
    """A text's ids, and the character at which each begins (None from a tokenizer that cannot tell)."""

    ids: list[int]
    begins: list[int] | None


# What a row asks on its way: the ids of its segments (answered by a list for each), or a text's Tokens.
_Question = list[Segment] | str


def to_window(text: str, length: int, which: str) -> str:
    """`text` with its start, middle or end (`which`) missing, so that `length` characters are left."""
    if length >= len(text):
        return text
    if which == "start":
        return text[len(text) - length :]
    if which == "end":
        return text[:length]
    head = (length + 1) // 2
    return text[:head] + text[len(text) - (length - head) :]


def windowed(conversation: Conversation, data: DataRecipe) -> Conversation:
    """The conversation with its longest prompt message reduced to a window when it looks much too long.

    A guess that saves encoding the whole: when the window turns out to fit, it was too small and the caller has to take
    the whole conversation after all. Returned unchanged (the same object) when it does not look too long.
    """
    room = CHARACTERS_A_TOKEN * max(data.max_length, 1)
    index = _longest(conversation.messages, set())
    if index is None or len(conversation.messages[index]["content"]) <= room:
        return conversation
    return _with_content(conversation, index, to_window(conversation.messages[index]["content"], room, data.cut_prompt))


def fit(rows: Sequence[tuple[Conversation, Segmenter]], encoder: Encoder, data: DataRecipe) -> list[Fitted | Malformed]:
    """Each conversation in `data.max_length` tokens; longer only where all prompts are cut to nothing, or it is a text.

    A conversation that its segmenter refuses, whole or shortened, is answered by that Malformed.
    """
    steps = [_fit(conversation, segments_of, encoder, data) for conversation, segments_of in rows]
    found: list[Fitted | Malformed | None] = [None] * len(rows)
    answers: dict[int, Any] = dict.fromkeys(range(len(rows)))
    while answers:
        asked: dict[int, _Question] = {}
        for row, answer in answers.items():
            try:
                asked[row] = steps[row].send(answer)
            except StopIteration as end:
                found[row] = end.value
            except Malformed as problem:
                found[row] = problem
        texts = {row: question for row, question in asked.items() if isinstance(question, str)}
        segments = {row: question for row, question in asked.items() if not isinstance(question, str)}
        answers = dict(zip(texts, encoder.tokens(list(texts.values())), strict=True))
        answers |= dict(zip(segments, encoder.encode(list(segments.values())), strict=True))
    return [one for one in found if one is not None]


def _fit(
    conversation: Conversation, segments_of: Segmenter, encoder: Encoder, data: DataRecipe
) -> Generator[_Question, Any, Fitted]:
    """The longest prompt goes first, then the next, each down to nothing; what is still too long then is the answers'
    and the template's own."""
    window = windowed(conversation, data)
    segments = segments_of(window)
    parts: list[list[int]] = yield segments
    if window is not conversation and _excess(parts, data) <= 0:
        window, segments = conversation, segments_of(conversation)
        parts = yield segments
    if (excess := _excess(parts, data)) <= 0 or conversation.text is not None:
        return Fitted(segments, parts, False)
    done: set[int] = set()
    while excess > 0 and (index := _longest(window.messages, done)) is not None:
        done.add(index)
        text = window.messages[index]["content"]
        tokens: Tokens = yield text
        kept = len(tokens.ids)
        while excess > 0 and kept > 0:
            kept = max(kept - excess, 0)
            window = _with_content(window, index, _shortened(text, tokens, kept, encoder, data.cut_prompt))
            segments = segments_of(window)
            parts = yield segments
            excess = _excess(parts, data)
    return Fitted(segments, parts, True)


def _excess(parts: Sequence[Sequence[int]], data: DataRecipe) -> int:
    return sum(map(len, parts)) - data.max_length


def _longest(messages: Sequence[Message], done: set[int]) -> int | None:
    """The index of the message with the most characters that is no answer and not yet `done`."""
    left = [index for index, message in enumerate(messages) if message["role"] != "assistant" and index not in done]
    return max(left, key=lambda index: len(messages[index]["content"]), default=None)


def _with_content(conversation: Conversation, index: int, content: str) -> Conversation:
    messages = list(conversation.messages)
    messages[index] = {**messages[index], "content": content}
    return replace(conversation, messages=tuple(messages))


def _shortened(text: str, tokens: Tokens, kept: int, encoder: Encoder, which: str) -> str:
    """The text with `kept` of its tokens left: its start, middle or end (`which`) is gone."""
    if kept <= 0:
        return ""
    gone = len(tokens.ids) - kept
    first = {"start": 0, "middle": (kept + 1) // 2, "end": kept}[which]
    if tokens.begins is None:
        return str(encoder.tokenizer.decode(tokens.ids[:first] + tokens.ids[first + gone :]))
    head = text[: tokens.begins[first]] if first else ""
    tail = text[tokens.begins[first + gone] :] if first + gone < len(tokens.ids) else ""
    return head + tail
