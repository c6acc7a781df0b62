"""tokenizer.json held to how much longer it may make a text: its steps follow each other, and their growths multiply.

The tokenizers library runs whatever steps a file names. Six that each write forty letters for one make four billion of
one letter, so what they can do is reckoned before one of them runs.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmshrink_eval.configfile import WAY_OUT
from llmshrink_eval.errors import EvalError

MOST_GROWTH = 64
"""Times as long as it was that a part of a tokenizer may make a text; real ones make it twice as long."""
MOST_ADDED = 1000
"""Tokens that a tokenizer may put around a text; real ones put two."""
PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")

_UNICODE: Mapping[str, int] = {"NFKC": 18, "NFKD": 18, "NFC": 4, "NFD": 4, "Lowercase": 2, "BertNormalizer": 4}
"""Characters that Unicode's tables, or spaces around ideographs, make of one at most: of few, and once only, as what
they have written they leave as it is. The first such run therefore counts nothing, and another one after text was put
in does."""
_BYTES = 2
"""Of ByteLevel: a byte above 127 is written as a letter of two bytes."""
_PLAIN = re.compile(r"(?:[^\\*?|^$({\[]|\\[snrtdwSDWuxpP.\\]|\[(?:[^\]\\\[]|\\.)+\]|\{[1-9])+", re.DOTALL)
"""A regular expression that can't match nothing, as far as can be told at a glance."""
LOOKED_AT = 1000
"""Characters of a regular expression that is looked at."""

Step = Mapping[str, Any]


def check_growth(file: Path, found: Mapping[str, Any]) -> None:
    """Raise EvalError, in one line, where a part of tokenizer.json makes text more than MOST_GROWTH times as long, or
    puts more than MOST_ADDED tokens around it. found: the file's JSON; a part of another form is the library's to
    refuse."""
    for part in PARTS:
        steps = list(_steps(found.get(part)))
        growth = _growth(steps)
        if growth > MOST_GROWTH:
            raise EvalError(
                f"{file}: its {part} makes a text {_figure(growth)} times as long, and {MOST_GROWTH} times is "
                f"the most; {WAY_OUT}"
            )
        added = sum(_added(step) for step in steps)
        if added > MOST_ADDED:
            raise EvalError(
                f"{file}: its {part} puts {added:,} tokens around a text, and {MOST_ADDED:,} are the most; {WAY_OUT}"
            )


def _steps(part: Any) -> Iterator[Step]:
    """A part's steps in their order, those of sequences within it too: all that is a list in a step are such."""
    if not isinstance(part, dict):
        return
    inner = [part[name] for name in ("normalizers", "pretokenizers", "decoders", "processors") if name in part]
    if not inner:
        yield part
    for each in inner:
        for step in each if isinstance(each, list) else ():
            yield from _steps(step)


def _growth(steps: list[Step]) -> int:
    """Characters that steps, one after the other, make of one at most, rounded up at each."""
    growth = 1
    runs = maps = 0
    in_run = False
    for step in steps:
        kind = step.get("type")
        # A step is told by its fields, as the library tells one that names no type.
        if "pattern" in step and "content" in step:
            growth, in_run = growth * _replaced(step["pattern"], step["content"]), False
        elif "prepend" in step:
            growth, in_run = growth * (1 + _length(step["prepend"])), False
        elif "precompiled_charsmap" in step:
            longest = _longest(step["precompiled_charsmap"])
            # Unicode's tables, as a rule, which the first run may hold.
            growth *= longest if maps or runs > in_run or longest > MOST_GROWTH else 1
            maps += 1
            runs, in_run = runs + (not in_run), True
        elif kind == "ByteLevel" or "add_prefix_space" in step:
            growth *= _BYTES
        elif isinstance(kind, str) and kind in _UNICODE:
            growth *= _UNICODE[kind] if runs > in_run else 1
            runs, in_run = runs + (not in_run), True
        growth *= _repeats(step)
    return growth


def _replaced(pattern: Any, content: Any) -> int:
    """Characters for one that a Replace writes at most."""
    found = pattern if isinstance(pattern, dict) else {"String": pattern}
    text, regex = found.get("String"), found.get("Regex")
    written = _length(content)
    if isinstance(text, str) and text:
        return max(1, -(-written // len(text)))
    # What matches nothing is put before each character.
    matches = isinstance(regex, str) and len(regex) <= LOOKED_AT and _PLAIN.fullmatch(regex) is not None
    return max(1, written if matches else 1 + written)


def _longest(charsmap: Any) -> int:
    """Characters that sentencepiece's table of characters writes for one at most. It holds the length of an index, the
    index, and texts with a NUL after each."""
    try:
        table = base64.b64decode(charsmap or "", validate=True)
    except (TypeError, ValueError, binascii.Error):
        return 1  # which the library refuses
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max(1, *(len(text.decode(errors="replace")) for text in texts.split(b"\0")))


def _templates(step: Step) -> Iterator[list[Any]]:
    for name in ("single", "pair"):
        pieces = step.get(name)
        if isinstance(pieces, list):
            yield pieces


def _repeats(step: Step) -> int:
    """How often a template writes a text at most."""
    counts = [
        Counter(_name(piece["Sequence"]) for piece in pieces if isinstance(piece, dict) and "Sequence" in piece)
        for pieces in _templates(step)
    ]
    return max((count for each in counts for count in each.values()), default=1)


def _added(step: Step) -> int:
    """Tokens that a template puts around the text."""
    special = step.get("special_tokens")
    known = special if isinstance(special, dict) else {}
    sizes = {
        name: len(token["ids"])
        for name, token in known.items()
        if isinstance(token, dict) and isinstance(token.get("ids"), list)
    }
    return max((sum(_size(piece, sizes) for piece in pieces) for pieces in _templates(step)), default=0)


def _size(piece: Any, sizes: Mapping[str, int]) -> int:
    if not isinstance(piece, dict) or "SpecialToken" not in piece:
        return 0
    return sizes.get(_name(piece["SpecialToken"]), 1)


def _name(named: Any) -> str:
    """Of a piece of a template, whatever the type that it says."""
    return str(named.get("id")) if isinstance(named, dict) else ""


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else 0


def _figure(growth: int) -> str:
    return f"up to {growth:,}" if growth < 10**15 else "more than a million billion"
