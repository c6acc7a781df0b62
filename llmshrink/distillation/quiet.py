"""Libraries that speak for themselves, silenced where their part of a run is told in its own lines."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its bar of loaded weights and its word on missing keys, which are the frozen ones."""
    from transformers.utils import logging as messages

    level, bar = messages.get_verbosity(), messages.is_progress_bar_enabled()
    logger = logging.getLogger("accelerate")
    before = logger.level
    messages.set_verbosity_error()
    if bar:
        messages.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bar:
            messages.enable_progress_bar()
        logger.setLevel(before)
