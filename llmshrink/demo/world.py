"""The world of the demo language: who its people are, drawn once from a constant seed and never told to a model but in
stories.

Each of the names has a trade, a home and a coloured thing, and the same ones in every story: after a name they have no
entropy, and only a model that keeps them in its weights can predict them. What a person finds in a place depends on
both, and so does what one person gives to another: some nine hundred facts that neither word tells alone.

The free choices have their tables here too: who comes up next after whom, where somebody goes, how somebody feels, each
with falling probabilities in an order of the person's own.

Only `random.Random.random` is used, the one method whose sequence Python promises to keep.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from llmshrink.demo.lexicon import COLOURS, MANNERS, MOODS, NAMES, PLACES, THINGS, TRADES

T = TypeVar("T")

WORLD_SEED = 1
CIRCLE_WEIGHTS = (10, 8, 7, 6, 5, 4, 4, 3, 3, 2, 2, 2)
HAUNT_WEIGHTS = (6, 5, 4, 4, 3, 3, 2, 2)
MOOD_WEIGHTS = (5, 4, 3, 2, 1, 1)
MANNER_WEIGHTS = (8, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 2, 1, 1, 1)


@dataclass(frozen=True)
class Person:
    """circle: who is named after this person, this person first. haunts: where this person goes. finds: what is found
    there, one for each of haunts. gifts: what each of circle gets from this person, itself nothing (the empty string).
    treasure, finds and gifts are a colour and a noun, such as `red kite`."""

    name: str
    trade: str
    home: str
    treasure: str
    circle: tuple[str, ...]
    haunts: tuple[str, ...]
    finds: tuple[str, ...]
    gifts: tuple[str, ...]
    moods: tuple[str, ...]


def _shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    return sorted(items, key=lambda _: rng.random())


def _draw_people() -> dict[str, Person]:
    """Trades and homes are each shared by two people, whole pairs by none."""
    rng = random.Random(WORLD_SEED)
    treasures = _shuffled(rng, [f"{colour} {thing}" for colour in COLOURS for thing in THINGS])
    homes = _shuffled(rng, PLACES)
    people = {}
    for index, name in enumerate(_shuffled(rng, NAMES)):
        turn, trade = divmod(index, len(TRADES))
        others = _shuffled(rng, [other for other in NAMES if other != name])
        home = homes[(trade + 7 * turn) % len(homes)]
        away = _shuffled(rng, [place for place in PLACES if place != home])
        people[name] = Person(
            name=name,
            trade=TRADES[trade],
            home=home,
            treasure=treasures[index],
            circle=(name, *others[: len(CIRCLE_WEIGHTS) - 1]),
            haunts=tuple(away[: len(HAUNT_WEIGHTS)]),
            finds=tuple(_shuffled(rng, treasures)[: len(HAUNT_WEIGHTS)]),
            gifts=("", *_shuffled(rng, treasures)[: len(CIRCLE_WEIGHTS) - 1]),
            moods=tuple(_shuffled(rng, MOODS)[: len(MOOD_WEIGHTS)]),
        )
    return {name: people[name] for name in NAMES}


def _draw_manners() -> dict[str, tuple[str, ...]]:
    rng = random.Random(WORLD_SEED + 1)
    return {verb: tuple(_shuffled(rng, MANNERS)) for verb in ("walked", "visited", "gave", "went")}


PEOPLE = _draw_people()
"""By name, in the order of `NAMES`."""

MANNERS_OF = _draw_manners()
"""How it is done, by verb, likeliest first."""
