"""What a command finds around it and can't count on: a home folder, a user's name, a stdout that prints every sign.

A container under a number alone has no home folder, and a dozen libraries look for one, some of them with a traceback.
So one is given to the process: a folder of this user alone in the temporary one, with a note. A stream that can't print
a sign prints its number.
"""

from __future__ import annotations

import codecs
import getpass
import io
import os
import sys
import tempfile

from llmshrink_eval.refused import refused


def settle() -> None:
    """Make streams print whatever comes, and see to it that there is a home folder. Raises LlmshrinkError."""
    for stream in (sys.stdout, sys.stderr):
        # UTF-8 too has none for a lone surrogate, as in a file's name that isn't text.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    if not os.path.isabs(os.path.expanduser("~")):
        _give_home()
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"  # what caches of torch are called by


def open_closed_streams() -> None:
    """Let streams that were closed (`>&-`) lead nowhere: the next file that is opened would take their place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (as long as Python)


def speak_utf8() -> None:
    """Begin anew in Python's UTF-8 mode where this locale has another encoding: libraries below take no other paths.

    Only where a command line is the whole process. What is printed still goes by PYTHONIOENCODING, where it is set.
    """
    if codecs.lookup(sys.getfilesystemencoding()).name == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, "-P", "-m", "llmshrink", *sys.argv[1:]])


def _give_home() -> None:
    from llmshrink_eval.cache import private_folder

    from llmshrink.errors import LlmshrinkError

    try:
        home = private_folder()
    except OSError as error:
        raise LlmshrinkError(
            f"user {os.getuid()} has no home folder, and {tempfile.gettempdir()} can't be written: "
            f"{refused(error, 'set HOME to a folder')}"
        ) from error
    os.environ["HOME"] = str(home)
    print(
        f"llmshrink: note: user {os.getuid()} has no home folder, so caches go to {home}; set HOME to have them "
        "elsewhere",
        file=sys.stderr,
    )
