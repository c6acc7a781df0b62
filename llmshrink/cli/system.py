"""What the operating system refused in the middle of a command, as one line: the file, the error, and the way out.

What a disk has no room for, and knows how much it needs, is `llmshrink.errors.OutputError`; this is the rest.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from llmshrink_eval.refused import FULL, WAYS_OUT, NotStarted, way_out

from llmshrink.cli.stopping import PROGRAM, goes_on

LONGEST = 300
"""Characters of a name that are shown."""


def is_refusal(error: BaseException) -> bool:
    """Whether it is the system's word on a file, rather than a bug of ours or a network's."""
    if not isinstance(error, OSError) or isinstance(error, ConnectionError):
        return False
    return error.errno in WAYS_OUT or isinstance(error, NotStarted)


def refusal(error: OSError, arguments: Sequence[str]) -> tuple[str, int]:
    """(the line that says it, the exit code): 1 where work is kept, else 2. arguments: the command line."""
    if error.errno in FULL:
        return _no_space(error), 2
    assert error.errno is not None
    found = goes_on(arguments)
    kept = found is not None and found.kept
    name = errno.errorcode.get(error.errno, str(error.errno))
    then = "run the same command again"
    if found is not None and kept:
        then = found.said if found.words == arguments else f"{found.said} {shlex.join([PROGRAM, *found.words])}"
    what = _place(error) or "a file"
    if isinstance(error, NotStarted):
        what = f"can't start a process of its own for {error.what}"
    way = f"{way_out(error)}; then " if way_out(error) else ""
    return f"{what}: {os.strerror(error.errno)} ({name}); {way}{then}", 1 if kept else 2


def _place(error: OSError) -> str:
    """The file that an error is about, from the root; empty where it has none; cut where it is long."""
    if error.filename is None or isinstance(error.filename, int):
        return ""
    place = os.path.abspath(os.fsdecode(error.filename))
    return place if len(place) <= LONGEST else f"{place[:LONGEST]}..."


def _no_space(error: OSError) -> str:
    """A disk that is full for something small, as a folder's name: what is large is refused with the bytes needed."""
    named = _place(error)
    place = next((each for each in Path(named).parents if each.exists()), None) if named else None
    free = f" ({shutil.disk_usage(place).free:,} bytes free)" if place else ""
    where = named or "the disk, or what the output goes to"
    return f"{where}: no space left{free}; free some and run the same command again"
