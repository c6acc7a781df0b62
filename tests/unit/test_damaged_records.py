"""Records of ours that were damaged: measured again, made again, or one line with the file; never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmshrink_eval.cache import Cache
from llmshrink_eval.errors import EvalError
from llmshrink_eval.taskset import _check_examples

from llmshrink.checkpoint.files import read_weight_map
from llmshrink.distillation.cache import _read_manifest
from llmshrink.errors import CheckpointError, LlmshrinkError, OutputError, SourceError
from llmshrink.evaluation.verbs import _refuse_foreign_results
from llmshrink.run.output import RECORD, strangers
from llmshrink.run.seal import SEAL, read_seal
from llmshrink.run.verify import read_record

DAMAGED = {
    "empty": b"",
    "cut": b'{"sha256": "ab", "value": {"a"',
    "nested": b"[" * 100_000,
    "deep": b'{"value": ' * 400 + b"1" + b"}" * 400,
    "not UTF-8": b'{"value": "\xff"}',
    "zeros": b"\0" * 512,
    "digits": b'{"value": ' + b"9" * 5000 + b"}",
    "list": b"[1, 2]",
    "number": b"1",
    "null": b"null",
    "other": b'{"value": {}, "sha256": [], "key": {}, "files": 3, "weight_map": []}',
}


def cached(folder: Path, text: bytes) -> object:
    cache = Cache(folder)
    cache.put("part", {"a": 1}, {"b": 2})
    assert cache.get("part", {"a": 1}) == {"b": 2}
    (file,) = (folder / "part").iterdir()
    file.write_bytes(text)
    return cache.get("part", {"a": 1})


def seal(folder: Path, text: bytes) -> object:
    (folder / SEAL).parent.mkdir()
    (folder / SEAL).write_bytes(text)
    return read_seal(folder)


def record(folder: Path, text: bytes) -> object:
    (folder / RECORD).write_bytes(text)
    with pytest.raises(SourceError, match=r"no readable llmshrink\.json there"):
        read_record(folder)
    assert strangers(folder) == []  # a damaged record names nothing, and stands for itself
    return None


def index(folder: Path, text: bytes) -> object:
    (folder / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"index\.json: broken index: no weight_map to read"):
        read_weight_map(folder / "model.safetensors.index.json")
    return None


def manifest(folder: Path, text: bytes) -> object:
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(LlmshrinkError, match="isn't a teacher's cache"):
        _read_manifest(folder)
    return None


def report(folder: Path, text: bytes) -> object:
    (folder / "results.json").write_bytes(text)
    with pytest.raises(OutputError, match="no report of llmshrink's"):
        _refuse_foreign_results(folder / "results.json")
    return None


READERS: list[Callable[[Path, bytes], object]] = [cached, seal, record, index, manifest, report]


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_record_is_absent_or_a_line(damage: str, read: Callable[[Path, bytes], Any], tmp_path: Path) -> None:
    assert read(tmp_path, DAMAGED[damage]) is None


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.sampled_from(range(len(READERS))), st.binary(max_size=30), st.integers(0, 60), st.integers(0, 255))
def test_whatever_is_in_it(
    tmp_path_factory: pytest.TempPathFactory, number: int, text: bytes, place: int, byte: int
) -> None:
    whole = json.dumps({"key": {"a": 1}, "sha256": "00", "value": {"b": 2}, "weight_map": {}}).encode()
    for damaged in (text, whole[:place] + bytes([byte]) + whole[place + 1 :], whole[:place]):
        assert READERS[number](tmp_path_factory.mktemp("record"), damaged) is None


def task(pool: int, wanted: int, *, same: bool = True, kind: str = "ContextSampler") -> Any:
    config = SimpleNamespace(test_split="test", validation_split=None, fewshot_split="test" if same else "train")
    sampler = type(kind, (), {"df": list(range(pool))})()
    return SimpleNamespace(config=config, sampler=sampler, get_config=lambda name: wanted)


def test_more_examples_than_a_task_has_are_refused() -> None:
    _check_examples("facts", task(10, 9))
    _check_examples("facts", task(10, 10, same=False))
    _check_examples("facts", task(10, 10, kind="FirstNSampler"))
    with pytest.raises(EvalError, match="--num-fewshot 10: task facts has 9 examples to draw from; give at most that"):
        _check_examples("facts", task(10, 10))
    with pytest.raises(EvalError, match="task facts has 10 examples"):
        _check_examples("facts", task(10, 1000, same=False))
