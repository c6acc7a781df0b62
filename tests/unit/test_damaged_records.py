"""Records of ours that were damaged: measured again, made again, or one line with the file; never a traceback."""

from __future__ import annotations

import errno
import json
import shutil
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

import llmshrink
from llmshrink.checkpoint.files import read_weight_map
from llmshrink.distillation.cache import _read_manifest
from llmshrink.errors import CheckpointError, LlmshrinkError, OutputError, SourceError
from llmshrink.evaluation.verbs import _refuse_foreign_results
from llmshrink.run.card import beyond
from llmshrink.run.journal import Part, _follows, _line, _read_lines
from llmshrink.run.output import RECORD
from llmshrink.run.report import rows_of
from llmshrink.run.seal import SEAL, read_seal
from llmshrink.run.strangers import strangers
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


# Lines whose checksum is right, and that no run wrote.

HEAD = {"identity": {"a": 1}, "kept": 0, "sources": {}}
OUTSIDE = {"name": "outside", "shards": {}, "rows": []}
LINES: list[Any] = [
    {**OUTSIDE, "name": 3},
    {**OUTSIDE, "name": "\ud800"},
    {**OUTSIDE, "shards": {"a": 7}},
    {**OUTSIDE, "shards": {"../a": {"sha256": "", "bytes": 1}}},
    {**OUTSIDE, "shards": {"a": {"sha256": "", "bytes": -1}}},
    {**OUTSIDE, "rows": [1]},
    {**OUTSIDE, "name": "block 0", "rows": [{"name": "q"}]},
    {"sources": None},
    {"sources": {"model": {"folder": "m", "files": "x", "sums": {}}}},
    {"sources": {"model": {"folder": "m", "files": {}, "sums": {"a": None}}}},
    *([], None, 1, "x"),
]


@pytest.mark.parametrize("line", LINES, ids=repr)
def test_a_line_of_a_journal_that_no_run_writes_ends_it(line: Any, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text("\n".join(map(_line, [HEAD, OUTSIDE, line, OUTSIDE])) + "\n")
    assert _read_lines(path) == [HEAD, OUTSIDE]
    path.write_text(_line(line) + "\n")
    with pytest.raises(OutputError, match="is damaged, so that its run can't go on"):
        _read_lines(path)


def test_parts_that_do_not_follow_each_other_are_made_again() -> None:
    def part(name: str) -> Part:
        return Part(name, {}, [])

    outside = [part("outside")]
    assert _follows(part("outside"), []) and _follows(part("analysis"), outside) and _follows(part("block 0"), outside)
    assert not _follows(part("block 0"), [])
    assert not _follows(part("block 1"), outside)
    assert not _follows(part("outside"), outside)
    assert not _follows(part("analysis"), [*outside, part("block 0")])


RECORD_FIELDS: dict[str, tuple[Any, ...]] = {
    "model": (None, 1, []),
    "recipe": (None, {}),
    "blocks": ("2", -1, None, 1.5),
    "quality": ({}, None, {"tokens": "many"}),
    "identity": ({}, {"dtype": "torch.float32"}, []),
    "notes": ([1], "x", None),
    "kv_cache": ({"a": [1]}, [1], {"a": ["x", "y"]}),
    "shards": ({"../a": "b"}, {"a": 1}, []),
    "files": ("x", [1]),
    "sites": (None, [1], [{}]),
    "serve_tp": (0, "1", None),
    "distill": ([], {"teacher": "t"}),
}


@pytest.mark.parametrize("field", RECORD_FIELDS)
def test_a_field_of_a_record_that_no_run_writes_is_one_line(field: str, made: Path, tmp_path: Path) -> None:
    whole = json.loads((made / RECORD).read_text())
    assert read_record(made) == whole
    (tmp_path / "config.json").write_bytes((made / "config.json").read_bytes())
    for value in RECORD_FIELDS[field]:
        (tmp_path / RECORD).write_text(json.dumps({**whole, field: value}))
        with pytest.raises(SourceError, match=r"no readable llmshrink\.json there"):
            read_record(tmp_path)


def test_rounded_inputs_of_a_kind_that_there_is_none_of_are_no_record(made: Path) -> None:
    row = json.loads((made / RECORD).read_text())["sites"][0]
    assert rows_of([row]) and rows_of([{**row, "activations": "int8"}])
    for changed in ({"activations": "../x"}, {"bytes": -5}, {"shape": [3, -1]}):
        with pytest.raises(ValueError, match="not what a run writes"):
            rows_of([{**row, **changed}])


def test_a_seal_of_other_types_is_none(made: Path, tmp_path: Path) -> None:
    whole = json.loads((made / SEAL).read_text())
    (tmp_path / SEAL).parent.mkdir()
    for changed in ({"by": 3}, {"with": {"device": -0.5}}, {"positions": "x"}, {"tolerance": None}, {"files": [1]}):
        (tmp_path / SEAL).write_text(json.dumps({**whole, **changed}))
        assert read_seal(tmp_path) is None
    (tmp_path / SEAL).write_text(json.dumps(whole))
    assert read_seal(tmp_path) == whole


def test_a_seal_that_the_system_does_not_tell_is_no_absent_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_seal(tmp_path) is None

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("llmshrink.run.seal.read_json", refused)
    with pytest.raises(OSError, match="Too many"):
        read_seal(tmp_path)


def test_a_card_that_is_not_text_was_edited_by_somebody(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "made")
    assert beyond(folder) is not None
    (folder / "README.md").write_bytes((folder / "README.md").read_bytes() + b"\xff")
    assert beyond(folder) is None


@pytest.fixture(scope="module")
def made(model_of: Callable[..., Path], story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    llmshrink.quantize(model_of(), output=out, calibration=story, samples=2, seq_len=32, group_size=32)
    return out
