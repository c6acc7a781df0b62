"""What the original's card says of itself in its front matter, beside its licence: languages, tags, bases.

A card is somebody's text, so of this only plain words are taken: letters, digits and few signs, short and few. What
the Hub would read as more than a word, as a tag `license:mit`, stays behind; what isn't plain does too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmshrink.run.licence import CARDS, front_matter

MOST = 50
"""Words of a kind."""
_TAG = re.compile(r"(arxiv:)?[A-Za-z0-9][A-Za-z0-9 ._/+-]{0,57}")
"""At most 64 characters."""
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8}){0,3}")
_BASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}/[A-Za-z0-9][A-Za-z0-9._-]{0,30}")


@dataclass(frozen=True)
class Original:
    """languages: codes, as `en` or `zh-Hans`. tags: the authors' words. bases: Hub ids of what it was made of."""

    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()


def original_of(folder: Path) -> Original:
    """What the card says in an original's own folder, or in what was made of it."""
    card = next((folder / name for name in CARDS if (folder / name).is_file()), None)
    head = {} if card is None else front_matter(card)
    return Original(
        tuple(_words(head.get("language"), _LANGUAGE)),
        tuple(_words(head.get("tags"), _TAG)),
        tuple(_words(head.get("base_model"), _BASE)),
    )


def _words(value: object, pattern: re.Pattern[str]) -> Iterator[str]:
    """The first of those in a value, a text or a list of them, that are of a pattern; each once."""
    given = value if isinstance(value, list) else [value]
    plain = dict.fromkeys(each for each in given if isinstance(each, str) and pattern.fullmatch(each))
    yield from list(plain)[:MOST]
