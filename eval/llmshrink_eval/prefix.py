"""The first tokens of a long text, without tokenizing all of it.

They must equal those of the whole. A tokenizer's choice at one place depends on what follows only within a word or a
short run, so a prefix is tokenized and its last `MARGIN_TOKENS` tokens are thrown away. How long the prefix must be
follows from the characters per token measured on its beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MARGIN_TOKENS = 1024
PROBE_CHARACTERS = 1 << 14


@dataclass(frozen=True)
class Tokenized:
    """The beginning of a text. columns: lists of what there is of each token, ids first. prefix: what they were made
    from; whole: whether that is all of the text; complete: whether the tokens are all of it."""

    columns: tuple[list[Any], ...]
    prefix: str
    whole: bool
    complete: bool


def tokenize_beginning(
    first: Callable[[int], tuple[str, bool]],
    encode: Callable[[str], tuple[list[Any], ...]],
    wanted: int,
    length: int = PROBE_CHARACTERS,
) -> Tokenized:
    """The first `wanted` tokens, or all where there are fewer.

    first: a number of characters -> the text's first ones, and whether there are no more. encode: a text -> its tokens.
    length: characters to begin with.
    """
    while True:
        prefix, whole = first(length)
        columns = encode(prefix)
        found = len(columns[0])
        if whole or found >= wanted + MARGIN_TOKENS:
            kept = tuple(column[:wanted] for column in columns)
            return Tokenized(kept, prefix, whole, whole and found <= wanted)
        characters_per_token = len(prefix) / max(found, 1)
        length = int(1.1 * characters_per_token * (wanted + MARGIN_TOKENS)) + PROBE_CHARACTERS


def characters_for(tokens: int) -> int:
    """Characters that hold so many tokens of most texts: where to begin with a text that is in memory already."""
    return max(PROBE_CHARACTERS, 8 * (tokens + MARGIN_TOKENS))
