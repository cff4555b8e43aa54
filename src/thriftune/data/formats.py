"""From a row of any common shape to one conversation: recognised by its keys, checked, never guessed.

    messages        {"messages": [{"role", "content"}, ...]}
    conversations   {"conversations": [{"from": "human", "value"}, ...]}        (sharegpt)
    prompt          {"prompt", "completion"}, two texts or two lists of messages
    instruction     {"instruction", "output"[, "input"][, "system"]}            (alpaca)
    question        {"question", "answer"}                                      (gsm8k, sums)
    review          {"text", "label"} of the named sets imdb and reviews
    text            {"text"}: no answer, so every token is trained

A row of the wrong make (missing key, wrong type, unknown role) is `Malformed`, an error; a row that is merely empty is
`Empty`, dropped and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from thriftune.data.sources import Rows
from thriftune.errors import DataError
from thriftune.recipe import DataRecipe

Message = dict[str, str]
Shape = Literal["messages", "conversations", "prompt", "instruction", "question", "review", "text"]

REVIEW_SETS = ("imdb", "reviews", "stanfordnlp/imdb")
REVIEW_QUESTION = "Is this review positive or negative? Answer with one word."
_LABEL_WORDS: dict[Any, str] = {0: "negative", 1: "positive", "negative": "negative", "positive": "positive"}
_LABEL_WORDS |= {"0": "negative", "1": "positive", "neg": "negative", "pos": "positive"}

SHAPE_WORDS: dict[Shape, str] = {
    "messages": "messages",
    "conversations": "sharegpt (conversations)",
    "prompt": "prompt/completion",
    "instruction": "alpaca (instruction/output)",
    "question": "question/answer",
    "review": "text and label, asked as a question",
    "text": "text",
}
# In this order: the first whose keys are all there.
_KEYS_BY_SHAPE: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "question": ("question", "answer"),
    "text": ("text",),
}
_OPTIONAL_KEYS: dict[Shape, tuple[str, ...]] = {"instruction": ("input", "system")}
_ROLES = {role: role for role in ("system", "user", "assistant", "tool", "developer")}
_ROLES |= {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """What a row says. `messages` are dicts of `role` and `content`; for a `text` row it is empty and `text` is set.

    `joined` marks a prompt and a completion given as two texts: without a chat template they are joined as they are.
    """

    messages: tuple[Message, ...]
    joined: bool
    text: str | None

    @property
    def prompt(self) -> str | list[Message]:
        """What stands before the last answer, ready for `encode_prompt`: messages, or a text when `joined`."""
        if self.text is not None:
            return self.text
        before = list(self.messages[: self._last_answer])
        return before[0]["content"] if self.joined else before

    @property
    def target(self) -> str:
        """The last answer; '' for a `text` row, which has none."""
        return "" if self.text is not None else self.messages[self._last_answer]["content"]

    @property
    def _last_answer(self) -> int:
        return max(index for index, message in enumerate(self.messages) if message["role"] == "assistant")


class Malformed(ValueError):  # noqa: N818  (a verdict on one row, turned into a DataError over all of them)
    """A row of the wrong make; the text says what is wrong with it."""


class Empty(ValueError):  # noqa: N818  (a verdict on one row: it is dropped and counted)
    """A row with nothing to learn from; the text says why."""


def recognise(row: dict[str, Any], data: DataRecipe) -> Shape:
    """The shape of a row by its keys, after `data.columns`. Raises DataError when it is none of them."""
    keys = _known_by(row, data)
    if data.name in REVIEW_SETS and not data.columns and "text" in keys:
        return "review"
    for shape, needed in _KEYS_BY_SHAPE.items():
        if all(key in keys for key in needed):
            return shape
    columns = ", ".join(repr(str(key)) for key in list(row)[:12]) or "none"
    raise DataError(
        given=f"rows of {data.name} have the columns {columns}, which is no known shape",
        allowed="; ".join(" + ".join(needed) for needed in _KEYS_BY_SHAPE.values()),
        do="name your columns, such as data.columns={prompt: question, completion: reply} or {text: body}",
    )


def _known_by(row: dict[str, Any], data: DataRecipe) -> set[str]:
    """The keys a row has under our names: with `data.columns`, only those that it maps."""
    if not data.columns:
        return set(row)
    optional = {key for keys in _OPTIONAL_KEYS.values() for key in keys}
    allowed = {key for needed in _KEYS_BY_SHAPE.values() for key in needed} | optional
    unknown = sorted(set(data.columns) - allowed)
    missing = [theirs for ours, theirs in data.columns.items() if ours in allowed and theirs not in row]
    if unknown or missing:
        raise DataError(
            given=f"data.columns={data.columns}: "
            + (f"{unknown} are no names of ours" if unknown else f"the rows have no column {missing}"),
            allowed=f"our name on the left ({', '.join(sorted(allowed))}), your column on the right "
            f"({', '.join(str(key) for key in list(row)[:12])})",
            do="correct data.columns",
        )
    return set(data.columns)


def to_conversation(row: dict[str, Any], data: DataRecipe) -> Conversation:
    """One row as a conversation. Raises DataError when the row is malformed or empty (see `conversations`)."""
    shape = recognise(row, data)
    try:
        return _convert(row, shape, data)
    except (Malformed, Empty) as problem:
        raise DataError(
            given=f"a row of {data.name}: {problem}",
            allowed=f"rows of the shape {SHAPE_WORDS[shape]}",
            do="correct or remove the row",
        ) from problem


@dataclass(frozen=True)
class Conversations:
    """The rows that say something: `kept[k]` is row `indices[k]`; `dropped` counts the others by reason."""

    kept: list[Conversation]
    indices: list[int]
    dropped: dict[str, int]
    shape: Shape
    unused_columns: tuple[str, ...]


def conversations(rows: Rows, data: DataRecipe) -> Conversations:
    """All rows as conversations. Empty rows are dropped and counted by reason.

    Raises DataError when any row is malformed: the message has the count and the first five, with their places.
    """
    if not len(rows):
        raise DataError(given=f"{rows.description}: no rows", allowed="at least one row", do="check the source")
    shape = _shape_of(rows, data)
    kept, indices, dropped = [], [], dict[str, int]()
    wrong: list[tuple[int, str]] = []
    for index, row in enumerate(rows.rows):
        try:
            kept.append(_convert(row, shape, data))
            indices.append(index)
        except Malformed as problem:
            wrong.append((index, str(problem)))
        except Empty as problem:
            dropped[str(problem)] = dropped.get(str(problem), 0) + 1
    if wrong:
        refuse_rows(rows, wrong, f"rows of the shape {SHAPE_WORDS[shape]}, as the first row is")
    used = set(data.columns.values()) or {*_KEYS_BY_SHAPE.get(shape, ("text", "label")), *_OPTIONAL_KEYS.get(shape, ())}
    unused = tuple(str(key) for key in rows.rows[0] if key not in used)
    return Conversations(kept, indices, dropped, shape, unused)


def _shape_of(rows: Rows, data: DataRecipe) -> Shape:
    """The shape of the first row that has one; rows of another make are then found one by one."""
    for row in rows.rows[:100]:
        try:
            return recognise(row, data)
        except DataError:
            continue
    return recognise(rows.rows[0], data)


def refuse_rows(rows: Rows, wrong: list[tuple[int, str]], allowed: str) -> None:
    """Raise the DataError about `wrong` rows (index, reason): how many, and the first five by place."""
    first = "".join(f"\n    - {rows.places[index]}: {reason}" for index, reason in wrong[:5])
    more = f"\n    - and {len(wrong) - 5:,} more" if len(wrong) > 5 else ""
    raise DataError(
        given=f"{len(wrong):,} of {len(rows):,} rows cannot be used:{first}{more}",
        allowed=allowed,
        do="correct or remove these rows",
    )


def _convert(row: dict[str, Any], shape: Shape, data: DataRecipe) -> Conversation:
    """Raises Malformed or Empty."""
    if not isinstance(row, dict):
        raise Malformed(f"not an object but {type(row).__name__}")
    if data.columns:
        for ours, theirs in data.columns.items():
            if theirs not in row:
                raise Malformed(f"no column {theirs!r} (data.columns: {ours})")
        row = {ours: row[theirs] for ours, theirs in data.columns.items()}
    return _CONVERTERS[shape](row)


def _value(row: dict[str, Any], key: str) -> Any:
    if key not in row:
        raise Malformed(f"the key {key!r} is missing")
    return row[key]


def _checked(text: Any, what: str) -> str:
    """A text that can be tokenised, possibly empty."""
    if not isinstance(text, str):
        shown = "null" if text is None else f"{type(text).__name__} {str(text)[:40]}"
        raise Malformed(f"{what} is not a text but {shown}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise Malformed(f"{what} has half of a surrogate pair at character {problem.start}") from problem
    return text


def _filled(text: Any, what: str) -> str:
    if not _checked(text, what).strip():
        raise Empty(f"empty {what}")
    return str(text)


def _text_of(row: dict[str, Any], key: str) -> str:
    return _filled(_value(row, key), key)


def _from_text(row: dict[str, Any]) -> Conversation:
    return Conversation((), False, _text_of(row, "text"))


def _asked(prompt: str, answer: str, joined: bool) -> Conversation:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Conversation(messages, joined, None)


def _from_question(row: dict[str, Any]) -> Conversation:
    return _asked(_text_of(row, "question"), _text_of(row, "answer"), joined=False)


def _from_review(row: dict[str, Any]) -> Conversation:
    text, label = _text_of(row, "text"), _value(row, "label")
    word = _LABEL_WORDS.get(label) if isinstance(label, int | str) else None
    if word is None:
        raise Malformed(f"label is {str(label)[:40]!r}, not 0, 1, 'negative' or 'positive'")
    return _asked(f"{text}\n\n{REVIEW_QUESTION}", word, joined=False)


def _from_instruction(row: dict[str, Any]) -> Conversation:
    instruction, output = _text_of(row, "instruction"), _text_of(row, "output")
    # `input` and `system` are often there and empty or null: then they say nothing.
    extra = _checked(row.get("input") or "", "input")
    system = _checked(row.get("system") or "", "system")
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    asked = _asked(prompt, output, joined=False)
    if not system.strip():
        return asked
    return Conversation(({"role": "system", "content": system}, *asked.messages), False, None)


def _from_prompt(row: dict[str, Any]) -> Conversation:
    prompt, completion = _value(row, "prompt"), _value(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _turns([*prompt, *completion], "role", "content")
    return _asked(_filled(prompt, "prompt"), _filled(completion, "completion"), joined=True)


def _from_messages(row: dict[str, Any]) -> Conversation:
    return _turns(_value(row, "messages"), "role", "content")


def _from_sharegpt(row: dict[str, Any]) -> Conversation:
    turns = _value(row, "conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" not in turns[0]:
        return _turns(turns, "role", "content")
    return _turns(turns, "from", "value")


def _turns(turns: Any, role_key: str, content_key: str) -> Conversation:
    """A list of turns, checked. Left out: empty system messages, and what stands after the last answer."""
    if not isinstance(turns, list):
        raise Malformed(f"the messages are not a list but {'null' if turns is None else type(turns).__name__}")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise Malformed(f"message {number} is not an object but {type(turn).__name__}")
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in _ROLES:
            raise Malformed(f"message {number} has the unknown {role_key} {str(role)[:40]!r}")
        what = f"{_ROLES[role]} message"
        if content_key not in turn:
            raise Malformed(f"message {number} has no {content_key!r}")
        content = _checked(_joined_parts(turn[content_key]), f"{content_key} of message {number}")
        if role == "system" and not content.strip():
            continue
        messages.append({"role": _ROLES[role], "content": _filled(content, what)})
    if not messages:
        raise Empty("no messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise Empty("no assistant message")
    if messages[0]["role"] == "assistant":
        raise Empty("the first message is the assistant's, so it answers nothing")
    while messages[-1]["role"] != "assistant":
        messages.pop()
    return Conversation(tuple(messages), False, None)


def _joined_parts(content: Any) -> Any:
    """A list of text parts, [{"type": "text", "text": "..."}], as one text; anything else unchanged."""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type", "text") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    return content


_CONVERTERS: dict[Shape, Callable[[dict[str, Any]], Conversation]] = {
    "messages": _from_messages,
    "conversations": _from_sharegpt,
    "prompt": _from_prompt,
    "instruction": _from_instruction,
    "question": _from_question,
    "review": _from_review,
    "text": _from_text,
}
