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

from llmshrink.cli.stopping import PROGRAM, goes_on

_OTHER_FOLDER = "mend that, or name another folder"
WAYS_OUT = {
    errno.EIO: "the disk, or the way to it, fails: see that it is sound",
    errno.ENXIO: "the disk, or the way to it, fails: see that it is sound",
    errno.EROFS: f"it is on a file system that is mounted read-only: {_OTHER_FOLDER}",
    errno.EACCES: f"this user may not: {_OTHER_FOLDER}",
    errno.EPERM: f"this user may not: {_OTHER_FOLDER}",
    errno.ESTALE: "the network disk no longer knows it: mount that disk again",
    errno.ETIMEDOUT: "the network disk doesn't answer: see that it is there",
    errno.EHOSTDOWN: "the network disk doesn't answer: see that it is there",
    errno.EFBIG: "this file system, or `ulimit -f`, takes no file so large: name another folder, or raise it",
    errno.EMFILE: "this process has as many open files as `ulimit -n` allows: raise it",
    errno.ENFILE: "this machine has as many open files as it allows: close some, or raise fs.file-max",
    errno.ENAMETOOLONG: "this file system takes no name of that length: choose a shorter one",
    errno.ENOENT: "it was there, or was to be, and is gone: let nothing else write there",
    errno.EEXIST: "something was put there meanwhile: let nothing else write there",
    errno.ENOTEMPTY: "something was put there meanwhile: let nothing else write there",
    errno.ENOTDIR: "something was put there meanwhile: let nothing else write there",
    errno.EISDIR: "something was put there meanwhile: let nothing else write there",
    errno.ELOOP: "it is a link, or leads through too many: name the folder itself",
    errno.EBUSY: "another program holds it: end that one",
    errno.ETXTBSY: "another program holds it: end that one",
}
"""What to do, by the error's number. Others are no fault of a disk or a folder."""
LONGEST = 300
"""Characters of a name that are shown."""
FULL = (errno.ENOSPC, errno.EDQUOT)


def is_refusal(error: BaseException) -> bool:
    """Whether it is the system's word on a file, rather than a bug of ours or a network's."""
    if not isinstance(error, OSError) or isinstance(error, ConnectionError):
        return False
    return error.errno in FULL or error.errno in WAYS_OUT


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
    line = f"{_place(error) or 'a file'}: {os.strerror(error.errno)} ({name}); {WAYS_OUT[error.errno]}; then {then}"
    return line, 1 if kept else 2


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
