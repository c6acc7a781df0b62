"""Whether a run fits this machine, asked before it starts: memory here; disk is `checkpoint.preflight.check_room`'s.

The estimate is good to some 15 %, so a run is stopped only when it doesn't fit even if it's that much too high.
"""

from __future__ import annotations

from pathlib import Path

from llmshrink.errors import NoRoomError
from llmshrink.run.footprint import Footprint
from llmshrink.run.job import Job
from llmshrink.run.memory import free_memory
from llmshrink.run.progress import size

ERROR = 0.15
"""How far the estimate of memory may be from what a run takes."""


def check_memory(job: Job, memory: Footprint) -> None:
    """Raise NoRoomError when a run of `job` can't fit into memory, with what to change."""
    for fault in memory_faults(job, memory):
        raise NoRoomError(fault)


def memory_faults(job: Job, memory: Footprint) -> list[str]:
    """Why a run of `job` can't fit into memory; a line for the machine's and one for the device's."""
    device, found = job.chain.skeleton.device, []
    free = free_memory(type(device)("cpu"))
    if _over(memory.ram, free):
        found.append(_line(job, "memory", memory.ram, free, "or a machine with more"))
    if device.type == "cuda":
        free = free_memory(device)
        if _over(memory.vram, free):
            found.append(_line(job, f"memory on {device}", memory.vram, free, "or --device cpu"))
    return found


def _over(needed: int, free: int) -> bool:
    return needed * (1 - ERROR) > free


def _line(job: Job, what: str, needed: int, free: int, last: str) -> str:
    text = job.calibration.input_ids.shape
    fewer = f"fewer --samples than {text[0]}, " if job.calibrates else ""
    smaller = f"a --batch-size below {job.batch_size}, " if job.batch_size > 1 else f"a --seq-len below {text[1]}, "
    return (
        f"{job.source.name}: {job.recipe.name} takes some {size(needed)} of {what} more, {size(free)} are free; "
        f"{fewer}{smaller}{last}"
    )


def on_one_disk(one: Path, other: Path) -> bool:
    """Whether two folders, which needn't be there yet, are (or will be) on the same disk."""
    return _there(one).stat().st_dev == _there(other).stat().st_dev


def _there(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
