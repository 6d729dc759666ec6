"""The small language of the demo model: people who are introduced, small talk, and who they were.

    <|turn>user
    this is anna baker. this is tom fisher.<turn|>
    <|turn>model
    ok.<turn|>

and, in another conversation: `who is anna?`, `that is anna baker.` Who has which surname is drawn anew for each
episode, so nothing but what was said can tell. Every word below is one token, and so is every mark.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

NAMES = (
    "anna ben carl dora emma fred gina hugo ivan jane kate leo mary nina otto paul rosa sam tom uma vera walt zoe eric"
).split()
SURNAMES = (
    "baker cook fisher hunter mason miller potter smith taylor weaver carter porter"
    " young stone wood field brook king knight page bell fox wolf swan"
).split()

INTRODUCTIONS = ("this is", "here is", "i met", "remember")
ACKNOWLEDGED = "ok."
CHANCE = 1 / len(SURNAMES)

_SENTENCES = (
    "the {adjective} {animal} {verb} {place}.",
    "a {animal} {verb} {place}.",
    "{time} it was {weather} {place}.",
    "we {did} the {adjective} {thing} {time}.",
    "they {did} a {thing} and a {thing}.",
    "it is {weather} {time}.",
    "the {thing} is {adjective} and the {thing} is {adjective}.",
)
_WORDS = {
    "adjective": "old small big red green quiet happy heavy",
    "animal": "dog cat horse bird goat hen",
    "verb": "sleeps runs waits sings eats stands",
    "place": "by the river|in the garden|near the house|on the hill|under the tree|behind the barn",
    "weather": "cold warm wet dark bright windy",
    "time": "today yesterday now again later",
    "did": "found sold made saw lost took",
    "thing": "boat table lamp book cup chair hat door",
}
_CHOICES = {kind: words.split("|") if "|" in words else words.split() for kind, words in _WORDS.items()}
_TURN = 12  # tokens around a turn of the user's and in the answer to it: <|turn> user \n ... <turn|> \n, <|turn> ...

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Episode:
    """Who was introduced, the conversation in which that happened, and how many tokens follow the last introduction."""

    facts: dict[str, str]
    conversation: Messages
    gap: int


def words() -> list[str]:
    """Every word and mark of the language, each once, in a fixed order."""
    texts = [*NAMES, *SURNAMES, *INTRODUCTIONS, ACKNOWLEDGED, question("x"), answer("x", ""), *_WORDS.values()]
    texts += [re.sub(r"{\w+}", "", sentence) for sentence in _SENTENCES]
    found = dict.fromkeys(re.findall(r"\w+|[.?]", " ".join(texts).replace("|", " ")))
    return ["user", "model", *(word for word in found if word != "x")]


def introduction(rng: random.Random, name: str, surname: str) -> str:
    return f"{rng.choice(INTRODUCTIONS)} {name} {surname}."


def question(name: str) -> str:
    return f"who is {name}?"


def answer(name: str, surname: str) -> str:
    return f"that is {name} {surname}."


def surname_in(text: str, name: str) -> str | None:
    """The surname that an answer gives to the person, None if it gives none."""
    found = re.search(rf"\b{name} (\w+)", text)
    return found.group(1) if found else None


def n_tokens(text: str) -> int:
    return len(re.findall(r"\w+|[.?]", text))


def small_talk(rng: random.Random, tokens: int) -> str:
    """Sentences of at least so many tokens, and of as few more as it happens."""
    sentences: list[str] = []
    while sum(map(n_tokens, sentences)) < tokens:
        sentence = re.sub(r"{(\w+)}", lambda kind: rng.choice(_CHOICES[kind.group(1)]), rng.choice(_SENTENCES))
        sentences.append(sentence)
    return " ".join(sentences)


def draw_facts(rng: random.Random, n: int) -> dict[str, str]:
    """People and their surnames: no name twice; a surname may well be."""
    return {name: rng.choice(SURNAMES) for name in rng.sample(NAMES, n)}


def turns(texts: Sequence[str], answers: Sequence[str]) -> Messages:
    roles = [
        ({"role": "user", "content": text}, {"role": "assistant", "content": said})
        for text, said in zip(texts, answers, strict=True)
    ]
    return [message for turn in roles for message in turn]


def episode(rng: random.Random, n_facts: int, gap: int, *, aside: float = 0.0) -> Episode:
    """A conversation that states `n_facts` and goes on for at least `gap` tokens of small talk.

    `aside` is the share of introductions that are followed by a sentence about something else.
    """
    facts = draw_facts(rng, n_facts)
    texts: list[str] = []
    people = list(facts.items())
    while people:
        n = rng.randint(1, 4)
        said = []
        for name, surname in people[:n]:
            said.append(introduction(rng, name, surname))
            if rng.random() < aside:
                said.append(small_talk(rng, 1))
        texts.append(" ".join(said))
        people = people[n:]
    after = _TURN - 3  # of the turn of the last introduction, what follows it
    while after < gap:
        talk = small_talk(rng, min(gap - after - _TURN, rng.randint(8, 40)))
        texts.append(talk or small_talk(rng, 1))
        after += n_tokens(texts[-1]) + _TURN
    return Episode(facts, turns(texts, [ACKNOWLEDGED] * len(texts)), after)
