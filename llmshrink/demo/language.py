"""The demo language: short stories with facts, from a random process whose entropy is known exactly.

A story introduces three people, each with a trade, a home and a coloured thing, then goes on sentence by sentence:

    Once there were Mira the baker, Tom the smith and Ada the judge. Mira lived in the mill and had the red kite. ...
    Mira gave Tom the red kite and got the blue lamp gladly. The smith went home to the tower early. Who had the kite?
    Tom. ... The end.

Some words are free choices (which name, which place, what happens next); the others follow from what was said before
(where Mira lives, who holds the kite now after the exchange), so that a model must recall and keep track to predict
them. Choices are made in the order of the text and the options of each begin with different words: the text is
uniquely decodable, hence its probability is the product of the probabilities of the choices made, and

    surprisal of a word = -ln p of the choice it opens, 0 for a word that follows from the context      (nats)

is a lower bound, word for word, for any model's mean loss. No choice has a number of options that depends on the state,
so a sentence's entropy depends on its kind only. `entropy_rate` gives the expectation per word by Monte Carlo, each
choice counted by its entropy instead of its surprisal, which leaves little variance.

The process is told once (`_tell`), by a teller that either draws the choices or follows a text that was written before.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmshrink.demo.lexicon import COLOURS, MANNERS, MOODS, NAMES, OPENINGS, PLACES, THINGS, TRADES

PEOPLE = 3
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

    Raises ValueError where the text leaves the language or contradicts its own facts, with the words before that place.
    """
    reader = _Reader(written)
    found = []
    while reader.position < len(reader.source):
        reader.words, reader.surprisal, reader.entropy = [], [], 0.0
        _tell(reader)
        found.append(Story(tuple(reader.words), tuple(reader.surprisal), reader.entropy))
    return found


def beginning(rng: random.Random) -> str:
    """The part of a story that introduces its people."""
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
    """Questions about stories, with the three people, homes or things of the same story as options."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        writer = _Writer(rng)
        world = _introduce(writer)
        for _ in range(rng.randrange(8)):
            _act(writer, world, rng.randrange(PEOPLE))
        who = rng.randrange(PEOPLE)
        asked: list[tuple[str, Sequence[str]]] = [
            (f" Where did {world.names[who]} live? In the", world.homes),
            (f" Who was the {world.trades[who]}?", world.names),
            (f" What did {world.names[who]} have? The", world.things),
        ]
        question, options = asked[rng.randrange(len(asked))]
        made.append(Question("".join(writer.words), question, tuple(f" {option}" for option in options), who))
    return made


class _Teller(Protocol):
    def say(self, words: str) -> None: ...

    def choose(self, options: Sequence[str], weights: Sequence[int] | None = None) -> int: ...


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
        total = sum(weights)
        self.entropy -= sum(weight / total * math.log(weight / total) for weight in weights)
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


@dataclass
class _World:
    """What is true now, by person."""

    names: list[str]
    trades: list[str]
    homes: list[str]
    places: list[str]
    things: list[str]
    """Colour and noun, such as `red kite`."""


def _tell(teller: _Teller) -> None:
    world = _introduce(teller)
    people = [f" {name}" for name in world.names]
    trades = [f" {trade}" for trade in world.trades]
    while True:
        opening = teller.choose([" The", *people, " Where", " Who", " What"], (3, 3, 3, 3, 1, 1, 1))
        if opening == 0:
            subject = teller.choose([" end.\n", *trades], (2, 1, 1, 1))
            if subject == 0:
                return
            _predicate(teller, world, subject - 1)
        elif opening <= PEOPLE:
            _predicate(teller, world, opening - 1)
        else:
            (_ask_where, _ask_who, _ask_what)[opening - PEOPLE - 1](teller, world)


def _introduce(teller: _Teller) -> _World:
    teller.choose(OPENINGS)
    teller.say(" there were")
    names: list[str] = []
    trades: list[str] = []
    for person in range(PEOPLE):
        names.append(_draw(teller, NAMES, names))
        teller.say(" the")
        trades.append(_draw(teller, TRADES, trades))
        teller.say((",", " and", ".")[person])
    homes: list[str] = []
    nouns: list[str] = []
    things: list[str] = []
    for name in names:
        teller.say(f" {name} lived in the")
        homes.append(_draw(teller, PLACES, homes))
        teller.say(" and had the")
        colour = _draw(teller, COLOURS, [])
        nouns.append(_draw(teller, THINGS, nouns))
        things.append(f"{colour} {nouns[-1]}")
        teller.say(".")
    return _World(names, trades, homes, list(homes), things)


def _draw(teller: _Teller, words: Sequence[str], taken: Sequence[str]) -> str:
    free = [word for word in words if word not in taken]
    return free[teller.choose([f" {word}" for word in free])]


def _act(teller: _Teller, world: _World, subject: int) -> None:
    teller.say(f" {world.names[subject]}")
    _predicate(teller, world, subject)


def _predicate(teller: _Teller, world: _World, subject: int) -> None:
    verb = teller.choose([" went home to the", " walked to the", " gave", " met", " felt"])
    if verb == 0:
        world.places[subject] = world.homes[subject]
        teller.say(f" {world.homes[subject]}")
    elif verb == 1:
        world.places[subject] = _draw(teller, PLACES, [])
    elif verb == 2:
        other = _other(teller, world.names, subject)
        teller.say(f" the {world.things[subject]} and got the {world.things[other]}")
        world.things[subject], world.things[other] = world.things[other], world.things[subject]
    elif verb == 3:
        other = _other(teller, world.names, subject)
        world.places[other] = world.places[subject]
        teller.say(f" in the {world.places[subject]}")
    else:
        _draw(teller, MOODS, [])
    _draw(teller, MANNERS, [])
    teller.say(".")


def _other(teller: _Teller, names: Sequence[str], subject: int) -> int:
    others = [person for person in range(PEOPLE) if person != subject]
    return others[teller.choose([f" {names[person]}" for person in others])]


def _ask_where(teller: _Teller, world: _World) -> None:
    kind = teller.choose([" did", " was"])
    who = teller.choose([f" {name}" for name in world.names])
    teller.say((f" live? In the {world.homes[who]}.", f"? In the {world.places[who]}.")[kind])


def _ask_who(teller: _Teller, world: _World) -> None:
    kind = teller.choose([" was the", " had the"])
    asked = world.trades if kind == 0 else [thing.split()[1] for thing in world.things]
    who = teller.choose([f" {word}" for word in asked])
    teller.say(f"? {world.names[who]}.")


def _ask_what(teller: _Teller, world: _World) -> None:
    teller.say(" did")
    who = teller.choose([f" {name}" for name in world.names])
    teller.say(f" have? The {world.things[who]}.")
