"""From a conversation to text segments: which stretches the model is given, and which it has to say itself.

A conversation becomes `Segment`s in order, prompt and answer by turns. Training encodes each segment by itself and so
does asking (see `encoding.py`): the ids before an answer are the same in both, whatever the characters at the border.

The text comes from the tokenizer's chat template, from a .jinja file, or from the plain form below. Where an answer
begins and ends in a template's text is found, in this order: by the template's own {% generation %} marks; by rendering
the messages before the answer (with the generation prompt) and up to it, which must be prefixes of the whole; by the
answer's own words, when the template rewrites earlier turns (thinking left out of the history).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from thriftune.data.formats import Malformed, Message
from thriftune.errors import DataError, first_line
from thriftune.recipe import DataRecipe

# The plain form of a conversation for a tokenizer without a chat template. An answer follows a line break, so it is
# encoded alike after any prompt; each answer ends in the tokenizer's end token.
_PLAIN_ROLES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "thriftune-probe"


@dataclass(frozen=True)
class Segment:
    """A stretch of text, encoded by itself. `add_end`: the end token's id follows (the text does not hold it)."""

    text: str
    answer: bool
    add_end: bool


@dataclass(frozen=True)
class Renderer:
    """How conversations become text for one tokenizer. `template` is None for plain text."""

    tokenizer: Any
    template: str | None
    words: str
    end_of_turn: str | None

    @cached_property
    def end_texts(self) -> tuple[str, ...]:
        """Special tokens that end an answer."""
        found = (self.tokenizer.eos_token, self.end_of_turn)
        return tuple(dict.fromkeys(text for text in found if text))

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        """What a template may name: bos_token, eos_token ..."""
        return {name: str(value) for name, value in self.tokenizer.special_tokens_map.items() if value}

    def render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        """The template's text. Raises Malformed with the template's own reason when it refuses the messages."""
        text, _ = self._run(messages, generation_prompt, marks=False)
        return text

    def _run(
        self, messages: Sequence[Message], generation_prompt: bool, marks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self.template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=generation_prompt,
                **self._special_tokens,
            )
        except Exception as problem:  # whatever a template does: it is a program that the user brought
            told = f"{type(problem).__name__}: {first_line(problem, 200)}"
            raise Malformed(f"the chat template refuses it: {told}") from problem
        return texts[0], [(start, end) for start, end in spans[0]] if marks else []

    def segments(self, messages: Sequence[Message], generation_prompt: bool) -> list[Segment]:
        """The messages as segments, prompt and answer by turns.

        With `generation_prompt` the last segment is the prompt of the next answer. Without, whitespace after the last
        end token is left out: nothing is learned from it. Raises Malformed.
        """
        messages = [self._without_own_marks(message) for message in messages]
        if self.template is None:
            return self._plain(messages, generation_prompt)
        marks = _GENERATION_MARK.search(self.template) is not None
        whole, marked = self._run(messages, generation_prompt, marks)
        answers = sum(message["role"] == "assistant" for message in messages)
        if marks and len(marked) != answers:
            raise Malformed(f"the chat template marks {len(marked)} answers with {{% generation %}}, not {answers}")
        spans = marked if marks else self._spans(messages, whole)
        return self._cut_up(whole, [self._to_end_token(whole, span) for span in spans], generation_prompt)

    def _without_own_marks(self, message: Message) -> Message:
        """The message without the end tokens (an answer) or begin token (a prompt) that rendering writes itself."""
        content = message["content"]
        if message["role"] != "assistant":
            begin = self.tokenizer.bos_token
            if self.template is None or not begin or not content.startswith(begin):
                return message
            return {**message, "content": content.removeprefix(begin)}
        return {**message, "content": strip_end(content, self.end_texts)}

    def _plain(self, messages: Sequence[Message], generation_prompt: bool) -> list[Segment]:
        segments: list[Segment] = []
        given = ""
        for message in messages:
            head = f"{_PLAIN_ROLES[message['role']]}:\n"
            if message["role"] == "assistant":
                segments += [Segment(given + head, False, False), Segment(message["content"], True, True)]
                given = "\n\n"
            else:
                given += f"{head}{message['content']}\n\n"
        if generation_prompt:
            segments.append(Segment(f"{given}{_PLAIN_ROLES['assistant']}:\n", False, False))
        elif given.strip():
            segments.append(Segment(given, False, False))
        return segments

    def _spans(self, messages: Sequence[Message], whole: str) -> list[tuple[int, int]]:
        """Where each answer stands in `whole`, as the difference of rendered prefixes."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], generation_prompt=True)
            if not whole.startswith(before):
                raise Malformed(
                    f"the chat template's generation prompt before message {index + 1} is not what it writes when the "
                    "answer is there; mark the answers in the template with {% generation %}"
                )
            last = index == len(messages) - 1
            after = whole if last else self.render(messages[: index + 1], generation_prompt=False)
            if whole.startswith(after) and len(after) >= len(before):
                spans.append((len(before), len(after)))
                continue
            # The whole shows this turn otherwise than it was when it was said: take what it shows.
            content = message["content"].strip()
            found = whole.find(content, len(before))
            if found < 0:
                raise Malformed(
                    f"the chat template does not show the answer in message {index + 1}; mark the answers in the "
                    "template with {% generation %}"
                )
            spans.append((len(before), found + len(content)))
        return spans

    def _to_end_token(self, whole: str, span: tuple[int, int]) -> tuple[int, int]:
        """The span ending right behind its end token: without the whitespace after it, or with a token left outside."""
        start, end = span
        stripped = whole[start:end].rstrip()
        if stripped.endswith(self.end_texts):
            return start, start + len(stripped)
        for text in self.end_texts:
            if whole.startswith(text, end):
                return start, end + len(text)
        return start, end

    def _cut_up(self, whole: str, spans: list[tuple[int, int]], generation_prompt: bool) -> list[Segment]:
        segments: list[Segment] = []
        position = 0
        for number, (start, end) in enumerate(spans, start=1):
            text = whole[start:end]
            last = number == len(spans) and not generation_prompt
            add_end = last and not text.endswith(self.end_texts)
            segments += [Segment(whole[position:start], False, False), Segment(text, True, add_end)]
            position = end
        rest = whole[position:]
        if generation_prompt or rest.strip():
            segments.append(Segment(rest, False, False))
        return segments


def strip_end(text: str, end_texts: tuple[str, ...]) -> str:
    """`text` without end tokens at its end (and the space after them), so that the one we write is the only one."""
    while end_texts and (stripped := text.rstrip()).endswith(end_texts):
        longest = max((end for end in end_texts if stripped.endswith(end)), key=len)
        text = stripped.removesuffix(longest)
    return text


def renderer_for(tokenizer: Any, data: DataRecipe) -> Renderer:
    """The renderer that `data.chat_template` asks for. Raises DataError for a template that cannot be read."""
    if data.chat_template == "none":
        return Renderer(tokenizer, None, "plain text, as data.chat_template=none asks", None)
    if data.chat_template == "auto":
        if not getattr(tokenizer, "chat_template", None):
            return Renderer(tokenizer, None, "plain text (the tokenizer has no chat template)", None)
        template = tokenizer.get_chat_template()
        words = "the tokenizer's chat template"
    else:
        template = _read_template(data.chat_template)
        words = f"the chat template {data.chat_template}"
    return Renderer(tokenizer, template, words, _end_of_turn(tokenizer, template))


def _read_template(name: str) -> str:
    import jinja2

    path = Path(name).expanduser()
    allowed = "auto, none, or a file with a Jinja chat template"
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise DataError(
            given=f"data.chat_template {name!r} cannot be read: {problem}", allowed=allowed, do="correct the path"
        ) from problem
    try:
        # {% generation %} is known to transformers only; for the look at the syntax it may go.
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
        )
    except jinja2.TemplateSyntaxError as problem:
        raise DataError(
            given=f"data.chat_template {name} line {problem.lineno}: {problem.message}",
            allowed=allowed,
            do="correct the template",
        ) from problem
    return template


def _end_of_turn(tokenizer: Any, template: str) -> str | None:
    """The special token that the template writes right after an answer, if it writes one."""
    renderer = Renderer(tokenizer, template, "", None)
    try:
        text = renderer.render(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}], generation_prompt=False
        )
    except Malformed:
        return None  # a template of other roles; the rows will tell
    rest = text.rpartition(_PROBE)[2].lstrip()
    found = [special for special in special_texts(tokenizer) if rest.startswith(special)]
    return max(found, key=len, default=None)


def special_texts(tokenizer: Any) -> list[str]:
    """Texts that the tokenizer turns into one special token each."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return list(
        dict.fromkeys([*tokenizer.all_special_tokens, *(str(token) for token in added if token.special and str(token))])
    )
