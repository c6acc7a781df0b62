from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from llmshrink.calibration.text import PIECE_CHARACTERS, Completion, load_documents
from llmshrink.errors import CalibrationError


def test_a_txt_is_one_document_taken_as_it_is(tmp_path: Path) -> None:
    content = "  \r\nfirst\r\n" + "é" * (2 * PIECE_CHARACTERS) + "\n\n "
    (tmp_path / "notes.txt").write_bytes(content.encode())
    documents = load_documents(str(tmp_path / "notes.txt"))
    assert documents.single
    assert documents.name == "notes.txt"
    assert "".join(str(piece) for piece in documents.stream(0)) == content


def test_a_txt_is_read_no_further_than_used(tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_bytes(b"a" * (4 * PIECE_CHARACTERS) + b"\xff")
    pieces = load_documents(str(tmp_path / "big.txt")).stream(0)
    assert next(pieces) == "a" * PIECE_CHARACTERS
    with pytest.raises(CalibrationError, match=r"not UTF-8 text .* save it as UTF-8"):
        list(pieces)


def _records(path: Path, number: int) -> list[str]:
    texts = [f"document {index}" for index in range(number)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in texts) + "\n\n")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
    return texts


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_records_are_shuffled_by_the_seed_and_none_is_lost(tmp_path: Path, name: str) -> None:
    texts = _records(tmp_path / name, 40)
    documents = load_documents(str(tmp_path / name))
    first = list(documents.stream(1))
    assert first == list(documents.stream(1))
    assert first != list(documents.stream(2))
    assert first != texts
    assert sorted(map(str, first)) == sorted(texts)


def test_messages_come_before_text_in_a_record(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "t", "messages": messages}))
    assert list(load_documents(str(tmp_path / "a.jsonl")).stream(0)) == [messages]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'\n{"text": "x"}\n{broken', r"line 3 isn't JSON"),
        ("a.jsonl", b'{"body": "x"}', r"line 1 has \['body'\]; read are a string under text, .* rename the key"),
        ("a.jsonl", b"[1]", "has list; read are"),
        ("a.jsonl", b"[" * 100_000, "line 1 isn't JSON"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "x"}]}\n' * 2 + b'{"messages": [{"rol": "user"}]}',
            r"line 3 has a message without role \(messages\[0\] has \['rol'\]\); a message is",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": null}]}',
            r"line 1 has a message without content \(messages\[1\] has \['content', 'role'\]\)",
        ),
        ("a.parquet", b"no", "not a parquet file"),
    ],
)
def test_a_broken_record_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=says):
        list(load_documents(str(tmp_path / name)).stream(0))


def test_a_message_may_hold_parts_or_call_tools(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [parts, call]}))
    assert list(load_documents(str(tmp_path / "a.jsonl")).stream(0)) == [[parts, call]]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (
            {"body": ["x"]},
            r"has the columns \['body'\], none of them text, .*; rename the one .* or give --calibration",
        ),
        ({"messages": [[{"from": "user", "value": "x"}]]}, "a record of row group 0 has a message without role"),
    ],
)
def test_a_parquet_file_of_other_columns_is_named_with_the_way_out(
    columns: dict[str, list[object]], says: str, tmp_path: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(CalibrationError, match=says):
        list(load_documents(str(tmp_path / "a.parquet")).stream(0))


def test_a_file_that_is_not_there_or_not_read_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    for spec, says in (("missing.txt", "no such file"), (str(tmp_path / "a.csv"), "only .txt, .jsonl and .parquet")):
        with pytest.raises(CalibrationError, match=says):
            load_documents(spec)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CalibrationError, match=r"calibration data .*nothing can't be read \(.*; give --calibration"):
        next(load_documents(str(tmp_path / "nothing")).stream(0))


def test_the_default_depends_on_the_kind_of_model() -> None:
    assert load_documents(None, source_kind="demo").name == "demo"
    assert "fineweb-edu" in load_documents(None, source_kind="folder").name
    assert load_documents("demo", source_kind="hub").name == "demo"
    assert len(list(itertools.islice(load_documents("demo").stream(0), 3))) == 3


@pytest.mark.parametrize("spec", [None, "some/dataset:config:train"])
def test_offline_a_data_set_is_one_line_with_the_other_ways(monkeypatch: pytest.MonkeyPatch, spec: str | None) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError) as caught:
        next(load_documents(spec).stream(0))
    message = str(caught.value)
    assert "\n" not in message
    assert "--calibration FILE.txt, .jsonl or .parquet, or --calibration demo" in message


def test_a_stream_that_breaks_later_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def shuffle(self, **_: object) -> Broken:
            return self

        def __iter__(self) -> itertools.chain[dict[str, str]]:
            def fail() -> dict[str, str]:
                raise ConnectionError("gone\nfor good")

            return itertools.chain([{"content": "one"}], (fail() for _ in range(1)))

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Broken())
    stream = load_documents("some/dataset").stream(0)
    assert next(stream) == "one"
    with pytest.raises(CalibrationError, match=r"can't be fetched \(ConnectionError: gone\)"):
        next(stream)


PAIRS = [{"prompt": f"Q{i}", "completion": f"A{i}"} for i in range(3)]
TALKS = [
    {"prompt": [{"role": "user", "content": f"Q{i}"}], "completion": [{"role": "assistant", "content": f"A{i}"}]}
    for i in range(3)
]


@pytest.mark.parametrize("records", [PAIRS, TALKS])
@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet", "folder", "saved", "saved:default:train"])
def test_prompts_with_completions_are_read_from_files_and_folders(
    records: list[dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    import datasets

    kept, spec = datasets.Dataset.from_list(records), str(tmp_path / kind)
    if kind == "a.parquet":
        kept.to_parquet(spec)
    elif kind.startswith("saved"):
        whole = datasets.DatasetDict(train=kept) if ":" in kind else kept
        whole.save_to_disk(tmp_path / "saved")
    else:
        (tmp_path / "folder").mkdir()
        path = tmp_path / "folder" / "train.jsonl" if kind == "folder" else tmp_path / kind
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    documents = load_documents(spec)
    assert str(tmp_path) not in documents.name
    found = list(documents.stream(0))
    assert sorted(found, key=repr) == [Completion(record["prompt"], record["completion"]) for record in records]
    assert found == list(documents.stream(0))


def test_text_comes_before_a_prompt_with_its_completion(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Q", "completion": "A", "text": "T"}))
    assert list(load_documents(str(tmp_path / "a.jsonl")).stream(0)) == ["T"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Q"}))
    with pytest.raises(CalibrationError, match=r"line 1 has \['prompt'\]; read are .* both of prompt and completion"):
        list(load_documents(str(tmp_path / "a.jsonl")).stream(0))
