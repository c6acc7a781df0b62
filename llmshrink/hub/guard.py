"""What must not leave: tokens, keys, and the paths of this machine, wherever they stand in a file of text.

Every file that isn't weights is read. What is written by llmshrink itself is held to more: no home folder of anybody
may be named there, while a tokenizer's vocabulary or the original's card may well hold such strings.
"""

from __future__ import annotations

import os
import re
import tempfile
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
_HOMES = re.compile(r"(?<![\w.])(/(home|Users)/[\w.-]+(/|\b)|/root/|[A-Za-z]:\\\\?Users\\)")
_SHORTEST = 5
"""Characters of a path of this machine that is looked for: / and /tmp say nothing."""


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
        path = next((path for path in here if path in line), None)
        if path is None and name in OWN:
            home = _HOMES.search(line)
            path = home[0] if home else None
        if path is not None:
            yield f"{where}: a path of this machine ({path})"


def paths_here(folder: Path) -> list[str]:
    """Paths that only this machine has: the home folder, the working one, `folder`'s, and what lies under /tmp."""
    found = {
        str(Path.home()),
        os.getcwd(),
        str(folder.resolve()),
        str(folder.resolve().parent),
        tempfile.gettempdir() + "/",
    }
    return sorted((path for path in found if len(path) >= _SHORTEST), key=len, reverse=True)
