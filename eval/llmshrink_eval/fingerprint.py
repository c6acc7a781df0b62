"""What a model is, as one sha256: the content of its weights, its config and its tokenizer, whatever it is called.

Results are cached under it, so it must change when anything that a measurement depends on does, and with nothing else:
not with the folder's name, a README, or a report that lies beside the weights. The digest is taken over the sorted
lines `<sha256 of the file>  <name>`, and a `sha256sum` of the same files can check it by hand.

Hashing reads everything, which for a large model takes as long as loading it. So each file's digest is kept in the
cache under what changes when the file does (resolved path, size, modification and change time, inode); links are
resolved, so two snapshots of the Hub's cache share what they share. A file that was touched less than two seconds ago
is hashed but not remembered: it could be written again within the clock's tick, and nobody would see it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path

from llmshrink_eval.bounded import read_json
from llmshrink_eval.errors import EvalError
from llmshrink_eval.listing import named
from llmshrink_eval.refused import UNREAD, refused
from llmshrink_eval.weightfiles import INDEX_FILE, weight_files

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    INDEX_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.py",
)
"""Beside the weights, what a model's outputs depend on. Python files are the model itself, where it brings its own."""

SETTLED_NS = 2_000_000_000
_DIGEST = re.compile(r"[0-9a-f]{64}")


def fingerprint_folder(folder: Path, cache_dir: Path) -> str:
    """sha256, as 64 hexadecimal digits, of the model in `folder`; instant the second time.

    cache_dir: where digests are remembered; made when absent. Raises EvalError when there is no model, when its index
    names a path outside the folder, when a file can't be read or changes while it is, or when the cache can't be
    written.
    """
    if not (folder / "config.json").is_file():
        raise EvalError(f"{folder}: no config.json; name a folder that holds a model")
    weights = weight_files(folder)
    beside = {file for file in named(folder, *SIDE_FILES) if file.is_file()}
    digest = hashlib.sha256()
    for file in sorted({*weights, *beside}):
        digest.update(f"{file_digest(file, cache_dir)}  {file.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def file_digest(file: Path, cache_dir: Path) -> str:
    """sha256 of one file's content, as 64 hexadecimal digits, remembered in `cache_dir`. Raises EvalError."""
    try:
        real = file.resolve(strict=True)
        before = _state(real)
        memo = cache_dir / "digests" / f"{hashlib.sha256(json.dumps(before).encode()).hexdigest()}.json"
        known = _recall(memo, before)
        if known is not None:
            return known
        with real.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        changed = _state(real) != before
    except OSError as error:
        raise EvalError(f"{file}: can't be read: {refused(error, UNREAD)}") from error
    if changed:
        raise EvalError(f"{file}: was written while it was read; run again when whoever writes it has finished")
    if time.time_ns() - max(before[2], before[3]) > SETTLED_NS:
        _remember(memo, before, found)
    return found


def _state(real: Path) -> tuple[str, int, int, int, int, int]:
    """What tells a file from its changed self without reading it."""
    found = real.stat()
    return (os.fspath(real), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino)


def _recall(memo: Path, state: tuple[object, ...]) -> str | None:
    """The remembered digest, or None. A damaged memory is none: the file is read again."""
    try:
        said = read_json(memo)
        if said["file"] == list(state) and _DIGEST.fullmatch(said["sha256"]):
            return str(said["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _remember(memo: Path, state: tuple[object, ...], digest: str) -> None:
    """Write a memory whole or not at all, under a name of its own first: another run may be writing the same."""
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=memo.parent, suffix=".part", delete=False) as unfinished:
            unfinished.write(json.dumps({"file": state, "sha256": digest}).encode())
        os.replace(unfinished.name, memo)
    except OSError as error:
        raise EvalError(
            f"{memo.parent}: can't be written: {refused(error, 'choose another folder for the cache')}"
        ) from error
