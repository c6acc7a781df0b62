"""What can be asked of a checkpoint that is there: `llmshrink.inspect`, `llmshrink.verify`; and `llmshrink.recipes`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmshrink.errors import PathLike, SourceError
from llmshrink.paths import expanded

if TYPE_CHECKING:
    from llmshrink.recipe.schema import Recipe
    from llmshrink.run.inspect import InspectReport
    from llmshrink.run.report import VerifyReport


def inspect(path: PathLike) -> InspectReport:
    """Describe a checkpoint that llmshrink wrote: bits, group, bytes and error of every site."""
    from llmshrink.run.inspect import inspect as look

    return look(_folder(path))


def verify(path: PathLike, *, engine: Literal["transformers", "vllm"] = "transformers") -> VerifyReport:
    """Reload a checkpoint from disk and compare its next-token log-probabilities.

    engine: "transformers" reads the packed weights back into transformers' modules, a block at a time, and compares
    with what the run that made the checkpoint computed; "vllm" runs the real engine in its own process and compares
    it with transformers on the same checkpoint. One of bitsandbytes is then also loaded by plain transformers with that
    library, as anyone would, and held to the run. Every file's checksum is compared with the run's first: so one bit is
    seen in a row of the embedding that no prompt touches. The report isn't ok with a file of weights that was added or
    whose checksum differs, nor with a damaged record or seal; other files that were changed or added are named.
    """
    from llmshrink.run.seal import checked
    from llmshrink.run.verify import verify as against_run
    from llmshrink.run.verify import verify_vllm

    if engine not in ("transformers", "vllm"):
        raise SourceError(f"engine={engine!r}: not an engine that can verify; pass 'transformers' or 'vllm'")
    folder = _folder(path)
    found = checked(folder)
    report = verify_vllm(folder) if engine == "vllm" else against_run(folder)
    return replace(report, ok=report.ok and found.ok, **vars(found))


def recipes() -> dict[str, Recipe]:
    """The shipped recipes by name; one that can't be read here is left out."""
    from llmshrink.recipe.read import shipped

    return shipped()


def _folder(path: PathLike) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise SourceError(f"{path!r}: not a path; pass the folder that llmshrink wrote")
    from llmshrink.checkpoint.recognise import refuse_unready

    folder = expanded(path)
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder; name one that llmshrink wrote")
    refuse_unready(folder, str(path))
    return folder
