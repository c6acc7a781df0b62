"""What was measured before: results by what they depend on, and work that was interrupted.

A part's key names everything that its numbers depend on (fingerprints of model and text, settings, versions, device);
its sha256 is the file's name. An entry that is torn, was changed, or belongs to another key is as good as absent. Work
that takes long (a pass over the text, the original's stored answers) has a folder under the same name, in which it goes
on where it stood.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import OWN_LIMIT, read_json
from llmshrink_eval.errors import EvalError
from llmshrink_eval.listing import below
from llmshrink_eval.refused import refused

Key = Mapping[str, object]

VERSION = 3
"""Goes up when the way in which something is measured or kept changes: what was kept before isn't found then."""
_USED: list[Path] = []
"""Files and folders in which this process has kept something, or may have."""


def kept_here() -> bool:
    """Whether this process has kept anything that the same evaluation would find: in whatever cache, a result or the
    beginning of one, which is still there."""
    try:
        return any(
            path.is_file() or any(file.is_file() and file.stat().st_size for file in below(path)) for path in _USED
        )
    except OSError:  # it can't be seen, so nothing is promised
        return False


def default_folder() -> Path:
    """Where results are kept when nobody says: the user's cache folder, or, where that can't be written, as in a
    container under a number alone, one in the temporary folder (`llmshrink doctor` says which)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # Without a home folder the ~ stays, and would be made where we are.
    if base.startswith("~") or not _can_be_made(Path(base) / "llmshrink" / "eval"):
        return private_folder() / "eval"
    return Path(base) / "llmshrink" / "eval"


def _can_be_made(folder: Path) -> bool:
    """Whether a folder is there, or could be, and could be written. Nothing is left of the attempt."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            return True
    except OSError:
        return False


def private_folder() -> Path:
    """A folder of this user alone, the same each time where it can be, in the temporary one. Raises OSError."""
    folder = Path(tempfile.gettempdir()) / f"llmshrink-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    state = folder.lstat()
    # The name is everybody's to take: what somebody else made there isn't used.
    if stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix="llmshrink-"))


class Cache:
    """Entries under one folder, which is made when something is first kept."""

    def __init__(self, folder: Path) -> None:
        self.root = folder

    def get(self, part: str, key: Key) -> Any | None:
        """What `put` kept, or None."""
        try:
            entry = read_json(self._file(part, key), limit=OWN_LIMIT)
            whole = entry["sha256"] == _digest(entry["value"]) and entry["key"] == json.loads(_canonical(key))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return entry["value"] if whole else None

    def put(self, part: str, key: Key, value: Any) -> None:
        """Keep a JSON value, whole or not at all. Raises EvalError when the folder can't be written."""
        path = self._file(part, key)
        text = json.dumps({"key": json.loads(_canonical(key)), "sha256": _digest(value), "value": value})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("wb", dir=path.parent, suffix=".part", delete=False) as unfinished:
                unfinished.write(text.encode())
            os.replace(unfinished.name, path)
            _USED.append(path)
        except OSError as error:
            raise self._unwritable(error) from error

    def folder(self, part: str, key: Key) -> Path:
        """A folder for long work under this key; made if need be."""
        path = self._file(part, key).with_suffix("")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error
        _USED.append(path)
        return path

    def drop_folder(self, part: str, key: Key) -> None:
        """Remove what `folder` made: its result is kept by now."""
        shutil.rmtree(self._file(part, key).with_suffix(""), ignore_errors=True)

    def _file(self, part: str, key: Key) -> Path:
        return self.root / part / f"{_digest([VERSION, key])[:40]}.json"

    def _unwritable(self, error: OSError) -> EvalError:
        return EvalError(f"{self.root}: can't be written: {refused(error, 'choose another folder with --cache')}")


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _digest(value: object) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()
