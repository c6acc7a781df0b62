"""A model as a plan sees it, and whether what comes of it has room."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.checkpoint.preflight import check_room
from llmshrink.checkpoint.source import Source, resolve
from llmshrink.errors import OutputError
from llmshrink.paths import expanded
from llmshrink.planning.report import Plan
from llmshrink.run.fits import on_one_disk


@dataclass(frozen=True, eq=False)
class Found:
    """A model by its small files and its weights' headers. download: bytes of weights that must still come."""

    source: Source
    index: CheckpointIndex
    download: int

    @property
    def here(self) -> bool:
        """Whether all of its weights are on this machine."""
        return self.download == 0


def find(model: str, *, trust_remote_code: bool) -> Found:
    """The model without its weights, of which only headers are fetched or read. Raises SourceError as a run does."""
    source = resolve(model, trust_remote_code=trust_remote_code, stream=True)
    index = CheckpointIndex.open(source.folder, source.arriving)
    return Found(source, index, 0 if source.arriving is None else source.arriving.nbytes())


def text_here(spec: str | None, source: Source) -> bool:
    """Whether a calibration text can be read without a network."""
    if spec is None:
        return source.kind == "demo"
    return spec == "demo" or expanded(spec).is_file()


def fitting(made: Plan, output: Path) -> Plan:
    """With a fault where the disk at OUT, or the one of the Hub's cache, has too little room."""
    needed = [(output, made.disk_bytes, "the output")]
    if made.download_bytes:
        from huggingface_hub import constants

        cache, together = Path(constants.HF_HUB_CACHE), 0
        if on_one_disk(cache, output):
            together = made.disk_bytes
        needed.append((cache, made.download_bytes + together, "the download" + (" and the output" if together else "")))
    faults = []
    for folder, count, what in needed:
        try:
            check_room(folder, count, what)
        except OutputError as error:
            faults.append(str(error))
    return replace(made, faults=(*made.faults, *faults))
