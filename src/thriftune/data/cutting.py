"""Too long rows: the longest message that is not an answer is shortened until the row fits, the template stays whole.

A text that is plainly much too long is reduced to a window first, so that a row of ten megabytes costs what its last
pages cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from thriftune.data.formats import Conversation, Message
from thriftune.data.rendering import Segment
from thriftune.recipe import DataRecipe

if TYPE_CHECKING:
    from thriftune.data.encoding import Encoder

# A window has this many characters for every token wanted; English has 4 to 5 a token.
CHARACTERS_A_TOKEN = 5

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


def shorten_prompts(
    conversation: Conversation, parts: list[list[int]], encoder: Encoder, data: DataRecipe, segments_of: Segmenter
) -> tuple[list[Segment], list[list[int]]]:
    """Segments and ids of a conversation that is too long (`parts`: its ids now), cut to `data.max_length` tokens.

    The longest message goes first, then the next, each down to nothing; what is still too long then is the answers' and
    the template's own. Raises Malformed when the template refuses the shorter messages.
    """
    done: set[int] = set()
    segments = None
    excess = _excess(parts, data)
    while excess > 0 and (index := _longest(conversation.messages, done)) is not None:
        done.add(index)
        content = _Content(conversation.messages[index]["content"], encoder, data.cut_prompt)
        kept = len(content.ids)
        while excess > 0 and kept > 0:
            kept = max(kept - excess, 0)
            conversation = _with_content(conversation, index, content.shortened(kept))
            segments = segments_of(conversation, encoder)
            parts = encoder.encode([segments])[0]
            excess = _excess(parts, data)
    return segments or segments_of(conversation, encoder), parts


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


class _Content:
    """A message's text with its token borders."""

    def __init__(self, text: str, encoder: Encoder, which: str) -> None:
        self.text = text
        self.which = which
        self.tokenizer = encoder.tokenizer
        self.encoded = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        self.ids: list[int] = self.encoded["input_ids"]

    def shortened(self, kept: int) -> str:
        """The text with `kept` of its tokens left."""
        if kept <= 0:
            return ""
        gone = len(self.ids) - kept
        first = {"start": 0, "middle": (kept + 1) // 2, "end": kept}[self.which]
        if not self.tokenizer.is_fast:
            return str(self.tokenizer.decode(self.ids[:first] + self.ids[first + gone :]))
        head = self.text[: self._border(first)] if first else ""
        tail = self.text[self._border(first + gone) :] if first + gone < len(self.ids) else ""
        return head + tail

    def _border(self, token: int) -> int:
        """The character at which a token begins."""
        return int(self.encoded.token_to_chars(token).start)
