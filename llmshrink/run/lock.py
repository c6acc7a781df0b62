"""One run at a time in a folder: the lock names its holder, and the system lets it go when that process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmshrink_eval.refused import refused

from llmshrink.errors import OutputError
from llmshrink.run.foreign import create, refuse_foreign

LOCK = "lock"


class Lock:
    """The file `lock` in a folder, which is made if need be; inside is the number of the process that holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: int | None = None

    @property
    def held(self) -> bool:
        """Whether this process holds it."""
        return self._held is not None

    def take(self, output: Path) -> None:
        """Take it, or raise OutputError: another process holds it, or the folder can't be written. output: for that."""
        try:
            self._held = self._open()
        except OSError as error:
            raise OutputError(f"can't write to {self.folder}: {refused(error, 'choose another -o')}") from error
        if self._held is None:
            who = self._holder()
            raise OutputError(
                f"another run{who} is writing to {output}; wait for it to end or choose another folder with -o"
            )
        with suppress(OSError):  # a full disk: a lock without a name is a lock
            os.truncate(self._held, 0)
            os.write(self._held, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let it go. The file stays, for others may be waiting at it; whoever empties the folder removes it."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _open(self) -> int | None:
        """The locked file, or None when another process holds it."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            refuse_foreign(self.folder / LOCK)
            try:
                lock = create(self.folder / LOCK, os.O_RDWR)
            except FileNotFoundError:
                continue  # another run removed the empty folder in between
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A run that gave up may have removed the folder in between: then this is a lock on nothing.
                if os.path.samestat(os.fstat(lock), os.stat(self.folder / LOCK)):
                    return lock
            except BlockingIOError:
                os.close(lock)
                return None
            except FileNotFoundError:
                pass
            os.close(lock)

    def _holder(self) -> str:
        """The other process, for a message; nothing when it hasn't written its number yet."""
        try:
            said = (self.folder / LOCK).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return ""
        return f" (process {said})" if said.isdigit() else ""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While open, no other process writes to `folder`; nothing of the lock is left in it after. Raises OutputError."""
    folder = Path(os.path.abspath(folder))
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    if folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK]:
        made = [folder]  # by a run that was killed before it wrote anything
    lock = Lock(folder)
    lock.take(folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        for path in made:  # where nothing was written, nothing is left
            with suppress(OSError):
                path.rmdir()
