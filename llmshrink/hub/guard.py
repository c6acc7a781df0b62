"""What must not leave: tokens, keys, and the paths of this machine, wherever they stand in a file of text.

Every file that isn't weights is read. No path may be named there that begins as one that exists here (its first two
folders), but for the system's, which every machine has. What is written by llmshrink itself is held to more: no home
folder of anybody may be named there, while a tokenizer's vocabulary or the original's card may well hold such strings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from llmshrink.hub.client import TOKEN

OWN = ("config.json", "generation_config.json", "llmshrink.json", "recipe.yaml", "timing.json", "README.md")
_KEYS = (
    ("a token of the Hub", TOKEN),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
    ("a GitHub token", re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{60,})")),
    ("a GitLab token", re.compile(r"\bglpat-[\w-]{20,}")),
    ("a Slack token", re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}")),
    ("an AWS key", re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("a Google key", re.compile(r"\bAIza[\w-]{35}")),
    ("a JSON web token", re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}")),
    ("an API key", re.compile(r"\bsk-[A-Za-z0-9_-]{32,}")),
)
_PLACES = re.compile(r"(?<![\w.])(/(home|Users)/[\w.-]+|/root/|/tmp/|/var/folders/|[A-Za-z]:\\\\?Users\\)")
_PATH = re.compile(r"(?:(?<=file://)|(?<![\w./~<-]))(/[\w.@+-]+/[\w.@+-]+)")
_SYSTEM = ("bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "proc", "run", "sbin", "sys", "usr", "var", "System")
"""Folders of the root that every machine has; /var/folders is a Mac's own, and looked for by itself."""


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
        line = line.replace("\\/", "/")
        path = next((path for path in here if (name in OWN or path.count("/") > 2) and _names(line, path)), None)
        path = path or next((match[1] for match in _PATH.finditer(line) if _is_here(match[1])), None)
        if path is None and name in OWN:
            place = _PLACES.search(line)
            path = place[0] if place else None
        if path is not None:
            yield f"{where}: a path of this machine ({path})"


def paths_here(folder: Path, known: Iterable[str] = ()) -> list[str]:
    """Paths that only this machine has: the home folder, the working one, `folder`'s own, each with a / at its end.

    known: others, files among them, which stand as they are.
    """
    place = folder.resolve()
    found = {f"{os.path.abspath(path)}/" for path in [*_home(), os.getcwd(), str(place), str(place.parent)]}
    found |= {each for path in known for each in (os.path.abspath(path), os.path.realpath(path))}
    return sorted(found - {"//", "/"}, key=len, reverse=True)


def _home() -> list[str]:
    """The user's home folder; none where none is known, as in a container under a number alone."""
    home = os.path.expanduser("~")
    return [home] if os.path.isabs(home) else []


def _names(line: str, path: str) -> bool:
    """Whether a line has a path, not as a part of a longer name."""
    end = "" if path.endswith("/") else r"(?![\w-])"
    return path in line and re.search(rf"(?<![\w.]){re.escape(path)}{end}", line) is not None


@lru_cache(4096)
def _is_here(path: str) -> bool:
    """Whether /a/b, as a text has it, is a file or a folder of this machine, and not one of the system's."""
    if path.split("/")[1] in _SYSTEM:
        return False
    return os.path.exists(path) or os.path.exists(path.rstrip("."))
