"""Too long rows: the longest message that is not an answer is shortened until the row fits, the template stays whole.

Shortening by tokens needs the token borders only near the cut, so never more than a window of the text is encoded: a
row of ten megabytes costs what its last pages cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from thriftune.data.formats import Conversation, Message
from thriftune.data.rendering import Segment
from thriftune.recipe import DataRecipe

if TYPE_CHECKING:
    from thriftune.data.encoding import Encoder

# A window has this many characters for every token wanted (English has 4 to 5 a token); it doubles when that is short.
CHARACTERS_A_TOKEN = 6

Segmenter = Callable[[Conversation, "Encoder"], list[Segment]]


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


def fits_surely_not(conversation: Conversation, data: DataRecipe) -> Conversation:
    """The conversation with its longest prompt message reduced to a window when it looks much too long.

    A guess that saves encoding the whole: when the window turns out to fit, it was too small and the caller has to take
    the whole conversation after all. Returned unchanged (the same object) when it does not look too long.
    """
    room = CHARACTERS_A_TOKEN * max(data.max_length, 1)
    index = _longest(conversation.messages, set())
    if index is None or len(conversation.messages[index]["content"]) <= room:
        return conversation
    return _with_content(conversation, index, to_window(conversation.messages[index]["content"], room, data.cut_prompt))


def shorten_prompts(
    conversation: Conversation, encoder: Encoder, data: DataRecipe, segments_of: Segmenter
) -> tuple[list[Segment], list[list[int]]]:
    """Segments and ids of a conversation that is too long, its prompts cut to fit `data.max_length` tokens.

    The longest message goes first, then the next, each down to nothing; what is still too long then is the answers' and
    the template's own. Raises Malformed when the template refuses the shorter messages.
    """
    done: set[int] = set()
    while True:
        index = _longest(conversation.messages, done)
        if index is None:
            segments = segments_of(conversation, encoder)
            return segments, encoder.encode([segments])[0]
        done.add(index)
        content = conversation.messages[index]["content"]
        conversation = _with_content(conversation, index, "")
        segments = segments_of(conversation, encoder)
        parts = encoder.encode([segments])[0]
        kept = data.max_length - sum(map(len, parts))
        if kept <= 0:
            continue  # without this message it is still too long (or just full): the next one goes too
        borders = _Borders(content, kept, encoder, data.cut_prompt)
        while kept > 0:
            shorter = _with_content(conversation, index, borders.shortened(kept))
            segments = segments_of(shorter, encoder)
            parts = encoder.encode([segments])[0]
            excess = sum(map(len, parts)) - data.max_length
            if excess <= 0:
                break
            kept -= excess
        if kept > 0:
            return segments, parts


def _longest(messages: Sequence[Message], done: set[int]) -> int | None:
    """The index of the message with the most characters that is no answer and not yet `done`."""
    left = [index for index, message in enumerate(messages) if message["role"] != "assistant" and index not in done]
    return max(left, key=lambda index: len(messages[index]["content"]), default=None)


def _with_content(conversation: Conversation, index: int, content: str) -> Conversation:
    messages = list(conversation.messages)
    messages[index] = {**messages[index], "content": content}
    return replace(conversation, messages=tuple(messages))


class _Borders:
    """A text's token borders around a cut that leaves at most `most` tokens."""

    def __init__(self, text: str, most: int, encoder: Encoder, which: str) -> None:
        self.which = which
        self.tokenizer = encoder.tokenizer
        length = CHARACTERS_A_TOKEN * most
        while True:
            self.text = to_window(text, length, which)
            encoded = self._encode(self.text)
            self.ids: list[int] = encoded["input_ids"]
            if len(self.ids) > most or length >= len(text):
                break
            length *= 2
        self.offsets: list[tuple[int, int]] | None = encoded.get("offset_mapping")

    def _encode(self, text: str) -> Any:
        return self.tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=self.tokenizer.is_fast,
            verbose=False,
        )

    def shortened(self, kept: int) -> str:
        """The text with at most `kept` of its tokens left."""
        gone = len(self.ids) - kept
        if gone <= 0:
            return self.text
        first = {"start": 0, "middle": (kept + 1) // 2, "end": kept}[self.which]
        if self.offsets is None:
            return str(self.tokenizer.decode(self.ids[:first] + self.ids[first + gone :]))
        head = self.text[: self.offsets[first][0]] if first else ""
        tail = self.text[self.offsets[first + gone][0] :] if first + gone < len(self.ids) else ""
        return head + tail
