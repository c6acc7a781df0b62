"""Keeping a run's resident memory near what it uses, and the pages that it uses for as long as it can.

Long-lived activations and short-lived temporaries share glibc's heap. What is freed between two survivors stays
resident, and after a few blocks that may be as much as everything alive together. `give_back` returns such pages to the
system. But every page given back is a fault when it is touched again, and a block's forwards touch the same few dozen
megabytes for each batch: given back after every batch they cost a run as much as a sixth of its time. So a run says
beforehand how much memory it will need (`holding`), and up to there nothing is given back: neither by `give_back` nor
by glibc itself, which returns a large tensor's pages when it is freed unless it is told otherwise.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
SLACK = 12_000_000
"""Bytes that the process may grow by before it is worth giving any back."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE = 32 << 20
"""Bytes of a tensor from which it isn't in the heap: its pages go when it does. glibc's own limit for learning this."""
NEVER = (1 << 31) - 1


@cache
def _libc(name: str) -> Callable[..., Any] | None:
    """A function of glibc's, or None under another C library, which has its own ways."""
    if sys.platform != "linux":
        return None
    found: Callable[..., Any] | None = getattr(ctypes.CDLL(None), name, None)
    return found


class _State:
    """resident: bytes right after memory was last given back. held: resident bytes below which none is."""

    resident = 0
    held = 0


def give_back() -> None:
    """Return the free pages inside the heap to the system, if the process has grown since, and beyond what it holds;
    else, or under another C library than glibc, nothing."""
    trim, now = _libc("malloc_trim"), resident()
    if trim is not None and now > max(_State.held, _State.resident + SLACK):
        trim(0)
        _State.resident = resident()


@contextmanager
def holding(more: int) -> Iterator[None]:
    """While open, the process keeps its heap's pages until it has `more` bytes than now; then they are given back."""
    mallopt, trim = _libc("mallopt"), _libc("malloc_trim")
    if mallopt is None or trim is None:
        yield
        return
    _State.held = resident() + more
    mallopt(M_MMAP_THRESHOLD, LARGE)
    mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        # What glibc itself comes to once a tensor of that size was freed.
        mallopt(M_TRIM_THRESHOLD, 2 * LARGE)
        _State.held = 0
        trim(0)
        _State.resident = resident()


def resident() -> int:
    """Bytes of this process that are in memory now."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * mmap.PAGESIZE


def free_memory(device: torch.device) -> int:
    """Bytes that are free where a device's tensors live, and that this process may have of them."""
    if device.type != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    left = [psutil.virtual_memory().available, *(room for room in (_of_cgroup(), _of_process()) if room is not None)]
    return max(0, min(left))


def _of_cgroup() -> int | None:
    """What the process's control groups (a container's, a batch system's) leave it; None without a limit.

    Pages of files count as used there, and are given up when memory is asked for.
    """
    left = []
    for folder, most, used, files in _groups():
        try:
            limit, current = ((folder / name).read_text(encoding="utf-8").strip() for name in (most, used))
            said = dict(
                re.findall(r"^(\w+) (\d+)$", (folder / "memory.stat").read_text(encoding="utf-8"), re.MULTILINE)
            )
        except OSError:
            continue
        if limit.isdigit():
            left.append(int(limit) - int(current) + int(said.get(files, 0)))
    return min(left, default=None)


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """Of each group that we are in: folder, file of its limit, of its use, memory.stat's word for pages of files."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = CGROUPS / "memory" if kinds else CGROUPS
        # In a container the path may be the host's: its own group is the root then.
        for folder in {
            root,
            *(root / part for part in (path.lstrip("/"), *map(str, PurePath(path.lstrip("/")).parents))),
        }:
            if kinds:
                yield folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            else:
                yield folder, "memory.max", "memory.current", "inactive_file"


def _of_process() -> int | None:
    """What `ulimit -v` leaves this process; None without a limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit - psutil.Process().memory_info().vms
