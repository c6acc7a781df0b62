"""Whether a teacher and a student fit into memory, asked before either is read."""

from __future__ import annotations

import math

from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.checkpoint.source import Source
from llmshrink.errors import NoRoomError
from llmshrink.run.asked import pick_device
from llmshrink.run.memory import free_memory
from llmshrink.run.progress import size

FLOAT = 4


def check_memory(teacher: Source, student: Source | None, *, device: str | None, quant: str | None) -> None:
    """Raise NoRoomError where not even the weights fit: the student's in float32, and the teacher's as it is held.

    student: None where it has yet to be made, of another size. quant: of the teacher, a byte a weight at most.
    """
    place = pick_device(device)
    needed = _held(teacher, 1 if quant else FLOAT if place.type == "cpu" else None)
    if student is not None:
        needed += _held(student, FLOAT)
    free = free_memory(place)
    if needed > free:
        raise NoRoomError(
            f"{teacher.name}: teaching holds over {size(needed)} of weights on {place}, {size(free)} are free; take "
            "--teacher-quant nf4 or a --teacher-cache, a smaller model, or a machine with more"
        )


def _held(source: Source, itemsize: int | None) -> int:
    """Bytes of a model's weights in memory. itemsize: of each number; None: as it is stored."""
    with CheckpointIndex.open(source.folder, source.arriving) as index:
        entries = [index.entry(key) for key in index]
    return sum(entry.nbytes if itemsize is None else itemsize * math.prod(entry.shape) for entry in entries)
