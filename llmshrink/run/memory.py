"""Keeping a run's resident memory near what it uses.

Long-lived activations and short-lived temporaries share glibc's heap. What is freed between two survivors stays
resident, and after a few blocks that is as much as everything alive together. `give_back` returns such pages to the
system; touching them again costs a page fault, so it is called between phases, not between operations.

Importing a transformers model pulls in whatever else is installed: torch._dynamo imports Triton (85 MB), generation and
the losses of detection models import scikit-learn and SciPy (100 MB). A run on the CPU uses none of it. `lean_imports`
answers those modules' question whether the package is there with no, for as long as it is open.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path, PurePath
from unittest.mock import patch

import psutil
import torch
from torch.utils import _triton

CGROUPS = Path("/sys/fs/cgroup")
SLACK = 12_000_000
"""Bytes that the process may grow by before it is worth giving any back."""


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's, or None under another C library, which has its own ways."""
    if sys.platform != "linux":
        return None
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


class _Mark:
    """Resident bytes right after memory was last given back."""

    resident = 0


def give_back() -> None:
    """Return the free pages inside the heap to the system, if the process has grown since; else, or elsewhere, nothing.

    Every page given back is a page fault when it is touched again, half a second in a run of five where it was done
    without asking.
    """
    trim = _malloc_trim()
    if trim is not None and resident() > _Mark.resident + SLACK:
        trim(0)
        _Mark.resident = resident()


def resident() -> int:
    """Bytes of this process that are in memory now."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * mmap.PAGESIZE


@contextmanager
def lean_imports() -> Iterator[None]:
    """While open, importing a transformers model doesn't import Triton, scikit-learn or SciPy.

    What is imported meanwhile keeps the answer, since it lacks what it would have imported; whoever asks later gets the
    truth. With a GPU, where it has its uses, Triton is left alone.
    """
    import transformers

    with ExitStack() as stack:
        for name in ("is_sklearn_available", "is_scipy_available"):
            for module in (transformers.utils, transformers.utils.import_utils):
                stack.enter_context(patch.object(module, name, _no))
        if not torch.cuda.is_available():
            stack.enter_context(_without_triton())
        yield


def _no() -> bool:
    return False


@contextmanager
def _without_triton() -> Iterator[None]:
    """Dynamo binds the function itself when it is imported, and asks it again later: then it gets the truth."""
    asked, closed = _triton.has_triton_package, False
    try:
        with patch.object(_triton, "has_triton_package", lambda: closed and asked()):
            yield
    finally:
        closed = True


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
            limit, current = ((folder / name).read_text().strip() for name in (most, used))
            said = dict(re.findall(r"^(\w+) (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE))
        except OSError:
            continue
        if limit.isdigit():
            left.append(int(limit) - int(current) + int(said.get(files, 0)))
    return min(left, default=None)


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """Of each group that we are in: folder, file of its limit, of its use, memory.stat's word for pages of files."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
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
