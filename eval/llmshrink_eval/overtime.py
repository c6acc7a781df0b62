"""A limit of time for a program that isn't ours and runs in this process, as a chat template does.

A signal would reach the main thread alone, and conversations are read in others too. So a second thread has Python
raise an exception in the first (`PyThreadState_SetAsyncExc`, CPython's own way), which comes between two of its steps:
a loop of a template is many. What is one step of C isn't cut short.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STEPS = 100
"""Of Python, in which an exception that is on its way comes, and not to whoever follows: the first is enough. It may
have come before, which can't be seen where the block made another of it."""


class _Overdue(BaseException):
    """Not an Exception: the program that is stopped shall not handle it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once it has run for so long, in whatever thread this is."""
    lock, over, done = threading.Lock(), False, False
    thread = ctypes.c_ulong(threading.get_ident())

    def stop() -> None:
        nonlocal over
        with lock:
            if not done:
                over = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Overdue))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            timer.cancel()
            with lock:
                done = True
            for _ in range(STEPS if over else 0):
                time.sleep(0)
    except _Overdue:
        raise TimeoutError(f"it didn't end within {seconds:g} s") from None
