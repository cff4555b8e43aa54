"""A conversation with the model, on whatever reads lines and writes text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch

from thriftune.data import encode_prompt, stop_token_ids
from thriftune.infer.batching import model_positions
from thriftune.infer.generate import stream
from thriftune.infer.prompts import pad_token_id_of, room_for_answer
from thriftune.recipe import DataRecipe, GenerationRecipe

HELP = "/reset forgets the conversation, /exit (or end of input) leaves, Ctrl-C stops an answer.\n"

# More tokens than any conversation has: encoding must not cut, because here whole turns are left out, aloud.
_UNCUT = 10**9
_LEAST_ROOM = 64  # tokens: a short message is tried, however little memory there seems to be

Messages = list[dict[str, str]]


def chat_loop(
    model: Any,
    tokenizer: Any,
    data: DataRecipe,
    settings: GenerationRecipe,
    read_line: Callable[[], str],
    write: Callable[[str], None],
    *,
    seed: int,
    most_tokens: int | None = None,
) -> Messages:
    """Read a line, stream the answer, keep both, until `/exit` or the end of input.

    Args:
        data: how conversations are rendered; as in training. Its `max_length` is not a limit here, except for a model
            that has no limit of positions.
        read_line: gives a line without its newline; raises EOFError at the end, as `input` does.
        write: is given pieces of text, newlines included.
        seed: of the sampling; the n-th answer uses seed + n.
        most_tokens: what memory has room for of a conversation and its next answer, where that is known.

    Returns:
        the conversation as it stands at the end.

    Where the device runs out of memory while answering, the message is taken back and later conversations are kept
    shorter than that one.

    Raises:
        InputError: the model has too few positions for `settings.max_new_tokens`.
    """
    positions = model_positions(model)
    unlimited = data if positions is None else data.model_copy(update={"max_length": positions})
    room = room_for_answer(unlimited, model, settings.max_new_tokens).max_length
    if most_tokens is not None:
        room = max(min(room, most_tokens - settings.max_new_tokens), _LEAST_ROOM)
    stops = stop_token_ids(tokenizer, getattr(model, "generation_config", None), data)
    messages: Messages = []
    answers = 0
    write(HELP)
    while (line := _next_line(read_line, write)) is not None:
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            messages = []
            write("(the conversation is forgotten)\n")
            continue
        if text.startswith("/") and " " not in text:
            write(f"({text} is no command. {HELP.strip()})\n")
            continue
        if not text:
            continue
        messages, prompt = _fitting([*messages, {"role": "user", "content": text}], tokenizer, data, room, write)
        if prompt is None:
            continue
        pieces = stream(model, prompt, settings, stops, pad_token_id_of(tokenizer), tokenizer, seed=seed + answers)
        try:
            answer = _say(pieces, write)
        except torch.OutOfMemoryError:
            messages.pop()
            room = len(prompt) * 3 // 4
            write(
                f"\n(the device ran out of memory at {len(prompt):,} tokens; the message is taken back, and from now "
                f"on a conversation keeps {room:,}: say it again, or shorter)\n"
            )
            continue
        answers += 1
        if answer.strip():
            messages.append({"role": "assistant", "content": answer})
        else:
            messages.pop()
            write("(no answer; your message is left out of the conversation)\n")
    return messages


def _next_line(read_line: Callable[[], str], write: Callable[[str], None]) -> str | None:
    """None at the end of input. Ctrl-C while nothing is being answered only reminds of the way out."""
    while True:
        try:
            return read_line()
        except EOFError:
            return None
        except KeyboardInterrupt:
            write(f"\n({HELP.strip()})\n")


def _say(pieces: Any, write: Callable[[str], None]) -> str:
    """Write the pieces as they come; Ctrl-C ends the answer and keeps what was said."""
    said: list[str] = []
    with closing(pieces):
        try:
            for piece in pieces:
                said.append(piece)
                write(piece)
        except KeyboardInterrupt:
            write(" (stopped)")
    write("\n")
    return "".join(said)


def _fitting(
    messages: Messages, tokenizer: Any, data: DataRecipe, room: int, write: Callable[[str], None]
) -> tuple[Messages, list[int] | None]:
    """The conversation without its oldest turns where it has more than `room` tokens, and its ids.

    When the last message alone is too long it is refused: the conversation comes back without it, and None.
    """
    uncut = data.model_copy(update={"max_length": _UNCUT})
    kept = list(messages)
    prompt = encode_prompt(kept, tokenizer, uncut)
    while len(prompt) > room and len(kept) > 1:
        kept = kept[2:]
        prompt = encode_prompt(kept, tokenizer, uncut)
    if len(prompt) > room:
        write(f"(your message has {len(prompt):,} tokens and the model room for {room:,}; it was not sent)\n")
        return messages[:-1], None
    left_out = len(messages) - len(kept)
    if left_out:
        write(
            f"(the conversation has more than the {room:,} tokens there is room for; "
            f"its first {left_out} messages are left out)\n"
        )
    return kept, prompt
