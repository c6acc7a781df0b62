"""`llmshrink.push`: a finished folder to the Hugging Face Hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmshrink.api.checkpoints import _folder
from llmshrink.errors import LlmshrinkError, PathLike

if TYPE_CHECKING:
    from llmshrink.hub.push import PushReport
    from llmshrink.run.progress import Progress


def push(
    path: PathLike,
    name: str,
    *,
    private: bool = False,
    revision: str = "main",
    dry_run: bool = False,
    yes: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Publish a folder that llmshrink wrote as `name` (owner/name) on the Hub, in one commit.

    private: of a repository that isn't there yet. revision: the branch, which is made where there is none. dry_run:
    check everything and list what would go, without the network. yes: publish what would otherwise be asked about (a
    licence that restricts it, weights of another model in the repository, files changed since the run). Returns what
    was sent. Raises LlmshrinkError for what is in the way, saying what is on the Hub by then: all of it or nothing.
    """
    if not isinstance(name, str) or not isinstance(revision, str):
        raise LlmshrinkError(f"name={name!r}, revision={revision!r}: not text; pass 'owner/name' and a branch")
    folder = _folder(path)
    from llmshrink.hub.push import push as run
    from llmshrink.run.progress import Silent

    return run(
        folder, name, private=private, revision=revision, dry_run=dry_run, yes=yes, progress=progress or Silent()
    )
