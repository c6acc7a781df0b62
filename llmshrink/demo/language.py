"""The demo language: short stories with facts, from a random process whose entropy is known exactly.

A story goes from person to person, sentence by sentence, in a world that is the same in every story (`world`):

    Once there was Mira the baker. Mira walked to the forest early and found the red kite. Mira visited Tom in the mill
    gladly. Tom gave Ada the blue lamp soon. Where did Ada live? In the tower. ... The end.

Some words are free choices (who, where, what happens next), with tables of unequal probabilities that depend on the
words shortly before; the others are facts of the world (where Ada lives, what Mira finds in the forest), which a model
must keep in its weights to predict. Choices are made in the order of the text and the options of each begin with
different words: the text is uniquely decodable, hence its probability is the product of the probabilities of the
choices made, and

    surprisal of a word = -ln p of the choice it opens, 0 for a word that follows from what was said      (nats)

is a lower bound, in the mean, for any model's loss. `entropy_rate` gives the expectation per word by Monte Carlo, each
choice counted by its entropy instead of its surprisal, which leaves little variance.

The process is told once (`_tell`), by a teller that either draws the choices or follows a text that was written before.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmshrink.demo.lexicon import NAMES, OPENINGS, TRADES
from llmshrink.demo.world import CIRCLE_WEIGHTS, HAUNT_WEIGHTS, MANNER_WEIGHTS, MANNERS_OF, MOOD_WEIGHTS, PEOPLE, Person

OPTIONS = 4
END_WEIGHT = 6
QUESTION_WEIGHTS = (3, 3, 3)
PREDICATE_WEIGHTS = (5, 4, 4, 3, 2, 2)
WORD = re.compile(r" ?[A-Za-z]+|[.,?\n]")
"""One word of the language, one token of its tokenizer: with the space before it, or a mark."""


@dataclass(frozen=True)
class Story:
    """words: the text in pieces, `"".join(words)` is the text. surprisal: nats for each word. entropy: the expectation
    of the surprisal's sum over the choices met on this path, nats."""

    words: tuple[str, ...]
    surprisal: tuple[float, ...]
    entropy: float

    @property
    def text(self) -> str:
        return "".join(self.words)


@dataclass(frozen=True)
class Question:
    """A multiple-choice task: `options[answer]` is the one true continuation of `context + question`."""

    context: str
    question: str
    options: tuple[str, ...]
    answer: int


def stories(seed: int) -> Iterator[str]:
    """Endless stories, each closed by a newline; the same seed gives the same stories."""
    rng = random.Random(seed)
    while True:
        yield story(rng).text


def text(seed: int, characters: int) -> str:
    """Whole stories, one a line, of at least so many characters."""
    pieces: list[str] = []
    length = 0
    for piece in stories(seed):
        if length >= characters:
            break
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces)


def story(rng: random.Random) -> Story:
    """Draw one story."""
    writer = _Writer(rng)
    _tell(writer)
    return Story(tuple(writer.words), tuple(writer.surprisal), writer.entropy)


def follow(written: str) -> list[Story]:
    """Read stories back, choice by choice: the inverse of `text`, with the surprisal of every word.

    Raises ValueError where the text leaves the language or contradicts the world, with the words before that place.
    """
    reader = _Reader(written)
    found = []
    while reader.position < len(reader.source):
        reader.words, reader.surprisal, reader.entropy = [], [], 0.0
        _tell(reader)
        found.append(Story(tuple(reader.words), tuple(reader.surprisal), reader.entropy))
    return found


def beginning(rng: random.Random) -> str:
    """A story's first sentence, which says who it is about."""
    writer = _Writer(rng)
    _introduce(writer)
    return "".join(writer.words)


def words_until_false(told: str, continued: str) -> tuple[int, int]:
    """How many words of a story's continuation follow its facts and the language: (words before the first that doesn't,
    words in all). A continuation that stops anywhere is fine."""
    known, words = len(WORD.findall(told)), len(WORD.findall(continued))
    reader = _Reader(told + continued)
    with contextlib.suppress(ValueError):
        _tell(reader)
    return min(len(reader.words) - known, words), words


def entropy_rate(count: int = 4000, seed: int = 0) -> tuple[float, float]:
    """Expected entropy in nats per word over `count` stories, and its standard error (of a ratio of means)."""
    rng = random.Random(seed)
    drawn = [story(rng) for _ in range(count)]
    words = sum(len(one.words) for one in drawn)
    rate = sum(one.entropy for one in drawn) / words
    spread = math.sqrt(sum((one.entropy - rate * len(one.words)) ** 2 for one in drawn))
    return rate, spread / words


def facts(seed: int, count: int) -> list[Question]:
    """Questions about the world, each after the beginning of a story, with `OPTIONS` answers of the same kind."""
    rng = random.Random(seed)
    return [_question(rng) for _ in range(count)]


def _question(rng: random.Random) -> Question:
    writer = _Writer(rng)
    asked = PEOPLE[rng.choice(_introduce(writer).circle[1:])]
    question, right, answers = (
        (f" Where did {asked.name} live? In the", asked.home, [one.home for one in PEOPLE.values()]),
        (f" What did {asked.name} love? The", asked.treasure, [one.treasure for one in PEOPLE.values()]),
        (f" Who was the {asked.trade} in the {asked.home}?", asked.name, list(NAMES)),
    )[rng.randrange(3)]
    others = sorted(set(answers) - {right})
    options = [right, *rng.sample(others, OPTIONS - 1)]
    rng.shuffle(options)
    return Question("".join(writer.words), question, tuple(f" {option}" for option in options), options.index(right))


class _Teller(Protocol):
    def say(self, words: str) -> None: ...

    def choose(self, options: Sequence[str], weights: Sequence[int] | None = None) -> int: ...


@functools.cache
def _sum_and_entropy(weights: tuple[int, ...]) -> tuple[int, float]:
    total = sum(weights)
    return total, -sum(weight / total * math.log(weight / total) for weight in weights)


class _Ledger:
    """What was said, and what it cost: the bookkeeping that writer and reader share."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.surprisal: list[float] = []
        self.entropy = 0.0

    def enter(self, words: Sequence[str], surprisal: float) -> None:
        self.words += words
        self.surprisal += [surprisal] + [0.0] * (len(words) - 1)

    def weigh(self, chosen: int, number: int, weights: Sequence[int] | None) -> float:
        """-ln p of the choice; its entropy is added to the path's."""
        if weights is None:
            self.entropy += math.log(number)
            return math.log(number)
        total, entropy = _sum_and_entropy(tuple(weights))
        self.entropy += entropy
        return -math.log(weights[chosen] / total)


class _Writer(_Ledger):
    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def say(self, words: str) -> None:
        self.enter(WORD.findall(words), 0.0)

    def choose(self, options: Sequence[str], weights: Sequence[int] | None = None) -> int:
        if weights is None:
            chosen = self._rng.randrange(len(options))
        else:
            chosen = self._rng.choices(range(len(options)), weights)[0]
        self.enter(WORD.findall(options[chosen]), self.weigh(chosen, len(options), weights))
        return chosen


class _Reader(_Ledger):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.position = 0

    def say(self, words: str) -> None:
        for word in WORD.findall(words):
            self._take([word])
            self.enter([word], 0.0)

    def choose(self, options: Sequence[str], weights: Sequence[int] | None = None) -> int:
        split = [WORD.findall(option) for option in options]
        chosen = self._take([words[0] for words in split])
        self.enter(split[chosen][:1], self.weigh(chosen, len(options), weights))
        self.say("".join(split[chosen][1:]))
        return chosen

    def _take(self, words: Sequence[str]) -> int:
        """Step over the next word of the source, which must be one of these; returns which."""
        found = WORD.match(self.source, self.position)
        if found is None or found.group() not in words:
            raise ValueError(f"expected one of {list(words)} after {self.source[: self.position][-60:]!r}")
        self.position = found.end()
        return words.index(found.group())


def _tell(teller: _Teller) -> None:
    subject = _introduce(teller)
    others = (" The end.\n", " Where did", " What did", " Who was the")
    weights = (*CIRCLE_WEIGHTS, END_WEIGHT, *QUESTION_WEIGHTS)
    while True:
        circle = subject.circle
        chosen = teller.choose([*(f" {name}" for name in circle), *others], weights)
        if chosen < len(circle):
            subject = _predicate(teller, PEOPLE[circle[chosen]])
        elif chosen == len(circle):
            return
        else:
            subject = (_ask_where, _ask_what, _ask_who)[chosen - len(circle) - 1](teller, subject)


def _introduce(teller: _Teller) -> Person:
    teller.choose(OPENINGS)
    teller.say(" there was")
    person = PEOPLE[NAMES[teller.choose([f" {name}" for name in NAMES])]]
    teller.say(f" the {person.trade}.")
    return person


def _predicate(teller: _Teller, subject: Person) -> Person:
    """What the subject does. Like the questions, returns the person named last, whose circle comes next."""
    verbs = (" walked to the", " visited", " gave", " felt", " lived", " loved")
    last = subject
    match teller.choose(verbs, PREDICATE_WEIGHTS):
        case 0:
            place = _draw(teller, subject.haunts, HAUNT_WEIGHTS)
            _manner(teller, "walked")
            teller.say(f" and found the {subject.finds[place]}.")
        case 1:
            last = _other(teller, subject)
            teller.say(f" in the {last.home}")
            _manner(teller, "visited")
            teller.say(".")
        case 2:
            last = _other(teller, subject)
            teller.say(f" the {subject.gifts[subject.circle.index(last.name)]}")
            _manner(teller, "gave")
            teller.say(".")
        case 3:
            _draw(teller, subject.moods, MOOD_WEIGHTS)
            teller.say(f" and went home to the {subject.home}")
            _manner(teller, "went")
            teller.say(".")
        case 4:
            teller.say(f" in the {subject.home}.")
        case _:
            teller.say(f" the {subject.treasure}.")
    return last


def _draw(teller: _Teller, words: Sequence[str], weights: Sequence[int]) -> int:
    return teller.choose([f" {word}" for word in words], weights)


def _manner(teller: _Teller, verb: str) -> None:
    _draw(teller, MANNERS_OF[verb], MANNER_WEIGHTS)


def _other(teller: _Teller, subject: Person) -> Person:
    return PEOPLE[subject.circle[1 + _draw(teller, subject.circle[1:], CIRCLE_WEIGHTS[1:])]]


def _ask_where(teller: _Teller, subject: Person) -> Person:
    asked = _other(teller, subject)
    teller.say(f" live? In the {asked.home}.")
    return asked


def _ask_what(teller: _Teller, subject: Person) -> Person:
    asked = _other(teller, subject)
    teller.say(f" love? The {asked.treasure}.")
    return asked


def _ask_who(teller: _Teller, _: Person) -> Person:
    trade = TRADES[teller.choose([f" {trade}" for trade in TRADES])]
    teller.say(" in the")
    able = [person for person in PEOPLE.values() if person.trade == trade]
    asked = able[teller.choose([f" {person.home}" for person in able])]
    teller.say(f"? {asked.name}.")
    return asked
