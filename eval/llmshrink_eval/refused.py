"""What the operating system refuses, in words: its error, and the way out by the error's number.

Some ways out are of the place alone (another folder, another file), and whoever names the place knows them better;
others are of the process, the machine or the disk, whichever file it was that met them.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_OTHER_FOLDER = "mend that, or name another folder"
_MEANWHILE = "something was put there meanwhile: let nothing else write there"
OF_PLACE = {
    errno.EROFS: f"it is on a file system that is mounted read-only: {_OTHER_FOLDER}",
    errno.EACCES: f"this user may not: {_OTHER_FOLDER}",
    errno.EPERM: f"this user may not: {_OTHER_FOLDER}",
    errno.ENAMETOOLONG: "this file system takes no name of that length: choose a shorter one",
    errno.ENOENT: "it was there, or was to be, and is gone: let nothing else write there",
    errno.EEXIST: _MEANWHILE,
    errno.ENOTEMPTY: _MEANWHILE,
    errno.ENOTDIR: _MEANWHILE,
    errno.EISDIR: _MEANWHILE,
    errno.ELOOP: "it is a link, or leads through too many: name the folder itself",
    errno.EBUSY: "another program holds it: end that one",
    errno.ETXTBSY: "another program holds it: end that one",
}
"""What to do about a file or a folder, by the error's number."""
FULL = (errno.ENOSPC, errno.EDQUOT)
OF_SYSTEM = {
    errno.EIO: "the disk, or the way to it, fails: see that it is sound",
    errno.ENXIO: "the disk, or the way to it, fails: see that it is sound",
    errno.ESTALE: "the network disk no longer knows it: mount that disk again",
    errno.ETIMEDOUT: "the network disk doesn't answer: see that it is there",
    errno.EHOSTDOWN: "the network disk doesn't answer: see that it is there",
    errno.EFBIG: "this file system, or `ulimit -f`, takes no file so large: name another folder, or raise it",
    errno.EMFILE: "this process has as many open files as `ulimit -n` allows: raise it",
    errno.ENFILE: "this machine has as many open files as it allows: close some, or raise fs.file-max",
    errno.ENOMEM: "this machine has no memory left: end other programs",
    **dict.fromkeys(FULL, "free some room there"),
}
"""What to do whichever file it is."""
WAYS_OUT = {**OF_PLACE, **OF_SYSTEM}
"""Others are no fault of a disk or a folder."""
UNREAD = "let this user read it, or copy it again"
"""What to do where a file itself can't be read, for `refused`."""
_STARTING = {errno.EAGAIN: "as many processes run as `ulimit -u` or this machine allows: end some, or raise it"}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class NotStarted(OSError):
    """The system starts no process; `what` is the module that was to run in it."""

    def __init__(self, error: OSError, what: str) -> None:
        super().__init__(error.errno, error.strerror)
        self.what = what


def way_out(error: OSError) -> str:
    """What to do about it; empty where nothing is known."""
    more = _STARTING if isinstance(error, NotStarted) else {}
    return {**WAYS_OUT, **more}.get(error.errno or 0, "")


def refused(error: OSError, otherwise: str = "") -> str:
    """The system's words and the way out: "Too many open files; ... raise it". otherwise: the way out where the file or
    folder itself is at fault, from whoever knows what it is for."""
    said = error.strerror or str(error)
    way = way_out(error) if error.errno in OF_SYSTEM or not otherwise else otherwise
    return f"{said}; {way}" if way else said


def told(error: OSError) -> str:
    """The same with the file's name before it, where the error has one."""
    said = refused(error)
    return said if error.filename is None else f"{os.fsdecode(error.filename)}: {said}"


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, as the library does. Raises OSError with the file's name where the system refuses,
    which the library tells as an error of its own."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error
