"""A model as a plan sees it, and whether what comes of it has room."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.checkpoint.preflight import check_room
from llmshrink.checkpoint.source import Source, resolve
from llmshrink.errors import OutputError
from llmshrink.planning.report import Plan


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
    """The model without its weights, none of which is fetched or read. Raises SourceError as a run does."""
    source = resolve(model, trust_remote_code=trust_remote_code)
    return Found(source, CheckpointIndex.open(source.folder), 0)


def text_here(spec: str | None, source: Source) -> bool:
    """Whether a calibration text can be read without a network."""
    if spec is None:
        return source.kind == "demo"
    return spec == "demo" or Path(spec).is_file()


def fitting(made: Plan, output: Path) -> Plan:
    """With a fault where the disk at OUT has too little room."""
    try:
        check_room(output, made.disk_bytes)
    except OutputError as error:
        return replace(made, faults=(*made.faults, str(error)))
    return made
