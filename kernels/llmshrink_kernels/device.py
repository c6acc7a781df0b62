"""Where a kernel may run, and how the package says that it runs elsewhere.

Triton is a dependency of the kernels' files alone: it is imported when the first of them is needed, so that everything
else imports, and computes by plain torch, on a machine without Triton or without a CUDA device. `jit` is
`triton.jit`, imported then; the interpreter (TRITON_INTERPRET=1 in the environment before that import) is for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger("llmshrink_kernels")

OLDEST_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 tensor cores and asynchronous copies."""


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`. A kernel's file imports Triton anyway; this gives the decorator a type."""
    import triton

    return triton.jit(function)


def constexpr_function(function: F) -> F:
    """`triton.constexpr_function`: plain Python that a kernel calls while it is compiled."""
    import triton

    wrapped: F = triton.constexpr_function(function)
    return wrapped


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def notice(message: str) -> None:
    """Log a warning, once in the life of the process for each message."""
    logger.warning(message)


def runs_triton(device: torch.device) -> bool:
    """Whether kernels run on `device`; if not, one notice says why the plain torch path is taken."""
    if device.type != "cuda":
        notice(f"llmshrink kernels: {device.type} has no Triton kernels; computing by plain torch")
    elif not has_triton():
        notice("llmshrink kernels: Triton is not installed; computing by plain torch (pip install triton)")
    elif torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        notice(
            f"llmshrink kernels: {torch.cuda.get_device_name(device)} is older than Ampere; computing by plain torch"
        )
    else:
        return True
    return False
