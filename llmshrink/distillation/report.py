"""What a distillation says of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmshrink.checkpoint.beside import NOTHING, LeftBehind
from llmshrink.distillation.curves import PICTURE
from llmshrink.run.heldout import Quality
from llmshrink.run.progress import duration
from llmshrink.run.report import Pushed, VerifyReport


@dataclass(frozen=True)
class DistillReport:
    """before, quality: of the student against the teacher, before and after. curve: of each evaluation.

    tokens: that the student was trained on, counting repeats. seconds of wall time, peak memory in bytes.
    left_behind: what of the student's folder isn't carried over.
    """

    output: Path
    teacher: str
    student: str
    before: Quality
    quality: Quality
    held_out: str
    steps: int
    tokens: int
    curve: tuple[dict[str, float], ...]
    seconds: float
    peak_memory: int
    notes: tuple[str, ...]
    serve: str
    verification: VerifyReport
    left_behind: LeftBehind = NOTHING
    pushed: Pushed | None = None

    @property
    def ok(self) -> bool:
        """Whether the checkpoint read back as it was computed, and got to the Hub where it was to."""
        return self.verification.ok and (self.pushed is None or self.pushed.error is None)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {**asdict(self), "output": str(self.output), "ok": self.ok}

    def lines(self) -> list[str]:
        """The closing summary for a person."""
        before, after = self.before, self.quality
        return [
            f"{self.student} -> {self.output}  (taught by {self.teacher})",
            f"KL          {before.kl_mean:.5f} -> {after.kl_mean:.5f} +- {after.kl_stderr:.5f} nats/token on "
            f"{after.tokens} held-out tokens of {self.held_out}",
            f"perplexity  {before.ppl_after:.3f} -> {after.ppl_after:.3f}, the teacher's {after.ppl_before:.3f}",
            f"agreement   {before.top1_agreement:.1%} -> {after.top1_agreement:.1%} same first choice",
            f"training    {self.steps} steps, {self.tokens:,} tokens; curves in {self.output / PICTURE}",
            f"time        {duration(self.seconds)} ({self.seconds:.1f} s), peak memory {self.peak_memory / 1e9:.2f} GB",
            *self.verification.lines(),
            *(f"note        {note}" for note in [*self.notes, *self.left_behind.lines()]),
            f"serve       {self.serve}",
            *(self.pushed.lines(self.output) if self.pushed else []),
        ]
