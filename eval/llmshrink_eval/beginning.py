"""How what a model reads begins: with BOS, the beginning-of-sequence token, or without it.

Many models were trained on texts that all began with BOS, and their attention rests on it: without it Gemma's
perplexity is off by orders of magnitude. A window from the middle of a text has no BOS of its own, so it's put there.
Who needs it is decided by family (Gemma's), and by what the tokenizer does: one that puts BOS before a text was made
for a model that expects it. For the rest a user says. BOS is never put twice: a text that begins with it, as one that a
chat template wrote does, keeps the one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

Bos: TypeAlias = Literal["auto", "always", "never"]

NEEDING = ("gemma",)
"""In a config's model_type: families that break down without BOS, whatever their tokenizer does."""
PROBE = "A"


@dataclass(frozen=True)
class Beginning:
    """token: BOS's id, None where there is none. put: whether every window begins with it. added: whether the tokenizer
    itself puts it before a text."""

    token: int | None = None
    put: bool = False
    added: bool = False

    @property
    def bos(self) -> int | None:
        """What every window begins with; None: with nothing in particular."""
        return self.token if self.put else None

    def content(self, ids: Sequence[int]) -> int:
        """How many of a text's first ids are BOS that doesn't belong there.

        ids: with the marks that the tokenizer puts around a text. Where BOS is put, every one at the start gives way to
        that. Where it isn't to be, the tokenizer's own goes, and what the text itself begins with stays.
        """
        if self.token is None or not (self.put or self.added):
            return 0
        most = len(ids) if self.put else 1
        return next((place for place in range(min(most, len(ids))) if ids[place] != self.token), min(most, len(ids)))

    def of(self, ids: Sequence[int]) -> list[int]:
        """A text's ids, from its tokenizer with its marks, as the model is to read them."""
        opening = [] if self.bos is None else [self.bos]
        return [*opening, *ids[self.content(ids) :]]


def beginning_of(tokenizer: Any, model_type: str | None, asked: Bos = "auto") -> Beginning:
    """What is to be done about BOS. model_type: of the model's config, None where it isn't known.

    Raises ValueError, in one line that begins with the option, for one that isn't known, and for BOS of a tokenizer
    that has none.
    """
    if asked not in get_args(Bos):
        raise ValueError(f"--bos {asked}: choose one of {', '.join(get_args(Bos))}")
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        if asked == "always":
            raise ValueError("--bos always: the tokenizer has no BOS token; leave the option out")
        return Beginning()
    read = list(tokenizer(PROBE)["input_ids"])
    added = bool(read) and read[0] == token
    needed = any(name in (model_type or "") for name in NEEDING)
    return Beginning(int(token), asked == "always" or (asked == "auto" and (added or needed)), added)
