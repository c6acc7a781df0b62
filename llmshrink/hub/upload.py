"""All files in one commit: until the Hub has taken that, nobody sees any of them.

The client's `upload_folder` commits a large folder in parts, whoever loads the model in between gets half of it; so
`create_commit` is used, in two steps. First the large files are sent to the Hub's storage, where no branch names them
yet: that is what takes long, and what goes on where it stood, since the Hub says which content it already has (and with
hf_xet, which chunks of it). Then one commit names everything, over exactly the state of the branch that was looked at
before. An answer that got lost is made good by asking what is there. At the end each file's checksum as the Hub has it
is held to the one here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmshrink.hub.client import HubError, cause, check_token, explain, passing, patiently
from llmshrink.run.progress import Progress, size

if TYPE_CHECKING:
    from huggingface_hub import HfApi

THREADS = 4
GIT_HASH = 40
"""Characters; a sha256 has 64."""


@dataclass(frozen=True)
class Target:
    """Where a push goes. private: of a repository that isn't there yet; None: as its owner has it by default."""

    name: str
    revision: str = "main"
    private: bool | None = None


@dataclass(frozen=True)
class Item:
    """A file: its path in the repository, where its content is (or the content itself), and the sha256 of that."""

    path: str
    content: Path | bytes
    size: int
    sha256: str

    def data(self) -> bytes:
        """The whole content; of small files only."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


@dataclass(frozen=True)
class Published:
    """commit: its id. removed: files of weights that were there and aren't part of this model."""

    commit: str
    url: str
    removed: tuple[str, ...]


def upload(target: Target, items: Sequence[Item], message: str, *, replace: bool, progress: Progress) -> Published:
    """Publish `items` as one commit. replace: whether weights of another model that are there may go with it.

    Raises HubError saying what went wrong, and what of it is on the Hub.
    """
    session = _Upload(target, items, progress, check_token())
    try:
        return session.run(message, replace=replace)
    except HubError as error:
        raise HubError(f"{target.name}: {error}; {session.state()}") from error.__cause__
    except KeyboardInterrupt:
        progress.note(f"{target.name}: {session.state()}")
        raise
    except Exception as error:  # dozens of types, of the client's threads, HTTP library and own
        raise HubError(f"{target.name}: {explain(cause(error), target.name)}; {session.state()}") from error


class _Upload:
    """One push. The attributes after `api` say how far it came."""

    def __init__(self, target: Target, items: Sequence[Item], progress: Progress, token: str) -> None:
        from huggingface_hub import HfApi

        self.target, self.items, self.progress = target, items, progress
        self.api: HfApi = HfApi(token=token, library_name="llmshrink")
        self.made = False
        self.sent = False
        self.asked = False
        self.head = ""
        self.commit = ""

    def state(self) -> str:
        """What is on the Hub when a push ends here."""
        name, branch = self.target.name, self.target.revision
        if self.commit:
            return f"everything that was sent is published, as commit {self.commit[:12]}"
        if self.asked:
            return (
                f"whether the commit arrived isn't known: either {branch} is as it was or it has everything; run the "
                "same command again, which looks first"
            )
        empty = f"; the repository {name} was made, and is empty" if self.made else ""
        kept = "; what was sent waits there unseen, and the same command goes on from it" if self.sent else ""
        return f"nothing was published{empty}{kept}"

    def run(self, message: str, *, replace: bool) -> Published:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        name, branch = self.target.name, self.target.revision
        self._open()
        head, there = self._look()
        self.head = head
        stale = _stale(there, self.items)
        if stale and not replace:
            raise HubError(
                f"{branch} holds {len(stale)} files of weights that aren't this model's ({stale[0]}), "
                "and engines read every one they find; remove them with --yes, or push to another name or --revision"
            )
        additions = [CommitOperationAdd(item.path, item.content) for item in self.items]
        for addition, item in zip(additions, self.items, strict=True):
            addition.upload_info.sha256 = bytes.fromhex(item.sha256)
        if not stale and not _differing(there, self.items):
            return Published(head, self._url(head), ())
        self.progress.note(f"sending {len(self.items)} files, {size(sum(item.size for item in self.items))}")
        self.sent = True
        self.api.preupload_lfs_files(name, additions, revision=branch, num_threads=THREADS, free_memory=False)
        operations: list[Any] = [*additions, *(CommitOperationDelete(path, is_folder=False) for path in stale)]

        def commit() -> str:
            self.asked = True
            try:
                made = self.api.create_commit(
                    self.target.name,
                    operations,
                    commit_message=message,
                    revision=self.target.revision,
                    parent_commit=head,
                )
            except Exception as error:
                # A plain refusal leaves the branch as it was; of anything else we can't tell.
                self.asked = passing(error)
                raise
            return made.oid

        self.commit = patiently(commit, self._arrived)
        self._check()
        return Published(self.commit, self._url(self.commit), tuple(stale))

    def _open(self) -> None:
        """A repository and a branch to write to."""
        from huggingface_hub.errors import RepositoryNotFoundError

        name, branch = self.target.name, self.target.revision
        self._check_role(patiently(self.api.whoami))
        try:
            info = patiently(lambda: self.api.repo_info(name))
        except RepositoryNotFoundError:
            patiently(lambda: self.api.create_repo(name, private=self.target.private, exist_ok=True))
            self.made = True
        else:
            if self.target.private and not info.private:
                raise HubError("the repository is there already, and is public; make it private in its settings first")
        if branch != "main":
            patiently(lambda: self.api.create_branch(name, branch=branch, exist_ok=True))

    def _check_role(self, who: Mapping[str, Any]) -> None:
        token = who.get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise HubError(
                f"the token at hand (of {who.get('name')}) may only read; make one with the write role in the Hub's "
                "Settings, Access Tokens, and log in with it: `hf auth login`"
            )

    def _look(self) -> tuple[str, dict[str, str]]:
        """The branch's commit, and path -> checksum of what it holds (as in `_checksum`)."""
        name, branch = self.target.name, self.target.revision
        head = patiently(lambda: self.api.repo_info(name, revision=branch)).sha
        assert head is not None, "the Hub names the commit of a branch"
        return head, self._tree(head)

    def _tree(self, commit: str) -> dict[str, str]:
        from huggingface_hub.hf_api import RepoFile

        found = patiently(lambda: list(self.api.list_repo_tree(self.target.name, revision=commit, recursive=True)))
        files = [entry for entry in found if isinstance(entry, RepoFile)]
        return {file.path: file.lfs.sha256 if file.lfs is not None else file.blob_id for file in files}

    def _arrived(self) -> str | None:
        """The branch's commit, if a commit whose answer got lost is there after all."""
        head, there = self._look()
        if head == self.head:
            self.asked = False  # it didn't, and we know
            return None
        return head if not _differing(there, self.items) and not _stale(there, self.items) else None

    def _check(self) -> None:
        """Hold what the Hub says it has to what is here."""
        wrong = _differing(self._tree(self.commit), self.items)
        if wrong:
            raise HubError(
                f"{wrong[0]} on the Hub isn't what is here (nor are {len(wrong) - 1} more): was the folder changed "
                "meanwhile? run the same command again"
            )

    def _url(self, commit: str) -> str:
        return f"{self.api.endpoint}/{self.target.name}/tree/{commit}"


def _differing(there: Mapping[str, str], items: Sequence[Item]) -> list[str]:
    """Paths whose content on the Hub isn't the one here, or that aren't there."""
    return [item.path for item in items if not _same(item, there.get(item.path))]


def _same(item: Item, found: str | None) -> bool:
    """Whether the Hub's name for a file's content is this one's: its sha256, or git's hash of plain files."""
    if found is None or len(found) != GIT_HASH:
        return found == item.sha256
    data = item.data()
    return found == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _stale(there: Mapping[str, str], items: Sequence[Item]) -> list[str]:
    """Files of weights in the repository's root that aren't among those that go."""
    going = {item.path for item in items}
    return sorted(path for path in there if path.endswith(".safetensors") and "/" not in path and path not in going)
