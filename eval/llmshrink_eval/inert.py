"""Text from anywhere inside Markdown of ours: shown as it is, and nothing in it is Markdown, HTML or a command."""

from __future__ import annotations

import re
import unicodedata

_MARKED = re.compile(r"[\\`*{}\[\]<>|$~#&]|(?<![^\W_])_|_(?![^\W_])")
_LEADING = re.compile(r"^(\d+(?=[.)](\s|$))|(?=[-+=](\s|[-+=]|$)))")
_TURNING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""What changes the direction of the text after it, so that it reads as something else."""
_TICKS = re.compile(r"`+")


def plain(text: str) -> str:
    """The text on one line, with the sign for what can't be read in the place of controls and halves of characters."""
    line = " ".join(text.split())
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in _TURNING else c for c in line)


def escaped(text: str) -> str:
    """The text as Markdown shows it as it is, on one line, inside a cell of a table too."""
    marked = _MARKED.sub(lambda match: "\\" + match[0], plain(text))
    return _LEADING.sub(lambda match: match[0] + "\\", marked)


def code(text: str) -> str:
    """The text as a span of code, whatever backticks are in it."""
    line = plain(text)
    ticks = "`" * (1 + max((len(run) for run in _TICKS.findall(line)), default=0))
    return f"{ticks} {line} {ticks}" if len(ticks) > 1 or not line else f"`{line}`"


def fenced(text: str, language: str = "") -> list[str]:
    """The lines of a text as a block of code, behind a fence that none of them ends."""
    lines = text.splitlines()
    fence = "`" * max(3, 1 + max((len(run) for line in lines for run in _TICKS.findall(line)), default=0))
    return [f"{fence}{language}", *lines, fence]
