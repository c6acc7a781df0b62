"""Keeping a run's resident memory near what it uses.

Long-lived activations and short-lived temporaries share glibc's heap. What is freed between two survivors stays
resident, and after a few blocks that is as much as everything alive together. `give_back` returns such pages to the
system; touching them again costs a page fault, so it is called between phases, not between operations.

Importing a transformers model pulls in torch._dynamo, which imports Triton wherever it is installed: 85 MB that a run
on the CPU never uses. `without_triton` answers dynamo's question with no for as long as it is open.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import torch
from torch.utils import _triton


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's, or None under another C library, which has its own ways."""
    if sys.platform != "linux":
        return None
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


def give_back() -> None:
    """Return the free pages inside the heap to the system; where the C library can't, do nothing."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@contextmanager
def without_triton() -> Iterator[None]:
    """While open, importing torch._dynamo doesn't import Triton; with a GPU, where it has its uses, nothing changes.

    Only the import's own question is answered so: whoever asks later gets the truth.
    """
    if torch.cuda.is_available():
        yield
        return
    asked, closed = _triton.has_triton_package, False
    try:
        with patch.object(_triton, "has_triton_package", lambda: closed and asked()):
            yield
    finally:
        closed = True
