"""Weights of a Hub model that are on their way: headers at once, each shard when it is needed, the next meanwhile.

What tensors there are, and where, is in the first kilobytes of each shard. They are asked for alone, so that what a
model can be refused for is known before gigabytes come down. The first read of a tensor starts a thread that fetches
shard after shard, in their order; a read of one that isn't there yet puts it first and waits for it. A shard counts as
there once its content has the sha256 that the Hub promised and begins with the header that was read before.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llmshrink.checkpoint.header import HEADER_LIMIT, Header, parse_header, read_header
from llmshrink.errors import CheckpointError, LlmshrinkError, SourceError

FIRST = 1 << 16
"""Bytes of a shard that are asked for first: most headers are shorter."""
WAITS = (1.0, 2.0, 4.0)
"""Seconds between tries."""

Found = TypeVar("Found")


class Arriving:
    """The shards of one commit that aren't in the cache yet.

    sizes: file name -> bytes; sums: file name -> sha256 as the Hub has it, where it does.
    """

    def __init__(self, name: str, commit: str, folder: Path, sizes: dict[str, int], sums: dict[str, str]) -> None:
        self.name, self.commit, self.folder = name, commit, folder
        self.sizes, self.sums = sizes, sums
        self._headers: dict[str, Header] = {}
        self._coming = sorted(sizes)
        self._there: set[str] = set()
        self._fault: Exception | None = None
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, name: str, commit: str, folder: Path, weights: list[str]) -> Arriving | None:
        """Those of `weights` that aren't in `folder`, the commit's snapshot; None when all are.

        Those that aren't in the repository either will never come: whether the model needs them is found where its
        tensors are. Raises SourceError when the repository has none of the weights, and the client's errors.
        """
        import huggingface_hub

        missing = [file for file in weights if not (folder / file).is_file()]
        if not missing:
            return None
        found = huggingface_hub.HfApi().get_paths_info(name, missing, revision=commit)
        files = {entry.path: entry for entry in found if isinstance(entry, huggingface_hub.hf_api.RepoFile)}
        if not files:
            if len(missing) < len(weights):
                return None
            raise SourceError(
                f"{name}: the repository has no {missing[0]}, where its weights should be; name another model"
            )
        sums = {file: entry.lfs.sha256 for file, entry in files.items() if entry.lfs is not None}
        return cls(name, commit, folder, {file: entry.size for file, entry in files.items()}, sums)

    def __contains__(self, file: Path) -> bool:
        """Whether `file` is one of these, and isn't there yet."""
        try:
            key = self._key(file)
        except ValueError:
            return False
        with self._news:
            return key in self.sizes and key not in self._there

    def nbytes(self) -> int:
        """Bytes that are still to come."""
        with self._news:
            return sum(count for file, count in self.sizes.items() if file not in self._there)

    def header(self, file: Path) -> Header:
        """The header of a shard, asked for alone. Raises CheckpointError when it's broken, SourceError otherwise."""
        key = self._key(file)
        if key not in self._headers:
            try:
                start = _patiently(lambda: self._range(key, 0, FIRST))
                length = int.from_bytes(start[:8], "little")
                if length <= HEADER_LIMIT and 8 + length > len(start):
                    start += _patiently(lambda: self._range(key, len(start), 8 + length))
            except Exception as error:
                raise self._explained(error) from error
            self._headers[key] = parse_header(file, start, self.sizes[key])
        return self._headers[key]

    def wait(self, file: Path) -> None:
        """Return once `file` is there. Raises SourceError or CheckpointError when it can't be had."""
        if file not in self:
            return
        key = self._key(file)
        with self._news:
            if self._thread is None:
                self._check_room()
                self._thread = threading.Thread(target=self._fetch_all, name="weights", daemon=True)
                self._thread.start()
            if key in self._coming:
                self._coming.remove(key)
                self._coming.insert(0, key)
            while key not in self._there and self._fault is None:
                self._news.wait()
            if key not in self._there:
                assert self._fault is not None
                raise self._explained(self._fault) from self._fault

    def _fetch_all(self) -> None:
        while True:
            with self._news:
                if not self._coming:
                    return
                key = self._coming.pop(0)
            try:
                self._fetch(key)
            except Exception as error:
                with self._news:
                    self._fault = error
                    self._news.notify_all()
                return
            with self._news:
                self._there.add(key)
                self._news.notify_all()

    def _fetch(self, key: str) -> None:
        import huggingface_hub

        # The client goes on where a connection ended; one that was reset it leaves to us.
        file = Path(_patiently(lambda: huggingface_hub.hf_hub_download(self.name, key, revision=self.commit)))
        promised = self.sums.get(key)
        if promised is not None:
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != promised:
                raise CheckpointError(
                    f"{file}: its content has sha256 {found[:12]}..., the Hub promised {promised[:12]}...; "
                    f"delete {file.resolve()} and run again to download it anew"
                )
        expected = self._headers.get(key)
        if expected is not None and read_header(self.folder / key) != expected:
            raise CheckpointError(f"{file}: isn't what its beginning said when it was asked for alone; run again")

    def _range(self, key: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a shard, or to its end."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import hf_raise_for_status

        url = hf_hub_url(self.name, key, revision=self.commit)
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{min(end, self.sizes[key]) - 1}"}
        data = b""
        # As a stream: a server that ignores the range would send gigabytes.
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            skip = begin if response.status_code == 200 else 0
            for piece in response.iter_bytes():
                data += piece
                if len(data) >= skip + end - begin:
                    break
        return data[skip : skip + end - begin]

    def _check_room(self) -> None:
        from llmshrink.checkpoint.preflight import check_room

        check_room(self.folder, sum(self.sizes.values()), "the download")

    def _explained(self, error: Exception) -> LlmshrinkError:
        from llmshrink.checkpoint.source import explain

        return error if isinstance(error, LlmshrinkError) else SourceError(explain(self.name, self.commit[:12], error))

    def _key(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()


def _patiently(ask: Callable[[], Found]) -> Found:
    """What `ask` returns, asked anew after no answer, 429 or 5xx; the last fault is raised."""
    from llmshrink.checkpoint.source import unreachable

    for wait in WAITS:
        try:
            return ask()
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            ours = isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)
            if ours or (not unreachable(error) and status != 429 and status < 500):
                raise
        time.sleep(wait)
    return ask()
