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
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from torch.utils import _triton

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
    """Bytes that are free where a device's tensors live."""
    return psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
