"""Two data sets made by seeded code, so that a first run needs no download: `sums` and `reviews`.

`sums` are word problems of one or two steps, answered in the form of GSM8K (Cobbe et al. 2021): a sentence a step with
`<<3+4=7>>` after the equals sign, and `#### 7` at the end. `reviews` are short opinions on films, books, cafes and
gadgets; in most of them one clause says the opposite of the verdict, and some verdicts are negations ("nobody could
call it dull"), so that counting kind words is not enough.

The test split is made from other sentences, other people and other titles than `train` and `validation`: a model that
learned the sentences by heart gains nothing there. The same call always gives the same rows.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from thriftune.errors import DataError

Row = dict[str, str]

ROWS_BY_SPLIT = {
    "sums": {"train": 2000, "validation": 200, "test": 300},
    "reviews": {"train": 2000, "validation": 200, "test": 400},
}


def _words(text: str) -> list[str]:
    return text.split(", ")


PEOPLE = {
    "train": _words(
        "Tom, Anna, Ben, Clara, David, Ella, Frank, Grace, Henry, Ida, Jack, Kate, Leo, Maria, Nora, Oscar, Paul, "
        "Rosa, Sam, Tilda, Victor, Wendy, Adam, Beth, Carl, Dora, Emma, Fred, Gina, Hugo"
    ),
    "test": _words(
        "Peter, Lucy, Martin, Jane, George, Alice, Walter, Helen, Arthur, Ruth, Simon, Laura, Edward, Mary, Philip"
    ),
}

# ---------------------------------------------------------------- sums

THINGS = _words(
    "apples, books, pens, shells, cards, stamps, marbles, eggs, cakes, coins, roses, pears, nuts, hats, cups, stones, "
    "buttons, beads, plums, tickets"
)
HOLDERS = _words("boxes, bags, baskets, jars, drawers, trays")
GAINS = _words("buys, finds, gets, picks, wins, collects")
LOSSES = _words("sells, loses, gives away, uses up, drops")

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Story(NamedTuple):
    """A question with places for numbers a, b, c, and its steps: what leads in, and which operation on which values.

    In a step `r` is the result of the step before.
    """

    question: str
    steps: tuple[tuple[str, str], ...]


STORIES = {
    "train": (
        Story(
            "{name} has {a} {things}. {name} {gains} {b} more. How many {things} does {name} have now?",
            (("{name} has", "a+b"),),
        ),
        Story(
            "There are {a} {things} on the table and {b} {things} on the floor. How many {things} are there?",
            (("There are", "a+b"),),
        ),
        Story(
            "{name} {gains} {a} {things} on Monday and {b} on Tuesday. How many {things} is that in all?",
            (("In all that is", "a+b"),),
        ),
        Story(
            "{name} has {a} {things} and {loses} {b} of them. How many {things} are left?",
            (("{name} has", "a-b"),),
        ),
        Story(
            "{name} has {a} {things}. Then {other} takes {b} of the {things}. How many does {name} have now?",
            (("{name} has", "a-b"),),
        ),
        Story(
            "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have than {other}?",
            (("The difference is", "a-b"),),
        ),
        Story(
            "{name} has {m} {holders} with {n} {things} in each. How many {things} does {name} have?",
            (("{name} has", "m*n"),),
        ),
        Story(
            "{name} {gains} {n} {things} every day for {m} days. How many {things} is that in all?",
            (("In all that is", "m*n"),),
        ),
        Story(
            "{name} has {a} {things}. {name} {gains} {b} more and then {loses} {c}. How many {things} are left?",
            (("{name} has", "a+b"), ("Then {name} has", "r-c")),
        ),
        Story(
            "{name} has {a} {things}, but {other} takes {b}. After that {name} {gains} {c} {things}. "
            "How many {things} does {name} have now?",
            (("{name} has", "a-b"), ("Then {name} has", "r+c")),
        ),
        Story(
            "{name} has {m} {holders} of {n} {things} each and {loses} {c} {things}. How many {things} are left?",
            (("{name} has", "m*n"), ("Then {name} has", "r-c")),
        ),
        Story(
            "There are {m} {holders} with {n} {things} in each, and {c} more {things} on the floor. "
            "How many {things} are there?",
            (("There are", "m*n"), ("In all there are", "r+c")),
        ),
    ),
    "test": (
        Story(
            "In the morning {name} has {a} {things}. By the evening {name} {gains} {b} more {things}. "
            "How many {things} does {name} have in the evening?",
            (("{name} has", "a+b"),),
        ),
        Story(
            "{name} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?",
            (("Together they have", "a+b"),),
        ),
        Story(
            "Of the {a} {things} that {name} has, {name} {loses} {b}. How many {things} does {name} have left?",
            (("{name} has", "a-b"),),
        ),
        Story(
            "There are {a} {things} in the shop. {name} takes {b} of them home. How many {things} are left there?",
            (("In the shop there are", "a-b"),),
        ),
        Story(
            "On the shelf are {m} {holders}. Each of them holds {n} {things}. How many {things} are on the shelf?",
            (("On the shelf are", "m*n"),),
        ),
        Story(
            "At first {name} has {a} {things}. On Monday {name} {gains} {b} more, and on Friday {name} {loses} {c}. "
            "How many {things} does {name} have at the end?",
            (("{name} has", "a+b"), ("Then {name} has", "r-c")),
        ),
        Story(
            "{name} owns {m} {holders}, and in each are {n} {things}. {other} takes {c} of the {things}. "
            "How many {things} does {name} still have?",
            (("{name} has", "m*n"), ("Then {name} has", "r-c")),
        ),
    ),
}


def _sum_rows(split: str, draw: random.Random) -> Iterator[Row]:
    """Word problems without end; the caller drops those it has."""
    side = "test" if split == "test" else "train"
    while True:
        story = draw.choice(STORIES[side])
        name, other = draw.sample(PEOPLE[side], 2)
        words = {"name": name, "other": other, "things": draw.choice(THINGS), "holders": draw.choice(HOLDERS)}
        words |= {"gains": draw.choice(GAINS), "loses": draw.choice(LOSSES)}
        values = {"a": draw.randint(5, 20), "m": draw.randint(2, 9), "n": draw.randint(2, 9)}
        lines = []
        for lead, operation in story.steps:
            left, sign, right = tuple(operation)
            if right not in values:  # at least 2 are left of what is there
                values[right] = draw.randint(2, values[left] - 2 if sign == "-" else 20)
            x, y = values[left], values[right]
            values["r"] = OPERATIONS[sign](x, y)
            equation = f"{x} {sign} {y} = <<{x}{sign}{y}={values['r']}>>{values['r']}"
            lines.append(f"{lead.format(**words)} {equation} {words['things']}.")
        answer = "\n".join([*lines, f"#### {values['r']}"])
        yield {"question": story.question.format(**words, **values), "answer": answer}


# ---------------------------------------------------------------- reviews


class Subject(NamedTuple):
    """What a review is about. Aspects carry their verb; the words of praise and blame fit any aspect of the subject."""

    noun: str
    aspects: tuple[str, ...]
    praise: tuple[str, ...]
    blame: tuple[str, ...]


PRAISE = _words("wonderful, excellent, lovely, superb, delightful, splendid, brilliant, great, charming, perfect")
BLAME = _words("terrible, awful, dreadful, poor, horrible, dismal, disappointing, bad, miserable, hopeless")

SUBJECTS = (
    Subject(
        "film",
        ("the acting was", "the story was", "the music was", "the ending was", "the camera work was", "the jokes were"),
        ("gripping", "moving", "clever", "fresh"),
        ("dull", "boring", "clumsy", "stale"),
    ),
    Subject(
        "book",
        ("the plot was", "the writing was", "the first half was", "the dialogue was", "the last chapters were"),
        ("gripping", "moving", "clever", "elegant"),
        ("dull", "boring", "clumsy", "muddled"),
    ),
    Subject(
        "cafe",
        ("the coffee was", "the service was", "the soup was", "the cakes were", "the waiter was", "the bread was"),
        ("fresh", "generous", "friendly", "pleasant"),
        ("stale", "unpleasant", "careless", "tasteless"),
    ),
    Subject(
        "gadget",
        ("the screen was", "the sound was", "the battery was", "the buttons were", "the manual was", "the case was"),
        ("clever", "solid", "reliable", "elegant"),
        ("flimsy", "clumsy", "useless", "unreliable"),
    ),
)

TITLES = {
    "train": _words(
        "Silver Harbour, Night Train, Long Winter, Blue Garden, Paper Moon, Iron Bridge, Quiet River, Broken Bell, "
        "Green Door, Summer Island, Hidden Valley, Seven Lamps, Golden Key, Stone Tower, Lost Letter, White Horse"
    ),
    "test": _words(
        "Red Lantern, Empty Station, Glass Mountain, Autumn Road, Sleeping Fox, North Wind, Copper Coast, Old Mill"
    ),
}

# Sentences by side: how a review opens, what it says of single aspects, and the verdict that decides its label.
# {aspect} and {second} are of the verdict's sign, {contrary} is of the opposite one.
OPENINGS = {
    "train": (
        "{name} told me about the {title}.",
        "Last week I tried the {noun} called {title}.",
        "We had heard a lot about the {title}.",
        "This is my first {noun} of the year, the {title}.",
        "My sister {name} and I spent a whole evening on the {title}.",
        "I came to the {title} by chance.",
        "So this is the {noun} that {name} talks about.",
    ),
    "test": (
        "On Sunday {name} and I decided to give the {title} a chance.",
        "The {title} is a {noun} that everybody in our street knows.",
        "After a long day {name} wanted a new {noun}, so we chose the {title}.",
        "A word about the {title}, a {noun} from our town.",
    ),
}
BODIES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "plain": (
            "{Aspect}, and {second}.",
            "For one thing, {aspect}. I also thought that {second}.",
            "I must say that {aspect}, and {second}.",
        ),
        "mixed": (
            "Although {contrary}, {aspect}, and {second}.",
            "It is true that {contrary}, but {aspect}.",
            "At first I feared the worst because {contrary}, yet I soon noticed that {aspect}.",
            "{Contrary}, but {aspect}, and {second}.",
        ),
        "against": (
            "{Contrary}, that much is true.",
            "Some people will tell you that {contrary}, and they are right.",
            "Yes, {contrary}.",
            "I know that {contrary}, and {contrary_second}.",
            "Granted, {contrary}, and {contrary_second}.",
            "You could complain that {contrary}.",
            "To be fair, {contrary}.",
            "Critics say that {contrary}, and also that {contrary_second}.",
        ),
    },
    "test": {
        "plain": ("To begin with, {aspect}. Besides, {second}.", "We both agreed that {aspect} and that {second}."),
        "mixed": (
            "Even though {contrary}, we could see that {aspect} and that {second}.",
            "{Contrary}. On the other hand, {aspect}, and {second}.",
        ),
        "against": (
            "Nobody will deny that {contrary}, and perhaps {contrary_second}.",
            "One has to admit that {contrary}.",
        ),
    },
}
VERDICTS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "plain": (
            "All in all it was a {word} {noun}.",
            "In the end I found it {word}.",
            "My verdict is simple: {word}.",
            "Overall it is a {word} {noun}, and I will tell everyone so.",
            "Still, the whole thing was {word} from beginning to end.",
            "This {noun} is {word}.",
            "I call it {word}.",
            "We said it was {word}.",
            "Seen as a {noun}, it is {word}.",
        ),
        "negated": (
            "All in all it was not a {opposite} {noun}.",
            "In the end I did not find it {opposite} at all.",
            "Whatever they say, it is never {opposite}.",
            "Overall it was far from {opposite}.",
            "This {noun} is not {opposite}.",
            "I cannot call it {opposite}.",
            "Nobody said it was {opposite}.",
            "Seen as a {noun}, it is not {opposite}.",
        ),
    },
    "test": {
        "plain": (
            "Taken as a whole, this {noun} is {word}.",
            "When all is said, I call that a {word} {noun}.",
            "We went home and agreed that it was {word}.",
        ),
        "negated": (
            "Taken as a whole, this {noun} is not {opposite}.",
            "When all is said, nobody could call it {opposite}.",
        ),
    },
}
CLOSINGS = {
    "train": ("That is all I have to say.", "It took us about two hours.", "{name} thinks the same.", "", ""),
    "test": ("I am writing this on the same evening.", "So says {name} as well.", ""),
}
# How often each kind is drawn. The hard rows go against the grain (a verdict opposed to all that was said before, a
# negated verdict): nearly all mistakes of a tuned pocket model are among these. Training has more of them.
BODY_KINDS = {
    "train": ("plain",) * 3 + ("mixed",) * 4 + ("against",) * 3,
    "test": ("plain",) * 3 + ("mixed",) * 4 + ("against",),
}
VERDICT_KINDS = {"train": ("plain",) * 7 + ("negated",), "test": ("plain",) * 11 + ("negated",)}
FEWEST_WORDS, MOST_WORDS = 25, 50


def _review_rows(split: str, draw: random.Random) -> Iterator[Row]:
    """Reviews without end, positive and negative by turns; the caller drops those it has."""
    side = "test" if split == "test" else "train"
    label = "positive"
    while True:
        subject = draw.choice(SUBJECTS)
        words = {"positive": [*PRAISE, *subject.praise], "negative": [*BLAME, *subject.blame]}
        same = draw.sample(words[label], 3)
        contrary = draw.sample(words["negative" if label == "positive" else "positive"], 3)
        aspects = draw.sample(subject.aspects, 4)
        clauses = {
            "aspect": f"{aspects[0]} {same[0]}",
            "second": f"{aspects[1]} {same[1]}",
            "contrary": f"{aspects[2]} {contrary[0]}",
            "contrary_second": f"{aspects[3]} {contrary[1]}",
        }
        clauses |= {name.capitalize(): clause.capitalize() for name, clause in clauses.items()}
        slots = {"noun": subject.noun, "word": same[2], "opposite": contrary[2], **clauses}
        slots |= {"name": draw.choice(PEOPLE[side]), "title": draw.choice(TITLES[side])}
        sentences = (
            draw.choice(OPENINGS[side]),
            draw.choice(BODIES[side][draw.choice(BODY_KINDS[side])]),
            draw.choice(VERDICTS[side][draw.choice(VERDICT_KINDS[side])]),
            draw.choice(CLOSINGS[side]),
        )
        text = " ".join(sentence.format(**slots) for sentence in sentences if sentence)
        text = text.replace(" a awful", " an awful").replace(" a excellent", " an excellent")
        text = text.replace(" a elegant", " an elegant").replace(" a un", " an un")
        if FEWEST_WORDS <= len(text.split()) <= MOST_WORDS:
            yield {"text": text, "label": label}
            label = "negative" if label == "positive" else "positive"


# ---------------------------------------------------------------- the way in

MAKERS = {"sums": _sum_rows, "reviews": _review_rows}


def rows(name: str, split: str) -> list[Row]:
    """The rows of a built-in data set: `question` and `answer` of sums, `text` and `label` of reviews.

    No row occurs twice, neither within a split nor in two splits; labels are balanced.

    Raises:
        DataError: there is no such data set or split.
    """
    if split not in ROWS_BY_SPLIT.get(name, ()):
        known = "; ".join(f"{known} with {', '.join(splits)}" for known, splits in ROWS_BY_SPLIT.items())
        raise DataError(
            given=f"the built-in data set {name!r}, split {split!r}",
            allowed=known,
            do="choose one of these, or give a file, a folder or a hub id as data.name",
        )
    # train and validation come from one stream, one after the other, so that they cannot share a row.
    stream = MAKERS[name](split, random.Random(f"{name} {'test' if split == 'test' else 'train'}"))
    skipped = ROWS_BY_SPLIT[name]["train"] if split == "validation" else 0
    wanted = skipped + ROWS_BY_SPLIT[name][split]
    chosen: dict[str, Row] = {}
    for row in stream:
        chosen.setdefault(next(iter(row.values())), row)
        if len(chosen) == wanted:
            break
    return list(chosen.values())[skipped:]
