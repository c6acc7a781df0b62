"""What is to be told of how a text was read: by a run's notes, its record and its identity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmshrink_eval.beginning import LACKING, Beginning
from llmshrink_eval.leftout import LeftOut


@dataclass(frozen=True)
class Reading:
    """beginning: what becomes of BOS. date: what the chat template had for today's; None where it asks for
    none. left_out: records that couldn't be used. untold_tools: records whose tools the chat template doesn't write.
    """

    beginning: Beginning = field(default_factory=Beginning)
    date: str | None = None
    left_out: LeftOut = field(default_factory=LeftOut)
    untold_tools: int = 0

    @property
    def bos(self) -> bool:
        """Whether every window begins with BOS."""
        return self.beginning.put

    def notes(self, name: str) -> list[str]:
        """What a user should know, for the text of a name."""
        found = [f"{name}: {LACKING}"] if self.beginning.lacking else []
        if self.left_out.count:
            found.append(f"{name}: {self.left_out.words()}")
        if self.untold_tools:
            found.append(
                f"{name}: the chat template writes no tools: those of {self.untold_tools:,} records are left out"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """For a record."""
        return {
            "bos": self.bos,
            "template_date": self.date,
            "left_out": self.left_out.to_dict(),
            "untold_tools": self.untold_tools,
        }
