"""Runs a module as a child that ends with its parent: `python -P watched.py PARENT MODULE WORDS...` (`child.start`).

PARENT is the process that started this one, MODULE what `python -m` would run. The standard input is a pipe that the
parent alone holds open. A thread hands on what comes through it, and at its end, which comes with the parent's, kills
the process group, which this process leads: whatever the module has started goes too. Linux also sends a signal when
the parent is gone: where the pipe was left to a fork of the parent's it stays open.

The module needn't be ours, nor know of this. Nothing but the standard library is imported here, by no path of its own.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1
"""Linux: which signal a process gets when the thread that started it ends (prctl(2))."""


def main() -> None:
    """Watch, then become the module."""
    parent, module, *words = sys.argv[1:]
    watch(int(parent))
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def watch(parent: int) -> None:
    """From now on end this process's group when the parent ends; the standard input stays readable."""
    pipe = os.dup(0)
    theirs, ours = os.pipe()
    os.dup2(theirs, 0)
    os.close(theirs)
    threading.Thread(target=_hand_on, args=(pipe, ours), daemon=True).start()
    if sys.platform == "linux":
        # A real-time signal, which nobody else uses. It comes too when a thread of a parent that lives on has ended.
        signal.signal(signal.SIGRTMAX, lambda *_: _end_unless_child_of(parent))
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGRTMAX)
        _end_unless_child_of(parent)


def _hand_on(pipe: int, ours: int) -> None:
    # By the system's own calls: a stream's lock, held here, would be held for ever in whatever the module forks.
    while data := os.read(pipe, 1 << 16):
        try:
            os.write(ours, data)
        except BrokenPipeError:  # the module has closed its input
            continue
    _end()


def _end_unless_child_of(parent: int) -> None:
    if os.getppid() != parent:
        _end()


def _end() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
