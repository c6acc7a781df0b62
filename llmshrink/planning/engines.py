"""What can serve the result of a job, and why the others can't."""

from __future__ import annotations

from dataclasses import dataclass

from llmshrink.run.finish import ENGINES
from llmshrink.run.job import Job

OWN = "llmshrink's plugin"


@dataclass(frozen=True)
class Engine:
    """Whether an engine serves a checkpoint. needs: what that takes beside the engine. why: not. Each None or words."""

    serves: bool
    needs: str | None = None
    why: str | None = None

    def __str__(self) -> str:
        if not self.serves:
            return f"no: {self.why}"
        return "serves it" + (f" with {self.needs}" if self.needs else "")


def engines(job: Job) -> dict[str, Engine]:
    """What each engine makes of the checkpoint that a job will write: as its notes say, in a form for programs."""
    own = job.format == "llmshrink"
    found = {"transformers": Engine(True, "llmshrink" if own else None)}
    for engine in ENGINES:
        refused = f"{engine} won't serve this checkpoint: "
        why = next((note.removeprefix(refused) for note in job.notes if note.startswith(refused)), None)
        needs = next((_needed(note) for note in job.notes if note.startswith(f"{engine} serves ")), None)
        found[engine] = Engine(why is None, None if why else OWN if own else needs, why)
    return found


def _needed(note: str) -> str:
    """From "vllm-cuda serves 28 of 28 sites only with X: why" the X."""
    return note.partition(" only with ")[2].partition(": ")[0]
