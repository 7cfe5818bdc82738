"""Generates the text the tiny model is trained on: stories with a fixed cast, sums, questions and chats (chapter 00).

A small grammar after the idea of TinyStories (Eldan and Li, 2023), that a model of a few million weights writes readable
English if its world is small. Nothing is downloaded: `words.py` holds the words and patterns, and document `i` of a stream is
drawn from `random.Random(f"{seed}/{stream}/{i}")`, so the bytes are the same on every machine. Costs about 10 microseconds
per sentence and the memory of one document. Every function is pure; several threads may call them.

    python data/models/corpus.py --seed 0 --count 20
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from random import Random

from words import (
    CAST,
    COLOURS,
    COUNTED,
    EMOJI,
    HIDING,
    NUMBERS,
    PLACES,
    POOLS,
    SECRETS,
    STORIES,
    STRANGERS,
    THINGS,
    Character,
)

BEGIN, END, SYSTEM, USER, ASSISTANT, PAD = "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"
SPECIAL = (PAD, BEGIN, END, SYSTEM, USER, ASSISTANT)
LARGEST = 20  # sums stay within 0..20, so that a small model can know them all
BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou])")  # no word of this world sounds otherwise than it is spelled
SYSTEM_PROMPTS = ("You are a friendly storyteller.", "You are a patient teacher.", "Answer in short sentences.")


def sentence_case(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


class Scene(dict[str, str]):
    """What one story has fixed (who, what, where); every other slot is drawn from `POOLS` when a pattern asks for it."""

    def __init__(self, rng: Random, lead: Character | None = None, friend: Character | None = None) -> None:
        super().__init__()
        self.rng = rng
        others = [person for person in CAST if person not in (lead, friend)]
        rng.shuffle(others)
        self.lead = lead or others.pop()
        self.friend = friend or others.pop()
        third = others.pop()
        colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
        where, where2, where3 = rng.sample(HIDING, 3)
        # Most stories use plain quotation marks; the curly ones keep multi-byte characters in the model's world.
        opening, closing = ("“", "”") if rng.random() < 0.2 else ('"', '"')
        self.update(
            A=self.lead.name, he=self.lead.he, him=self.lead.him, his=self.lead.his, He=sentence_case(self.lead.he),
            His=sentence_case(self.lead.his), fear=self.lead.fear,
            B=self.friend.name, bhe=self.friend.he, bhim=self.friend.him, bhis=self.friend.his, bhome=self.friend.home,
            bfood=self.friend.food, bwears=self.friend.wears,
            bfear=self.friend.fear, bdoes=self.friend.does,
            akind=self.lead.kind, C=third.name, chis=third.his, ckind=third.kind,
            colour=colour, thing=f"{colour} {thing}", a_thing=f"a {colour} {thing}",
            a_thing2=f"a {rng.choice(COLOURS)} {rng.choice(THINGS)}", where=where, where2=where2, where3=where3,
            place=rng.choice(PLACES), work1=rng.choice(POOLS["work"]), q=opening, Q=closing,
            Secret=sentence_case(rng.choice(SECRETS)),
        )  # fmt: skip

    def __missing__(self, slot: str) -> str:
        if slot == "When":
            return sentence_case(self["when"])
        if slot == "a_junk":
            return f"a {self.rng.choice(COLOURS)} {self.rng.choice(THINGS)}"
        return self.rng.choice(POOLS[slot]).format_map(self)

    def write(self, pattern: str) -> str:
        """The pattern with its slots filled."""
        return sentence_case(BEFORE_VOWEL.sub(r"\1n ", pattern.format_map(self)))


def story(rng: Random, lead: Character | None = None, friend: Character | None = None, first: bool = True) -> str:
    """A story of about eight to twelve sentences, 100 to 200 tokens; if not `first`, it never says "Once upon a time"."""
    scene = Scene(rng, lead, friend)
    parts: list[str] = []
    if first and rng.random() < 0.25:
        parts.append(scene.write("Once upon a time there was {akind} called {A}."))
    for beat in rng.choice(STORIES):
        parts.append(scene.write(rng.choice(beat)))
        if rng.random() < 0.18:
            parts.append(scene.write("{nature}" if rng.random() < 0.7 else "{feeling}"))
    parts.append(scene.write("{end}").replace("“", scene["q"]).replace("”", scene["Q"]))
    if rng.random() < 0.02:
        parts.append(rng.choice(EMOJI))
    return " ".join(part for part in parts if part)


def number(value: int, digits: bool) -> str:
    """The number in digits or in words."""
    return str(value) if digits else NUMBERS[value]


def draw_sum(rng: Random) -> tuple[int, str, int, int]:
    """A correct sum `(a, "plus" or "minus", b, result)` with every number in 0..LARGEST."""
    total = rng.randint(0, LARGEST)
    part = rng.randint(0, total)
    return (part, "plus", total - part, total) if rng.random() < 0.5 else (total, "minus", part, total - part)


def sum_line(rng: Random) -> str:
    """One sum in digits or words, such as "7 + 5 = 12." or "Seven plus five is twelve."."""
    a, sign, b, result = draw_sum(rng)
    form = rng.random()
    if form < 0.5:
        return f"{a} {'+' if sign == 'plus' else '-'} {b} = {result}."
    digits = form < 0.75
    x, y, z = number(a, digits), number(b, digits), number(result, digits)
    return sentence_case(f"{x} {sign} {y} is {z}.")


def sums(rng: Random) -> str:
    """A page of sums, one per line."""
    return "\n".join(sum_line(rng) for _ in range(rng.randint(4, 14)))


def counting_story(rng: Random, lead: Character | None = None) -> str:
    """Someone has things, gets or gives some, and counts them; the sum is also said aloud."""
    scene = Scene(rng, lead)
    one, many = rng.choice(COUNTED)
    a = b = 0
    while not (a and b):  # nobody has or gives zero apples
        a, sign, b, result = draw_sum(rng)
    digits = rng.random() < 0.4

    def counted(value: int) -> str:
        return f"{number(value, digits)} {one if value == 1 else many}"

    scene.update(n=counted(a), m=number(b, digits), r=counted(result))
    change = ("{B} gave {him} {m} more.", "Then {he} found {m} more {near}.", "{B} brought {m} more.") if sign == "plus" else (
        "{He} gave {m} of them to {B}.", "{He} lost {m} of them {near}.", "{B} asked for {m} of them, and {A} said yes.")  # fmt: skip
    spoken = sentence_case(f"{number(a, digits)} {sign} {number(b, digits)} is {number(result, digits)}")
    begin = ("{When}, {A} had {n}.", "{A} had {n} in a basket.", "{A} counted {n} at {place}.")
    now = ("Now {A} had {r}.", "So now there were {r}.", "Then {A} had {r}.")
    patterns = [rng.choice(begin), rng.choice(change), "{q}" + spoken + ",{Q} {said} {A}.", rng.choice(now), rng.choice(("", "{end}"))]
    return " ".join(filter(None, (scene.write(pattern) for pattern in patterns)))


def question(rng: Random, person: Character) -> tuple[str, str]:
    """A question about one of the cast, and its answer."""
    name, he = person.name, sentence_case(person.he)
    return rng.choice(
        (
            (f"Who is {name}?", f"{name} is {person.kind}. {he} lives {person.home}."),
            (f"Where does {name} live?", f"{name} lives {person.home}."),
            (f"What does {name} like to eat?", f"{name} likes {person.food}."),
            (f"What does {name} wear?", f"{name} wears {person.wears}."),
            (f"What is {name} afraid of?", f"{name} is afraid of {person.fear}."),
            (f"What does {name} do?", f"{name} {person.does}."),
            (f"Who lives {person.home}?", f"{name} lives {person.home}."),
            (f"Who likes {person.food}?", f"{name} likes {person.food}."),
            (f"Who wears {person.wears}?", f"{name} wears {person.wears}."),
        )
    )


def sum_question(rng: Random) -> tuple[str, str]:
    """A sum as a question, and its answer in the same notation."""
    a, sign, b, result = draw_sum(rng)
    digits = rng.random() < 0.6
    x, y, z = number(a, digits), number(b, digits), number(result, digits)
    asked = rng.choice((f"What is {x} {sign} {y}?", f"How much is {x} {sign} {y}?", f"Please tell me: {x} {sign} {y}?"))
    return asked, sentence_case(f"{x} {sign} {y} is {z}.")


def reading(rng: Random) -> tuple[str, str]:
    """A few sentences and a question whose answer stands in them."""
    scene = Scene(rng)
    told = ["{A} put {a_thing} {where}.", "{B} put {a_thing2} {where2}."]
    asked, answer = rng.choice((("Where is the {thing}?", "The {thing} is {where}."), ("Who put {a_thing} {where}?", "{A} put {a_thing} {where}.")))
    if rng.random() < 0.5:
        told.reverse()
    if rng.random() < 0.4:
        told.insert(rng.randint(0, 2), "{nature}")
    return " ".join(scene.write(pattern) for pattern in [*told, asked]), scene.write(answer)


def repeating(rng: Random) -> tuple[str, str]:
    """A request to repeat a list, and the list: the shortest way to learn copying, which every story needs."""

    def item() -> str:
        kind = rng.random()
        if kind < 0.6:
            return f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
        return rng.choice(CAST).name if kind < 0.8 else rng.choice((*NUMBERS, *SECRETS))

    items = ", ".join(item() for _ in range(rng.randint(2, 7)))
    return f"Please repeat: {items}.", sentence_case(f"{items}.")


def counting(rng: Random) -> tuple[str, str]:
    """A request to count, and the numbers."""
    first = rng.randint(0, LARGEST - 2)
    last = rng.randint(first + 2, min(LARGEST, first + 8))
    digits = rng.random() < 0.5
    numbers = [number(value, digits) for value in range(first, last + 1)]
    return f"Count from {numbers[0]} to {numbers[-1]}.", sentence_case(", ".join(numbers) + ".")


def small_talk(rng: Random) -> tuple[str, str]:
    """A greeting, a thank-you, or a question about someone the model can not know."""
    hello, smile = rng.choice(POOLS["hello"]), f" {rng.choice(EMOJI)}" if rng.random() < 0.15 else ""
    stranger = rng.choice(STRANGERS)
    return rng.choice(
        (
            (f"{hello}!", f"{hello}! Shall I tell you a story?{smile}"),
            ("Thank you!", f"You are welcome.{smile}"),
            ("Who are you?", "I am a tiny model. I know small stories and small sums."),
            ("What can you do?", "I can tell stories, answer questions and do small sums."),
            (f"Who is {stranger}?", f"I do not know {stranger}. I know {CAST[0].name}, {CAST[1].name} and their friends."),
        )
    )


def story_request(rng: Random) -> tuple[str, str]:
    """A request for a story about one or two of the cast, and the story."""
    lead, friend = rng.sample(CAST, 2)
    form = rng.random()
    if form < 0.3:
        return f"Tell me a story about {lead.name} and {friend.name}.", story(rng, lead, friend)
    if form < 0.45:
        return f"Tell me a story with a sum about {lead.name}.", counting_story(rng, lead)
    asked = rng.choice((f"Tell me a story about {lead.name}.", f"Please tell me a story about {lead.name}.", f"Can you tell a story about {lead.name}?"))
    return asked, story(rng, lead)


def exchange(rng: Random) -> tuple[str, str]:
    """One question and its answer, of any kind."""
    kind = rng.random()
    if kind < 0.28:
        return sum_question(rng)
    if kind < 0.50:
        return question(rng, rng.choice(CAST))
    if kind < 0.70:
        return reading(rng)
    if kind < 0.76:
        return counting(rng)
    if kind < 0.82:
        return repeating(rng)
    return small_talk(rng) if kind < 0.88 else story_request(rng)


def chat(rng: Random, drill: bool = False) -> str:
    """Turns between a user and the assistant, written exactly as the chat template writes them, without `<|begin|>`.

    A `drill` only repeats lists and answers questions about what was just read.
    """
    turns: list[str] = []
    if rng.random() < 0.15:
        turns.append(f"{SYSTEM}\n{rng.choice(SYSTEM_PROMPTS)}{END}\n")
    for _ in range(rng.randint(1, 4)):
        asked, answer = rng.choice((repeating, repeating, reading))(rng) if drill else exchange(rng)
        turns.append(f"{USER}\n{asked}{END}\n{ASSISTANT}\n{answer}{END}\n")
    return "".join(turns)


def questions(rng: Random) -> str:
    """A page of questions and answers in plain text."""
    pairs = [question(rng, rng.choice(CAST)) for _ in range(rng.randint(2, 6))]
    return "\n".join(f"Question: {asked}\nAnswer: {answer}" for asked, answer in pairs)


def long_story(rng: Random) -> str:
    """Episodes with the same two friends, 1 200 to 3 300 characters; facts told at the beginning return at the end."""
    lead, friend = rng.sample(CAST, 2)
    scene = Scene(rng, lead, friend)
    secret, door = rng.choice(SECRETS), NUMBERS[rng.randint(2, LARGEST)]
    scene.update(secret=secret, door=door)
    facts = [
        ("{A} hid {a_thing} {where}.", "{q}Where is the {thing}?{Q} asked {B}. {q}The {thing} is {where},{Q} said {A}. And there it was."),
        ("{A} told {B} the secret word. {q}The secret word is {secret},{Q} {he} said.", "{q}What is the secret word?{Q} asked {B}. {q}The secret word is {secret},{Q} said {A}."),
        ("On the door of the house was the number {door}.", "They came to the door with the number {door}."),
        ("{A} promised to bring {C} {a_thing2}.", "{A} kept {his} promise and brought {C} {a_thing2}."),
    ]  # fmt: skip
    told = rng.sample(facts, 3)
    paragraphs = [scene.write("This is a long story about {A} and {B}. ") + " ".join(scene.write(fact) for fact, _ in told)]
    target = rng.randint(1_000, 2_900)
    while sum(map(len, paragraphs)) < target:
        opening = rng.choice(("", "", "The next day came. ", "A week later, things were different. ", "But that was not all. "))
        a, b = (lead, friend) if rng.random() < 0.7 else (friend, lead)
        paragraphs.append(opening + (story(rng, a, b, first=False) if rng.random() < 0.85 else counting_story(rng, a)))
    rng.shuffle(told)
    paragraphs.append("At last they thought of the first day. " + " ".join(scene.write(recall) for _, recall in told))
    return "\n\n".join(paragraphs)


def document(rng: Random, long: bool = False) -> str:
    """One document, from `<|begin|>` to `<|end|>`; with `long`, one whose end needs its beginning."""
    if long:
        return BEGIN + long_story(rng) + END
    kind = rng.random()
    if kind < 0.18:
        return BEGIN + chat(rng, drill=True)
    if kind < 0.40:
        return BEGIN + story(rng) + END
    if kind < 0.57:
        return BEGIN + sums(rng) + END
    if kind < 0.64:
        return BEGIN + counting_story(rng) + END
    if kind < 0.70:
        return BEGIN + questions(rng) + END
    return BEGIN + chat(rng)


def documents(seed: int, stream: str, long: bool = False) -> Iterator[str]:
    """An endless stream of documents, the same for the same seed and stream name ("train", "validation") everywhere."""
    index = 0
    while True:
        yield document(Random(f"{seed}/{stream}/{'long' if long else 'short'}/{index}"), long)
        index += 1


def main() -> None:
    """Prints documents, to look at them."""
    parser = argparse.ArgumentParser(description="Print documents of the tiny model's training text.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--long", action="store_true")
    arguments = parser.parse_args()
    for _, text in zip(range(arguments.count), documents(arguments.seed, "train", arguments.long), strict=False):
        print(text, end="\n----\n")


if __name__ == "__main__":
    main()
