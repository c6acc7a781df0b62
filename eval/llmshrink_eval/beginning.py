"""How what a model reads begins: with BOS, the beginning-of-sequence token, or without it.

Many models were trained on texts that all began with BOS, and their attention rests on it: without it Gemma's
perplexity is off by orders of magnitude. A window from the middle of a text has no BOS of its own, so it's put there.
Who needs it is decided by family (Gemma's), and by what the tokenizer does: one that puts BOS before a text was made
for a model that expects it. What it puts is taken as it is, for it may be several marks (GLM's `[gMASK]<sop>`), or one
that it doesn't call BOS. For the rest a user says. BOS is never put twice: a text that begins with it, as one that a
chat template wrote does, keeps the one. A tokenizer that has none, of a family that needs it, is told of (`lacking`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

Bos: TypeAlias = Literal["auto", "always", "never"]

NEEDING = ("gemma",)
"""In a config's model_type: families that break down without BOS, whatever their tokenizer does."""
PROBE = "A"
LACKING = (
    "read without BOS, which models of this family need (their perplexity is off by orders of magnitude without it), "
    "for the tokenizer has none: name it as bos_token in tokenizer_config.json, or give --bos never where that is meant"
)


@dataclass(frozen=True)
class Beginning:
    """marks: the ids that BOS is, mostly one; none where there is no BOS. put: whether every window begins with them.
    added: whether the tokenizer itself puts them before a text. lacking: whether the family needs BOS and there is
    none."""

    marks: tuple[int, ...] = ()
    put: bool = False
    added: bool = False
    lacking: bool = False

    @property
    def opening(self) -> tuple[int, ...]:
        """What every window begins with; empty: with nothing in particular."""
        return self.marks if self.put else ()

    def content(self, ids: Sequence[int]) -> int:
        """How many of a text's first ids are BOS that doesn't belong there.

        ids: with the marks that the tokenizer puts around a text. Where BOS is put, every one at the start gives way to
        that. Where it isn't to be, the tokenizer's own goes, and what the text itself begins with stays.
        """
        if not self.marks or not (self.put or self.added):
            return 0
        size, place = len(self.marks), 0
        while (self.put or place == 0) and tuple(ids[place : place + size]) == self.marks:
            place += size
        return place

    def of(self, ids: Sequence[int]) -> list[int]:
        """A text's ids, from its tokenizer with its marks, as the model is to read them."""
        return [*self.opening, *ids[self.content(ids) :]]


def beginning_of(tokenizer: Any, model_type: str | None, asked: Bos = "auto") -> Beginning:
    """What is to be done about BOS. model_type: of the model's config, None where it isn't known.

    Raises ValueError, in one line that begins with the option, for one that isn't known, and for BOS of a tokenizer
    that has none.
    """
    if asked not in get_args(Bos):
        raise ValueError(f"--bos {asked}: choose one of {', '.join(get_args(Bos))}")
    needed = asked == "auto" and any(name in (model_type or "") for name in NEEDING)
    marks = _put_by(tokenizer)
    added = bool(marks)
    if not added:
        token = getattr(tokenizer, "bos_token_id", None)
        if token is None:
            if asked == "always":
                raise ValueError("--bos always: the tokenizer has no BOS token; leave the option out")
            return Beginning(lacking=needed)
        marks = (int(token),)
    return Beginning(marks, asked == "always" or (asked == "auto" and (added or needed)), added)


def _put_by(tokenizer: Any) -> tuple[int, ...]:
    """The ids that a tokenizer itself puts before a text."""
    read = list(tokenizer(PROBE)["input_ids"])
    bare = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    places = range(len(read) - len(bare) + 1)
    start = next((place for place in places if read[place : place + len(bare)] == bare), 0)
    return tuple(map(int, read[:start]))
