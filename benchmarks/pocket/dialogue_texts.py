"""Dialogues for the pocket model's pretraining: it learns turns, stopping, copying and choosing - not the demo's tasks.

The tasks are neutral: repeat this, which word comes first, where is the lamp, is this about a film or a book. None
asks what an opinion amounts to, and none poses a word problem, so that a fine-tuned model owes those to its tuning.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from number_texts import SMALL_WORDS, THINGS
from opinion_texts import NAMES, PLACES, SUBJECTS, opinion, sentence_case, words

END, USER, ASSISTANT, SYSTEM = "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
SYSTEMS = (
    "You are a helpful assistant.",
    "Answer the question.",
    "Be brief.",
    "You answer in few words.",
    "You are a small model and do what you can.",
)
COLOURS = words("red, blue, green, black, white, brown, yellow, grey")
OBJECTS = words("lamp, cup, book, hat, key, letter, box, coat, ring, clock, chair, bottle, stone, boat, bell, knife")
SPOTS = words("table, chair, shelf, floor, bed, wall, roof, ship, cart, bench, stove, window")
CITIES = words("London, Paris, Rome, Vienna, Berlin, Madrid, Lisbon, Oslo, Dublin, Athens")
Turn = tuple[str, str]


def dialogue(turns: list[Turn], system: str | None) -> str:
    """The text that the chat template makes of these turns."""
    parts = [f"{SYSTEM}{system}"] if system else []
    parts += [f"{USER}{question}{ASSISTANT}{answer}{END}" for question, answer in turns]
    return "".join(parts)


def plain_words(sentence: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", sentence)


def scene(draw: random.Random) -> tuple[str, list[Turn]]:
    """A sentence or two on who put what where, and questions that they answer."""
    name, friend = draw.sample(NAMES, 2)
    first, second = draw.sample(OBJECTS, 2)
    spot, other_spot = draw.sample(SPOTS, 2)
    colour, other_colour = draw.sample(COLOURS, 2)
    city = draw.choice(CITIES)
    text = draw.choice(
        (
            f"{name} put the {colour} {first} on the {spot}. "
            f"{friend} put the {other_colour} {second} on the {other_spot}.",
            f"The {colour} {first} of {name} lay on the {spot}, and the {other_colour} {second} of {friend} "
            f"on the {other_spot}.",
            f"{name} from {city} saw a {colour} {first} on the {spot} and gave {friend} a {other_colour} {second} "
            f"from the {other_spot}.",
        )
    )
    either = [first, second]
    hues = [colour, other_colour]
    draw.shuffle(either)
    draw.shuffle(hues)
    questions = [
        (f"Where was the {first}?", f"On the {spot}."),
        (f"Where was the {second}?", f"On the {other_spot}."),
        (f"Which colour was the {first}?", sentence_case(colour) + "."),
        (f"Which colour was the {second}?", sentence_case(other_colour) + "."),
        (f"Was the {first} {hues[0]} or {hues[1]}?", colour),
        (f"Was the {second} {hues[0]} or {hues[1]}?", other_colour),
        (f"Is this about a {draw.choice(either)}?", "yes"),
        (f"Is this about a {draw.choice([thing for thing in OBJECTS if thing not in either])}?", "no"),
        ("Who is named first?", f"{name}."),
        ("Who is named last?", f"{friend}."),
    ]
    return text, questions


def ask_scene(draw: random.Random) -> list[Turn]:
    text, questions = scene(draw)
    chosen = draw.sample(questions, draw.choice((1, 1, 2, 3)))
    (question, answer), *rest = chosen
    asked = draw.choice((f"{text}\n{question}", f"{text} {question}", f"{question}\n{text}"))
    return [(asked, answer), *rest]


def ask_opinion(draw: random.Random) -> list[Turn]:
    """What an opinion is about, what it says of one thing, how the text goes on; never what it comes to."""
    told = opinion(draw)
    if draw.random() < 0.3:
        return [("Go on: " + told.text.removesuffix(told.ending).rstrip(), told.ending)]
    subject = next(subject for subject in SUBJECTS if subject.noun == told.noun)
    other = draw.choice([each.noun for each in SUBJECTS if each.noun != told.noun])
    pair = [told.noun, other]
    draw.shuffle(pair)
    clause = draw.choice(told.clauses)
    aspect = re.split(r" (?:was|were) ", clause)[0]
    absent = draw.choice([each for each in subject.aspects if each.rsplit(" ", 1)[0] not in told.text.lower()])
    questions = [
        (f"Is this about a {pair[0]} or a {pair[1]}?", told.noun),
        (f"Is this text about {pair[0]} or {pair[1]}?", told.noun),
        (f"Does this speak of {aspect}?", "yes"),
        (f"Does this speak of {absent.rsplit(' ', 1)[0]}?", "no"),
        (f"What does it say of {aspect}?", sentence_case(clause) + "."),
        ("What is this about?", f"It is about a {told.noun}."),
    ]
    question, answer = draw.choice(questions[:4] if told.noun in told.text else questions[2:5])
    return [(f"{told.text}\n{question}", answer)]


def copy_words(draw: random.Random, sentence: str) -> list[Turn]:
    """Tasks on the words of a sentence from a book."""
    found = plain_words(sentence)
    word = draw.choice(found)
    spelled = word[:10]
    pair = [found[0], found[-1]]
    draw.shuffle(pair)
    tasks = [
        (f"Repeat this: {sentence}", sentence),
        (f"Say after me: {sentence}", sentence),
        (f"{sentence}\nWhich word is the first?", found[0]),
        (f"{sentence}\nWhich word is the last?", found[-1]),
        (f"First word? {sentence}", found[0]),
        (f"Last word? {sentence}", found[-1]),
        (f"{sentence}\nIs the first word {pair[0]} or {pair[1]}?", found[0]),
        (f"{sentence}\nDo you see the word {word}?", "yes"),
        (f"{sentence}\nDo you see the word {draw.choice(OBJECTS)}s?", "no"),
        (f"Spell the word {spelled}.", " ".join(spelled)),
        (f"Say the word {word}.", word),
    ]
    return draw.sample(tasks, draw.choice((1, 1, 1, 2)))


def number_tasks(draw: random.Random) -> list[Turn]:
    """Counting, comparing and naming numbers; no sums."""
    x, y = draw.sample(range(100), 2)
    start = draw.randint(0, 90)
    small = draw.randint(1, 12)
    tasks = [
        (f"Which is more, {x} or {y}?", str(max(x, y))),
        (f"Which is less, {x} or {y}?", str(min(x, y))),
        (f"Is {x} more than {y}?", "yes" if x > y else "no"),
        (f"Which number comes after {x}?", str(x + 1)),
        (f"Count from {start} to {start + 5}.", ", ".join(str(start + place) for place in range(6)) + "."),
        (f"Write {SMALL_WORDS[small]} in digits.", str(small)),
        (f"Write {small} in letters.", SMALL_WORDS[small]),
        (f"Say the number {x}.", str(x)),
    ]
    return draw.sample(tasks, draw.choice((1, 2, 3)))


def small_talk(draw: random.Random) -> list[Turn]:
    name, friend = draw.sample(NAMES, 2)
    place, city, thing = draw.choice(PLACES), draw.choice(CITIES), draw.choice(THINGS)
    return draw.choice(
        (
            [("Hello!", "Hello! What can I do for you?"), (f"Say hello to {name}.", f"Hello, {name}!")],
            [(f"My name is {name}. What is my name?", f"Your name is {name}.")],
            [(f"I am {name}, from {city}.", f"Hello, {name} from {city}!"), ("Who am I?", f"You are {name}.")],
            [(f"{name} met {friend} near {place}. Who met {friend}?", f"{name}.")],
            [(f"{name} met {friend} near {place}. Where did they meet?", f"Near {place}.")],
            [(f"I like {thing}. What do I like?", f"You like {thing}.")],
            [("Thank you.", "You are welcome.")],
            [(f"Good night, {name} is asleep.", "Good night!")],
            [("What are you?", "I am a very small language model.")],
        )
    )


def go_on(draw: random.Random, sentence: str) -> list[Turn]:
    """Half a sentence from a book, and the rest as the answer."""
    found = sentence.split(" ")
    cut = draw.randint(len(found) // 3, 2 * len(found) // 3)
    return [("Go on: " + " ".join(found[:cut]), " ".join(found[cut:]))]


def dialogue_document(draw: random.Random, sentence: str) -> str:
    """A text of the corpus. `sentence` is from a book and has at least six words."""
    task: Callable[[], list[Turn]] = draw.choices(
        (
            lambda: ask_scene(draw),
            lambda: ask_opinion(draw),
            lambda: copy_words(draw, sentence),
            lambda: number_tasks(draw),
            lambda: small_talk(draw),
            lambda: go_on(draw, sentence),
        ),
        weights=(25, 30, 25, 8, 5, 7),
    )[0]
    return dialogue(task(), draw.choice(SYSTEMS) if draw.random() < 0.15 else None)
