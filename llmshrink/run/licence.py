"""Under which licence the original came, and whether it lets a changed copy be passed on.

A card is somebody's text. Of its front matter what counts here is taken as text and nothing else: no tag of YAML's
makes anything of it, a licence that is no id is somebody's own words, and a link is one of the web or a file beside it.

The licence is what the original's card says in its front matter, else what its LICENSE file is recognised as. What is
said of one here is no legal advice: it decides whether a push goes on by itself (known to allow changed copies), says a
warning (nothing known), or wants the user to have looked (terms on redistribution, no commercial use, gated).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import Unreadable, parse_yaml
from llmshrink_eval.inert import plain
from llmshrink_eval.listing import named

from llmshrink.checkpoint.beside import TERMS

HEAD = 1 << 18
"""Bytes of a card that are looked at: its front matter comes first."""
BEGINNING = 20_000
"""Characters of a licence that are looked at."""
LONGEST = 200
"""Characters of a name that are told."""
_ID = re.compile(r"[a-z0-9][a-z0-9.+_-]{0,63}")
_LINK = re.compile(r"https?://[^\s<>\"'`{}|\\^\[\]]{1,2000}", re.IGNORECASE)
CARDS = ("SOURCE_README.md", "README.md")
"""The original's card as an output keeps it; or where it lies in the original itself."""
FREE = frozenset(
    [
        "apache-2.0",
        "mit",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "isc",
        "zlib",
        "unlicense",
        "cc0-1.0",
        "wtfpl",
        "cc-by-2.0",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "mpl-2.0",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl-3.0",
        "agpl-3.0",
        "epl-2.0",
        "artistic-2.0",
        "afl-3.0",
        "ecl-2.0",
        "ms-pl",
        "osl-3.0",
        "odc-by",
        "pddl",
        "openmdw-1.0",
        "openmdw-1.1",
    ]
)
"""Ids of the Hub's that allow changed copies, under the same terms or with the authors named at most."""
_BOUND = (
    (r"\b(cc-by-)?nc\b|non-?commercial", "it forbids commercial use"),
    (r"\bnd\b|no-?deriv", "it forbids changed copies"),
    (r"research", "it is for research alone"),
    (r"llama", "it has terms on passing copies on (the licence beside them, the name, who may use it)"),
    (r"gemma", "it has terms on passing copies on (its use restrictions go with them)"),
    (r"openrail|\brail\b", "its use restrictions must be passed on with it"),
    (r"^other\b", "it is the authors' own, whose terms llmshrink can't know"),
    (r"^(apple|h-|deepseek|tii|qwen|tongyi|mnpl|mrl)", "it is the authors' own, with terms on use or on copies"),
)
_FILES = (
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"Permission is hereby granted, free of charge", "mit"),
    (r"Redistribution and use in source and binary forms", "bsd"),
    (r"(?i)llama[\w. ]* community licen[sc]e", "llama"),
    (r"(?i)gemma terms of use", "gemma"),
    (r"(?i)Attribution-NonCommercial", "cc-by-nc-4.0"),
    (r"(?i)non-?commercial|research licen[sc]e", "other"),
)


@dataclass(frozen=True)
class Licence:
    """id: as the Hub names it; None where nothing says. name, link: of one that the Hub has no id for.

    said_by: the file that says so. gated: whether the Hub gave the original only to who agreed to its terms.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None
    said_by: str | None = None
    gated: bool = False

    def __str__(self) -> str:
        if self.id is None:
            return "unknown"
        return f"{self.name} ({self.id})" if self.name else self.id

    @property
    def bound(self) -> str | None:
        """Why passing a changed copy on takes a look first; None where it doesn't."""
        words = f"{self.id or ''} {self.name or ''}".lower()
        found = None if self.id in FREE else next((why for pattern, why in _BOUND if re.search(pattern, words)), None)
        gated = "the original is gated: whoever got it agreed to terms that a copy mustn't undo" if self.gated else None
        return "; ".join(filter(None, (found, gated))) or None

    @property
    def warning(self) -> str | None:
        """What a user should hear of one that nothing is known of."""
        if self.id is None:
            return "the original names no licence: whether it may be passed on isn't known; ask its authors"
        if self.id not in FREE and self.bound is None:
            return f"what the licence {self} allows isn't known to llmshrink: read it before it is published"
        return None

    def front_matter(self) -> dict[str, str]:
        """The keys of a card."""
        found = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in found.items() if value}


def licence_of(folder: Path) -> Licence:
    """The licence of an original, in its own folder or in what was made of it."""
    for card in CARDS:
        head = front_matter(folder / card)
        gated = any(key.startswith("extra_gated") for key in head)
        id, name = _text(head.get("license")), _text(head.get("license_name"))
        if id is not None and _ID.fullmatch(id.lower()):
            return Licence(id.lower(), name, _link(head, folder), card, gated)
        if id is not None:
            return Licence("other", name or id, _link(head, folder), card, gated)
        if gated or (folder / card).is_file():
            return _by_file(folder, gated)
    return _by_file(folder, False)


def front_matter(card: Path) -> dict[str, Any]:
    """The metadata at the head of a card, every scalar as text; empty where there is none that can be read."""
    import yaml

    try:
        with card.open("rb") as file:
            text = file.read(HEAD).decode("utf-8-sig", errors="replace")
        match = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", text, re.DOTALL)
        found = parse_yaml(match[1], yaml.BaseLoader) if match else None
    except (OSError, Unreadable):
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str | None:
    """What is said, on one line: of a list the first; None where nothing is."""
    first = value[0] if isinstance(value, list) and value else value
    said = plain(first)[:LONGEST].strip() if isinstance(first, str) else ""
    return None if said.lower() in ("", "null", "~") else said


def _link(head: dict[str, Any], folder: Path) -> str | None:
    """Where the licence can be read: an address of the web, or a file that goes on with the model."""
    link = head.get("license_link")
    if not isinstance(link, str):
        return None
    beside = TERMS.fullmatch(link) is not None and (folder / link).is_file()
    return link if beside or _LINK.fullmatch(link) else None


def _by_file(folder: Path, gated: bool) -> Licence:
    files = [path for path in named(folder, "LICENSE*", "LICENCE*") if path.is_file()]
    for file in files:
        with file.open(encoding="utf-8", errors="replace") as stream:
            text = stream.read(BEGINNING)
        known = next((id for pattern, id in _FILES if re.search(pattern, text)), "other")
        return Licence(known, None, None, file.name, gated)
    return Licence(gated=gated)
