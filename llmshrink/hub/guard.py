"""What must not leave: tokens, keys, and the paths of this machine, wherever they stand in a file of text.

Every file that isn't weights is read. What is written by llmshrink itself is held to more: no home folder of anybody
may be named there, while a tokenizer's vocabulary or the original's card may well hold such strings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmshrink.hub.client import TOKEN

OWN = ("config.json", "generation_config.json", "llmshrink.json", "recipe.yaml", "timing.json", "README.md")
_KEYS = (
    ("a token of the Hub", TOKEN),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
    ("a GitHub token", re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{60,})")),
    ("an AWS key", re.compile(r"\bAKIA[0-9A-Z]{16}\b")),
    ("an API key", re.compile(r"\bsk-[A-Za-z0-9_-]{32,}")),
)
_PLACES = re.compile(r"(?<![\w.])(/(home|Users)/[\w.-]+|/root/|/tmp/|/var/folders/|[A-Za-z]:\\\\?Users\\)")


def leaks(name: str, data: bytes, here: Sequence[str], token: str | None) -> Iterator[str]:
    """What in a file must not leave, as "config.json, line 3: a path of this machine (/home/...)".

    here: paths of this machine. token: the user's own, which may look like nothing. A token is never shown.
    """
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        where = f"{name}, line {number}"
        found = next((what for what, pattern in _KEYS if pattern.search(line)), None)
        if token and token in line:
            found = "your token of the Hub"
        if found:
            yield f"{where}: {found}"
            continue
        # One folder of the root (/data, /root) may stand in anybody's text; in what was written here it is a leak.
        path = next((path for path in here if path in line and (name in OWN or path.count("/") > 2)), None)
        if path is None and name in OWN:
            place = _PLACES.search(line)
            path = place[0] if place else None
        if path is not None:
            yield f"{where}: a path of this machine ({path})"


def paths_here(folder: Path) -> list[str]:
    """Paths that only this machine has, each with a / at its end: the home folder, the working one, `folder`'s own."""
    place = folder.resolve()
    found = {f"{os.path.abspath(path)}/" for path in (Path.home(), os.getcwd(), place, place.parent)}
    return sorted(found - {"//"}, key=len, reverse=True)
