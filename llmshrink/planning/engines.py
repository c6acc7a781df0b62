"""What can serve a result, and why the others can't."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmshrink.formats.stored import Format
from llmshrink.run.finish import ENGINES

OWN = "llmshrink's plugin"


@dataclass(frozen=True)
class Engine:
    """Whether an engine serves a checkpoint.

    needs: what that takes beside the engine. why: not. cpus: on which CPUs it does, where not on all alike. Each is
    None or words.
    """

    serves: bool
    needs: str | None = None
    why: str | None = None
    cpus: str | None = None

    def __str__(self) -> str:
        if not self.serves:
            return f"no: {self.why}"
        found = "serves it" + (f" with {self.needs}" if self.needs else "")
        return found + (f" {self.cpus}" if self.cpus else "")


def engines(notes: Sequence[str], format: Format) -> dict[str, Engine]:
    """What each engine makes of a checkpoint: as the notes of its run say, in a form for programs."""
    own = format == "llmshrink"
    beside = {"llmshrink": "llmshrink", "bitsandbytes": "bitsandbytes"}.get(format)
    found = {"transformers": Engine(True, beside)}
    for engine in ENGINES:
        refused = f"{engine} won't serve this checkpoint: "
        why = next((note.removeprefix(refused) for note in notes if note.startswith(refused)), None)
        if format == "bitsandbytes":
            why = why or "bitsandbytes' codes, which vLLM itself doesn't read"
        served = [note for note in notes if note.startswith(f"{engine} serves ")]
        needs = next((_needed(note) for note in served if " only with " in note), None)
        on_cpus = [_on_cpus(note) for note in served if " only with " not in note]
        # What no kernel of ours takes decides for the whole checkpoint.
        on_cpus = [words for words in on_cpus if words.endswith(" alone")] or on_cpus
        cpus = None if why or own or not on_cpus else "; ".join(on_cpus)
        found[engine] = Engine(why is None, None if why else OWN if own else needs, why, cpus)
    return found


def _needed(note: str) -> str:
    """From "vllm-cuda serves 28 of 28 sites only with X: why" the X."""
    return note.partition(" only with ")[2].partition(": ")[0]


def _on_cpus(note: str) -> str:
    """From "vllm-cpu serves 28 of 28 quantized sites by itself on CPUs with X: why" the words from "by itself" on."""
    return note.partition(" sites ")[2].partition(": ")[0]
