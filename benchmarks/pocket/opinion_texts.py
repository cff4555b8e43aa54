"""Opinions in prose for the pocket model's pretraining: the words of praise and blame, but no labels.

A text has one hidden sign. Single clauses may say the opposite; the verdict and what people do afterwards follow the
sign, so predicting the last sentences takes the sense of the whole. No text names its sign ("positive", "negative"),
and none of the sentences of the built-in `reviews` is used (`make_corpus.py` checks it).
"""

from __future__ import annotations

import random
from typing import NamedTuple

Sign = int  # 1 for praise, 0 for blame


def words(text: str) -> list[str]:
    return text.split(", ")


NAMES = words(
    "Mina, Olga, Ivan, Karl, Lena, Otto, Erik, Greta, Nils, Hanna, Felix, Julia, Marta, Anton, Bruno, Celia, Daniel, "
    "Elsa, Fanny, Gustav, Heidi, Igor, Jonas, Klara, Ludwig, Magda, Nadia, Olaf, Petra, Quentin, Rufus, Sofia, Theo, "
    "Ursula, Viola, Wanda, Xaver, Yara, Zora, Amos, Bella, Cyril, Dinah, Edgar, Flora, Gilbert, Harriet, Isaac, Joan, "
    "Kitty, Lionel, Mabel, Ned, Olive, Percy, Rachel, Silas, Tessa, Vera, Will, Agnes, Bert, Cora, Dick, Eva, Fay"
)
PLACES = words(
    "the river, the harbour, the market, the church, the station, the old bridge, the park, the mill, the school, "
    "the castle, the corner, the square, the hill, the lake"
)
QUALITIES = (
    words(
        "terrible, awful, dreadful, poor, horrible, dismal, disappointing, bad, miserable, hopeless, ugly, worthless, "
        "nasty, foul, wretched, shabby, tiresome, annoying"
    ),
    words(
        "wonderful, excellent, lovely, superb, delightful, splendid, brilliant, great, charming, perfect, beautiful, "
        "good, nice, admirable, fine, marvellous, pleasing, remarkable"
    ),
)


class Subject(NamedTuple):
    noun: str
    aspects: list[str]
    qualities: tuple[list[str], list[str]]


SUBJECTS = [
    Subject(noun, words(aspects), (words(blame), words(praise)))
    for noun, aspects, blame, praise in (
        (
            "film",
            "the acting was, the story was, the music was, the ending was, the camera work was, the jokes were, "
            "the colours were, the dances were",
            "dull, boring, clumsy, stale, silly, slow",
            "gripping, moving, clever, fresh, funny, thrilling",
        ),
        (
            "book",
            "the plot was, the writing was, the first half was, the dialogue was, the last chapters were, "
            "the pictures were, the tale was, the style was",
            "dull, boring, clumsy, muddled, tedious, shallow",
            "gripping, moving, clever, elegant, witty, deep",
        ),
        (
            "cafe",
            "the coffee was, the service was, the soup was, the cakes were, the waiter was, the bread was, "
            "the tables were, the tea was",
            "stale, unpleasant, careless, tasteless, dirty, rude",
            "fresh, generous, friendly, pleasant, clean, tasty",
        ),
        (
            "gadget",
            "the screen was, the sound was, the battery was, the buttons were, the manual was, the case was, "
            "the lamp was, the wires were",
            "flimsy, clumsy, useless, unreliable, broken, weak",
            "clever, solid, reliable, elegant, useful, strong",
        ),
        (
            "hotel",
            "the rooms were, the beds were, the breakfast was, the view was, the servants were, the stairs were",
            "dirty, unpleasant, careless, noisy, dull, stale",
            "clean, friendly, pleasant, quiet, elegant, fresh",
        ),
        (
            "concert",
            "the singers were, the songs were, the piano was, the hall was, the drums were, the choir was",
            "boring, clumsy, tedious, weak, careless, rude",
            "moving, thrilling, clever, strong, elegant, gripping",
        ),
        (
            "clock",
            "the hands were, the bell was, the wood was, the glass was, the price was, the key was",
            "flimsy, useless, unreliable, ugly, broken, weak",
            "solid, reliable, useful, elegant, strong, clever",
        ),
    )
]

OPENINGS = (
    "{name} went to the {noun} with {friend}.",
    "{name} had a {noun} for {friend}.",
    "Near {place} there was a {noun}.",
    "People near {place} speak of a {noun}.",
    "A {noun}: {name} paid for it, {friend} did not.",
    "This is about a {noun} that {name} knew.",
    "One evening {name} and {friend} spoke of the {noun}.",
    "It rained, and {name} had nothing but the {noun}.",
    "{name} asked {friend} for news of the {noun} by {place}.",
    "The {noun} was new, and {name} was curious.",
    "",
)
# {same} and {more} are clauses of the text's sign, {other} and {another} of the opposite one.
BODIES = (
    "{Same}. {More}.",
    "{Same}, {more}.",
    "{Same} and {more}, said {name}.",
    "{name} said that {same}. {friend} added that {more}.",
    "Though {other}, {same}.",
    "{Other}; all the same {same}.",
    "{Other}. In spite of that {same}, and {more}.",
    "Nobody minded that {other}, since {same}.",
    "{Same}, even if {other}.",
    "{Same}, while {other}.",
    "{name} complained that {other}, but {friend} held that {same}.",
    "{Other}, and {another}.",
    "{Other}. {Another}.",
    "True, {other}.",
    "Granted, {other}, and {another} too.",
)
VERDICTS = (
    "On the whole the {noun} was {word}.",
    "To sum up: a {word} {noun}.",
    "So the {noun} was {word}, said {name}.",
    "{name} called the {noun} {word}.",
    "But as a {noun} it was {word}.",
    "It was {word}, that {noun}.",
    "But what a {word} {noun}!",
    "In short, {word}.",
    "So it was not {opposite}.",
    "The {noun} was not {opposite}, it was {word}.",
    "{name} would not call the {noun} {opposite}.",
    "Who would think such a {noun} {opposite}? Not {name}.",
    "It was anything but {opposite}.",
    "It was hardly {opposite}, rather {word}.",
    "Was it {opposite}? No, it was {word}.",
    "Nothing about the {noun} was {opposite} in the end, it was {word}.",
)
AFTERWARDS = (
    (
        "They never went there again.",
        "{name} frowned all the way home.",
        "{name} wanted the money back.",
        "They left before it was over.",
        "{name} was sorry to have come.",
        "{friend} was angry for a week.",
        "Save your money and stay at home.",
        "It was a waste of time.",
        "{name} would not wish it on anyone.",
        "{friend} hated it.",
        "They regretted every minute.",
        "{name} sighed and said no more.",
        "Do not go near it.",
        "{name} warned all the neighbours.",
        "They were sad about it.",
    ),
    (
        "They went there again the next day.",
        "{name} smiled all the way home.",
        "{name} thought it worth every penny.",
        "They stayed to the last minute.",
        "{name} was glad to have come.",
        "{friend} was happy for a week.",
        "Take your friends and go soon.",
        "It was time well spent.",
        "{name} would wish it to everyone.",
        "{friend} loved it.",
        "They enjoyed every minute.",
        "{name} laughed and nodded.",
        "Go and see for yourself.",
        "{name} praised it to all the neighbours.",
        "They were pleased with it.",
    ),
)
REMARKS = (
    "{opposite} is the contrary of {word}.",
    "What is not {opposite} may well be {word}.",
    "A {word} {noun} is never {opposite}.",
    "Not {opposite} but {word}: such was the {noun}.",
    "{word}, {word2} and {word3} go together.",
)


class Opinion(NamedTuple):
    """A text, its last sentence, and what else the dialogues may ask about."""

    text: str
    ending: str
    noun: str
    clauses: list[str]


def with_articles(text: str) -> str:
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}").replace(f"A {vowel}", f"An {vowel}")
    return text.replace(" an useful", " a useful").replace(" an useless", " a useless")


def sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:]


def opinion(draw: random.Random) -> Opinion:
    """One text of three to six sentences about one subject."""
    subject = draw.choice(SUBJECTS)
    sign = draw.randrange(2)
    pools = [QUALITIES[side] + subject.qualities[side] * 2 for side in (0, 1)]
    aspects = draw.sample(subject.aspects, 4)
    name, friend = draw.sample(NAMES, 2)
    same = [f"{aspect} {draw.choice(pools[sign])}" for aspect in aspects[:2]]
    other = [f"{aspect} {draw.choice(pools[1 - sign])}" for aspect in aspects[2:]]
    clauses = {"same": same[0], "more": same[1], "other": other[0], "another": other[1]}
    slots = {"name": name, "friend": friend, "noun": subject.noun, "place": draw.choice(PLACES)}
    slots |= {**clauses, **{key.capitalize(): sentence_case(clause) for key, clause in clauses.items()}}
    slots |= {"word": draw.choice(pools[sign]), "opposite": draw.choice(pools[1 - sign])}
    afterwards = draw.sample(AFTERWARDS[sign], draw.choice((1, 1, 2)))
    body = draw.choice(BODIES)
    parts = [draw.choice(OPENINGS), body, draw.choice(VERDICTS), *afterwards]
    if draw.random() < 0.2:  # what people do comes first, and the verdict explains it
        parts = [parts[0], *afterwards, body, parts[2]]
    sentences = [with_articles(sentence_case(part.format(**slots))) for part in parts if part]
    used = [clause for key, clause in clauses.items() if "{" + key + "}" in body.lower()]
    return Opinion(" ".join(sentences), sentences[-1], subject.noun, used)


def remark(draw: random.Random) -> str:
    """One sentence on which words go together and which are contraries."""
    subject = draw.choice(SUBJECTS)
    sign = draw.randrange(2)
    pools = [QUALITIES[side] + subject.qualities[side] for side in (0, 1)]
    word, second, third = draw.sample(pools[sign], 3)
    slots = {
        "word": word,
        "word2": second,
        "word3": third,
        "noun": subject.noun,
        "opposite": draw.choice(pools[1 - sign]),
    }
    return with_articles(sentence_case(draw.choice(REMARKS).format(**slots)))


def opinion_document(draw: random.Random) -> str:
    """A text of the corpus: mostly one opinion, sometimes two, sometimes remarks."""
    kind = draw.random()
    if kind < 0.1:
        return " ".join(remark(draw) for _ in range(draw.randint(2, 5)))
    if kind < 0.2:
        return opinion(draw).text + "\n" + opinion(draw).text
    return opinion(draw).text
