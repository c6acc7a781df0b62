"""A fingerprint changes with what a measurement depends on, with nothing else, and is read once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from llmshrink_eval import fingerprint
from llmshrink_eval.errors import EvalError
from llmshrink_eval.fingerprint import fingerprint_folder


@pytest.fixture
def folder(model_of: Callable[..., Path], tmp_path: Path) -> Path:
    copy = shutil.copytree(model_of("llama"), tmp_path / "model")
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    return copy


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read; files count as settled at once."""
    names: list[str] = []
    real = hashlib.file_digest

    def note(stream: object, algorithm: str) -> object:
        names.append(Path(stream.name).name)  # type: ignore[attr-defined]
        return real(stream, algorithm)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", note)
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -1)
    return names


def test_the_digest_is_that_of_sha256sum(folder: Path, cache: Path) -> None:
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    lines = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    assert fingerprint_folder(folder, cache) == hashlib.sha256(lines.encode()).hexdigest()


def test_the_second_time_reads_nothing(folder: Path, cache: Path, hashed: list[str]) -> None:
    first = fingerprint_folder(folder, cache)
    assert len(hashed) == 5
    assert fingerprint_folder(folder, cache) == first
    assert len(hashed) == 5


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "modeling_own.py"])
def test_every_byte_that_matters_changes_it(name: str, folder: Path, cache: Path, hashed: list[str]) -> None:
    (folder / "modeling_own.py").write_text("X = 1\n")
    before = fingerprint_folder(folder, cache)
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    os.utime(folder / name, (1, 1))  # size, inode and modification time as before
    assert fingerprint_folder(folder, cache) != before


def test_names_and_reports_do_not_change_it(folder: Path, cache: Path) -> None:
    before = fingerprint_folder(folder, cache)
    (folder / "README.md").write_text("other words")
    (folder / "llmshrink.json").write_text("{}")
    assert fingerprint_folder(folder.rename(folder.with_name("renamed")), cache) == before


def test_links_into_the_hubs_cache_share_what_was_read(folder: Path, cache: Path, hashed: list[str]) -> None:
    plain = fingerprint_folder(folder, cache)
    del hashed[:]
    snapshot = folder.with_name("snapshot")
    snapshot.mkdir()
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert fingerprint_folder(snapshot, cache) == plain
    assert hashed == []


def test_a_file_written_a_moment_ago_is_not_remembered(folder: Path, cache: Path) -> None:
    fingerprint_folder(folder, cache)  # made by the fixture: its change time is now
    assert not cache.exists()


def test_a_damaged_memory_is_read_over(folder: Path, cache: Path, hashed: list[str]) -> None:
    first = fingerprint_folder(folder, cache)
    for memo in (cache / "digests").iterdir():
        memo.write_text('{"sha256": "0"')
    assert fingerprint_folder(folder, cache) == first
    assert len(hashed) == 10


def test_a_cache_that_cannot_be_written_is_named(folder: Path, cache: Path, hashed: list[str]) -> None:
    cache.write_text("a file")
    with pytest.raises(EvalError, match="choose another folder for the cache"):
        fingerprint_folder(folder, cache)


@pytest.mark.parametrize("path", ["../other.safetensors", "/etc/passwd", "a/../../b", "C:\\x", ""])
def test_an_index_that_leaves_the_folder_is_refused(path: str, folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": path}}))
    with pytest.raises(EvalError, match="outside the model's folder: refused"):
        fingerprint_folder(folder, cache)


def test_a_missing_shard_is_named(folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "shard.safetensors"}}))
    with pytest.raises(EvalError, match=r"shard.safetensors: missing"):
        fingerprint_folder(folder, cache)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_bad_input(name: str, folder: Path, cache: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(EvalError, match=f"no {name}"):
        fingerprint_folder(folder, cache)


def test_a_file_that_changes_while_it_is_read_is_refused(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = hashlib.file_digest

    def meanwhile(stream: object, algorithm: str) -> object:
        found = real(stream, algorithm)  # type: ignore[arg-type]
        with open(stream.name, "ab") as other:  # type: ignore[attr-defined]
            other.write(b"more")
        return found

    monkeypatch.setattr(hashlib, "file_digest", meanwhile)
    with pytest.raises(EvalError, match="was written while it was read"):
        fingerprint_folder(folder, cache)
