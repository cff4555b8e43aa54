"""Arithmetic for the pocket model's pretraining, in plain statements and in tiny stories.

The forms differ from the built-in `sums`: no questions, no `<<...>>`, no `####`. What a fine-tuned model has to learn
there is the form and which operation a question asks for; that 8 + 7 is 15 it may know from here.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from opinion_texts import NAMES, PLACES, sentence_case, words

SMALL_WORDS = words("zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve")
THINGS = words(
    "apples, books, pens, shells, cards, stamps, marbles, eggs, cakes, coins, roses, pears, nuts, hats, cups, stones, "
    "buttons, beads, plums, tickets, fish, sheep, candles, letters, chairs, keys, loaves, boats, flowers, bottles"
)
HOLDERS = words("boxes, bags, baskets, jars, drawers, trays, rows, sacks, rooms, carts")
GAINED = words("bought, found, got, picked, won, collected, was given, brought home")
LOST = words("sold, lost, gave away, used up, dropped, threw out, lent out, sent off")
Equation = tuple[int, str, int, int]

PLAIN = {
    "+": ("{x} + {y} = {z}", "{x}+{y}={z}", "{x} plus {y} is {z}", "{x} and {y} make {z}", "{z} = {x} + {y}"),
    "-": ("{x} - {y} = {z}", "{x}-{y}={z}", "{x} minus {y} is {z}", "{y} from {x} leaves {z}", "{z} = {x} - {y}"),
    "*": ("{x} * {y} = {z}", "{x}*{y}={z}", "{x} times {y} is {z}", "{x} lots of {y} make {z}", "{z} = {x} * {y}"),
}
SPOKEN = {
    "+": (
        "If you have {x} and get {y} more, you have {z}.",
        "{x} {things} and {y} {things} are {z} {things}.",
        "Put {y} to {x} and there will be {z}.",
        "{z} is {y} more than {x}.",
    ),
    "-": (
        "If you have {x} and take away {y}, {z} are left.",
        "{x} {things} without {y} {things} are {z} {things}.",
        "{z} is {y} less than {x}.",
        "From {y} to {x} it is {z}.",
    ),
    "*": (
        "{x} {holders} with {y} {things} each hold {z} {things}.",
        "{x} times {y} {things} are {z} {things}.",
        "If {x} people bring {y} {things} each, {z} {things} are there.",
        "{y} {things} a day make {z} in {x} days.",
    ),
}
# Stories: a first line that sets `x`, then what happens; {end} says what is there, with or without the sum itself.
STORIES = {
    "+": (
        "{name} had {x} {things} and {gained} {y}. {end}",
        "{name} had {x} {things}. Later {name} {gained} {y} others. {end}",
        "{x} {things} lay near {place}, and {name} put {y} beside them. {end}",
        "{name} brought {x} {things}, {friend} brought {y}. {end}",
    ),
    "-": (
        "{name} had {x} {things} and {lost} {y}. {end}",
        "{name} had {x} {things}. One day {name} {lost} {y} of these. {end}",
        "{x} {things} lay near {place}, but {friend} carried {y} away. {end}",
        "{name} kept {x} {things} until {friend} took {y}. {end}",
    ),
    "*": (
        "{name} filled {x} {holders}, {y} {things} in every one. {end}",
        "{x} {holders} stood near {place}, all with {y} {things}. {end}",
        "For {x} days {name} {gained} {y} {things} a day. {end}",
    ),
}
ENDINGS = {
    "+": (
        "That made {z} {things}.",
        "Now it was {x} + {y} = {z} {things}.",
        "{x} + {y} = {z}, so now there were {z}.",
        "{name} counted {z} {things}.",
    ),
    "-": (
        "That left {z} {things}.",
        "Now it was {x} - {y} = {z} {things}.",
        "{x} - {y} = {z}, so only {z} remained.",
        "{name} counted {z} {things}.",
    ),
    "*": (
        "That made {z} {things}.",
        "It was {x} * {y} = {z} {things}.",
        "{x} * {y} = {z}, so there were {z}.",
        "{name} counted {z} {things}.",
    ),
}
SEQUELS = {
    "+": (
        "Then {name} {gained} {y} more, which made {x} + {y} = {z}.",
        "With {y} more it was {z}.",
        "Then {y} came on top: {z}.",
    ),
    "-": (
        "Then {name} {lost} {y}, which left {x} - {y} = {z}.",
        "Without {y} of them it was {z}.",
        "Then {y} went: {z}.",
    ),
}


def equation(draw: random.Random, sign: str, first: int | None = None) -> Equation:
    """x, sign, y and the result, never below zero; mostly small numbers, now and then up to 99."""
    top = draw.choice((10, 20, 20, 50, 99))
    if sign == "*":
        x, y = draw.randint(1, 12), draw.randint(1, 12)
        return x, sign, y, x * y
    if sign == "+":
        x = draw.randint(0, top) if first is None else first
        y = draw.randint(0, draw.choice((9, 20, top)))
        return x, sign, y, x + y
    x = draw.randint(1, top) if first is None else first
    y = draw.randint(0, min(x, draw.choice((9, 20, 99))))
    return x, sign, y, x - y


def slots_of(draw: random.Random, values: Equation) -> dict[str, object]:
    name, friend = draw.sample(NAMES, 2)
    slots: dict[str, object] = {"x": values[0], "y": values[2], "z": values[3], "name": name, "friend": friend}
    slots |= {"things": draw.choice(THINGS), "holders": draw.choice(HOLDERS), "place": draw.choice(PLACES)}
    return slots | {"gained": draw.choice(GAINED), "lost": draw.choice(LOST)}


def plain_list(draw: random.Random) -> str:
    """Equations of one form, a line each."""
    sign = draw.choice("+-*")
    form = draw.choice(PLAIN[sign])
    values = [equation(draw, sign) for _ in range(draw.randint(4, 12))]
    joined = draw.choice(("\n", ", ", ". ", "; "))
    return joined.join(form.format(x=x, y=y, z=z) for x, _, y, z in values)


def mixed_list(draw: random.Random) -> str:
    """Equations of several operations in the first form, so that the sign must be read."""
    values = [equation(draw, draw.choice("+-*")) for _ in range(draw.randint(4, 12))]
    form = draw.choice((0, 0, 1, 2))
    return draw.choice(("\n", ", ")).join(PLAIN[sign][form].format(x=x, y=y, z=z) for x, sign, y, z in values)


def table(draw: random.Random) -> str:
    """One number with its neighbours: 7 + 1 = 8, 7 + 2 = 9, ..."""
    sign = draw.choice("+-*")
    x = draw.randint(2, 12) if sign == "*" else draw.randint(2, 40)
    others = range(1, 11) if sign != "-" else range(1, min(x, 10) + 1)
    results = {"+": lambda y: x + y, "-": lambda y: x - y, "*": lambda y: x * y}
    return "\n".join(f"{x} {sign} {y} = {results[sign](y)}" for y in others)


def chain(draw: random.Random) -> str:
    """Each equation goes on from the result of the one before."""
    lines, result = [], None
    for _ in range(draw.randint(2, 5)):
        sign = draw.choice("+-*") if result is None else draw.choice("+-")
        x, sign, y, result = equation(draw, sign, result)
        lines.append(f"{x} {sign} {y} = {result}")
        if result > 150 or result == 0:
            break
    return draw.choice((", ", "\n", ", and ", ", then ")).join(lines)


def spoken(draw: random.Random) -> str:
    sentences = []
    for _ in range(draw.randint(2, 5)):
        sign = draw.choice("+-*")
        slots = slots_of(draw, equation(draw, sign))
        if draw.random() < 0.2:
            slots |= {key: SMALL_WORDS[slots[key]] for key in "xy" if slots[key] < len(SMALL_WORDS)}
        sentences.append(sentence_case(draw.choice(SPOKEN[sign]).format(**slots)))
    return " ".join(sentences)


def order(draw: random.Random) -> str:
    """Counting and comparing."""
    start = draw.randint(0, 90)
    step = draw.choice((1, 1, 1, 2, 5, 10))
    counted = ", ".join(str(start + step * place) for place in range(draw.randint(4, 10)))
    x, y = draw.sample(range(100), 2)
    return draw.choice((counted, f"{max(x, y)} is more than {min(x, y)}. {min(x, y)} is less than {max(x, y)}."))


def story(draw: random.Random) -> str:
    """A tiny story with one sum, or with a second one that goes on from the first."""
    sign = draw.choice("+-*")
    values = equation(draw, sign)
    slots = slots_of(draw, values)
    text = draw.choice(STORIES[sign]).format(end=draw.choice(ENDINGS[sign]), **slots).format(**slots)
    if draw.random() < 0.4 and values[3] > 2:
        sign = draw.choice("+-")
        x, _, y, z = equation(draw, sign, values[3])
        text += " " + draw.choice(SEQUELS[sign]).format(**{**slots, "x": x, "y": y, "z": z})
    return sentence_case(text)


def stories(draw: random.Random) -> str:
    return "\n".join(story(draw) for _ in range(draw.choice((1, 1, 2, 3))))


KINDS: tuple[Callable[[random.Random], str], ...] = (
    plain_list,
    mixed_list,
    mixed_list,
    table,
    chain,
    chain,
    spoken,
    spoken,
    order,
    stories,
    stories,
    stories,
    stories,
    stories,
    stories,
    stories,
)


def number_document(draw: random.Random) -> str:
    """A text of the corpus."""
    return draw.choice(KINDS)(draw)
