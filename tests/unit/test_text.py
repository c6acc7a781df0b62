from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from llmshrink.calibration.text import PIECE_CHARACTERS, Completion, Document, Record, load_documents
from llmshrink.errors import CalibrationError


def read(spec: str | Path, seed: int = 0) -> list[Document | None]:
    return [record.document for record in load_documents(str(spec)).stream(seed)]


def test_a_txt_is_one_document_taken_as_it_is(tmp_path: Path) -> None:
    content = "  \r\nfirst\r\n" + "é" * (2 * PIECE_CHARACTERS) + "\n\n "
    (tmp_path / "notes.txt").write_bytes(content.encode())
    documents = load_documents(str(tmp_path / "notes.txt"))
    assert documents.single
    assert documents.name == "notes.txt"
    assert "".join(str(piece.document) for piece in documents.stream(0)) == content


def test_a_txt_is_read_no_further_than_used(tmp_path: Path) -> None:
    (tmp_path / "big.txt").write_bytes(b"a" * (4 * PIECE_CHARACTERS) + b"\xff")
    pieces = load_documents(str(tmp_path / "big.txt")).stream(0)
    assert next(pieces).document == "a" * PIECE_CHARACTERS
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
    first = read(tmp_path / name, 1)
    assert first == read(tmp_path / name, 1)
    assert first != read(tmp_path / name, 2)
    assert first != texts
    assert sorted(map(str, first)) == sorted(texts)


def test_messages_come_before_text_in_a_record(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "t", "messages": messages}))
    assert read(tmp_path / "a.jsonl") == [messages]


GOOD = b'{"text": "fine"}'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{broken", "isn't JSON (Expecting property name enclosed in double quotes"),
        (b"[" * 100_000, "is nested more than 100 deep"),
        (b'{"text": "\xff"}', "isn't UTF-8 (invalid start byte at its byte 10)"),
        (b'{"body": "x"}', "has ['body']; read are a string under text"),
        (b'{"prompt": "Q"}', "has ['prompt']; read are a string under text"),
        (b"[1]", "is a list, not an object with a text or messages"),
        (b'{"text": null}', "has text that is null"),
        (b'{"text": 5}', "has text that is a number, not a string"),
        (b'{"text": NaN}', "has text that is a number, not a string"),
        (b'{"text": {"a": 1}}', "has text that is an object, not a string"),
        (b'{"messages": "hello"}', "has messages that aren't a list of objects (a string)"),
        (b'{"messages": [null]}', "has messages that aren't a list of objects (a list with something else in it)"),
        (b'{"messages": []}', "has messages that are none"),
        (
            b'{"messages": [{"role": "user", "content": "x", "deep": ' + b"[" * 900 + b"]" * 900 + b"}]}",
            "is nested more than 100 deep",
        ),
        (b'{"text": "cut \\ud83d"}', r"text has half of a surrogate pair ('\ud83d'), which is no character"),
        (b'{"prompt": "a\\ud83d", "completion": "b"}', "prompt has half of a surrogate pair"),
        (
            b'{"messages": [{"role": "user", "content": "a\\udc00"}]}',
            "messages[0].content has half of a surrogate pair",
        ),
        (
            b'{"messages": [{"role": "a", "tool_calls": [{"function": {"arguments": "\\udc00"}}]}]}',
            "messages[0].tool_calls[0].function.arguments has half of a surrogate pair",
        ),
        (b'{"messages": [{"rol": "user"}]}', "has a message without role (messages[0] has ['rol']); a message is"),
        (
            b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": null}]}',
            "has a message without content (messages[1] has ['role'])",
        ),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
            "has a part of image_url in messages[0], which is no text",
        ),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": "look"}', "has tools that are neither a list nor"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": ["look"]}', "has tools that aren't a list of obj"),
    ],
)
def test_a_record_that_cannot_be_used_says_why_with_its_line(tmp_path: Path, line: bytes, says: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([GOOD, b"", line, GOOD]))
    records = sorted(load_documents(str(tmp_path / "a.jsonl")).stream(0), key=lambda record: record.place)
    assert [record.document for record in records] == ["fine", None, "fine"]
    assert [record.place for record in records] == ["line 1", "line 3", "line 4"]
    assert records[1].fault.startswith(says)
    assert "\n" not in records[1].fault


def test_empty_messages_beside_a_text_are_absent(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine", "messages": []}\n')
    assert read(tmp_path / "a.jsonl") == ["fine"]


def test_a_value_of_parquet_that_python_cant_hold_leaves_its_record_out(tmp_path: Path) -> None:
    import pyarrow

    far = pyarrow.array([{"at": 10**15, "role": "user", "content": "x"}], pyarrow.struct(
        [("at", pyarrow.timestamp("s")), ("role", pyarrow.string()), ("content", pyarrow.string())]
    ))  # fmt: skip
    near = pyarrow.array([{"at": 5, "role": "user", "content": "x"}], far.type)
    lists = [pyarrow.ListArray.from_arrays(pyarrow.array([0, 1]), values) for values in (far, near)]
    file = write_parquet(tmp_path / "a.parquet", {"messages": pyarrow.chunked_array(lists)})
    records = sorted(load_documents(str(file)).stream(0), key=lambda record: record.place)
    assert [record.document is None for record in records] == [True, False]
    assert records[0].fault.startswith("has a value that Python can't hold")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(CalibrationError, match="not a parquet file"):
        read(tmp_path / "a.parquet")


def write_parquet(path: Path, columns: dict[str, Any], **more: Any) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, **more)
    return path


CALL = {"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def test_null_is_absent_at_any_depth(tmp_path: Path) -> None:
    full = [
        {"role": "user", "content": "hi", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": None}]},
    ]
    plain = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [CALL]}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": full, "text": None, "tools": None}))
    path = write_parquet(tmp_path / "a.parquet", {"messages": [full], "text": [None], "tools": [None]})
    for found in (load_documents(str(tmp_path / "a.jsonl")).stream(0), load_documents(str(path)).stream(0)):
        records = list(found)
        assert [record.document for record in records] == [plain] and records[0].tools == ()
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": None, "text": "told"}))
    assert read(tmp_path / "b.jsonl") == ["told"]


def test_the_texts_of_content_in_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "input_text", "text": "two"}, "!"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    assert read(tmp_path / "a.jsonl") == [[{"role": "user", "content": "one two!"}]]


@pytest.mark.parametrize("given", [[TOOL], json.dumps([TOOL]), [{**TOOL, "strict": None}]])
def test_tools_go_with_the_conversation(given: object, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}], "tools": given}))
    assert [record.tools for record in load_documents(str(tmp_path / "a.jsonl")).stream(0)] == [(TOOL,)]


def test_a_row_of_parquet_is_named_by_its_number(tmp_path: Path) -> None:
    texts = [None if number == 17 else f"document {number}" for number in range(40)]
    path = write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=7)
    bad = [record for record in load_documents(str(path)).stream(3) if record.document is None]
    assert bad == [Record(None, "row 18", "has text that is null")]


def test_a_row_of_parquet_that_is_no_text_is_left_out_alone(tmp_path: Path) -> None:
    import pyarrow

    raw = pyarrow.array([b"one", b"tw\xff", b"three"], pyarrow.binary()).view(pyarrow.string())
    path = write_parquet(tmp_path / "a.parquet", {"text": raw})
    records = sorted(load_documents(str(path)).stream(0), key=lambda record: record.place)
    assert [record.document for record in records] == ["one", None, "three"]
    assert records[1].fault == "isn't UTF-8 (invalid start byte at byte 2)"


@pytest.mark.parametrize("columns", [{"body": ["x"]}, {"prompt": ["x"], "tools": ["y"]}])
def test_a_parquet_file_of_other_columns_is_named_with_the_way_out(columns: dict[str, Any], tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(CalibrationError, match=r"has the columns \['.*\], none of them .* or give --calibration"):
        read(path)


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
    assert next(stream).document == "one"
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
    assert str(tmp_path) not in load_documents(spec).name
    found = read(spec)
    assert sorted(found, key=repr) == [Completion(record["prompt"], record["completion"]) for record in records]
    assert found == read(spec)


def test_text_comes_before_a_prompt_with_its_completion(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Q", "completion": "A", "text": "T"}))
    assert read(tmp_path / "a.jsonl") == ["T"]


def records_of(spec: Path | str, seed: int = 0) -> list[Record]:
    return list(load_documents(str(spec)).stream(seed))


def test_one_bad_line_of_a_folder_is_left_out_with_its_file_and_line(tmp_path: Path) -> None:
    for part in "ab":
        lines = [json.dumps({"text": f"{part}{i}"}) for i in range(5)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    with (tmp_path / "b.jsonl").open("ab") as file:
        file.write(b'\n{"text": "cut\n{"text": "\xff"}\n')
    found = records_of(tmp_path)
    good = [record.document for record in found if record.document is not None]
    assert sorted(map(str, good)) == [f"{part}{i}" for part in "ab" for i in range(5)] != good
    bad = sorted(f"{record.place} {record.fault}" for record in found if record.document is None)
    assert [said.partition(" (")[0] for said in bad] == ["b.jsonl, line 7 isn't JSON", "b.jsonl, line 8 isn't UTF-8"]
    assert found == records_of(tmp_path) != records_of(tmp_path, 1)


@pytest.mark.parametrize("kind", ["parquet", "saved", "saved:default:test"])
def test_one_bad_row_of_a_folder_is_left_out_with_its_place(kind: str, tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    bytes_of = [b"one", b"two", b"\xff", b"four"]
    table = pyarrow.table({"text": pyarrow.array(bytes_of).cast("string", safe=False), "number": [1, 2, 3, 4]})
    if kind == "parquet":
        (tmp_path / "saved").mkdir()
        for name in ("a", "b"):
            pyarrow.parquet.write_table(table, tmp_path / "saved" / f"{name}.parquet", row_group_size=2)
    else:
        whole = datasets.Dataset(datasets.table.InMemoryTable(table))
        (datasets.DatasetDict(test=whole) if ":" in kind else whole).save_to_disk(tmp_path / "saved")
    found = records_of(tmp_path / kind.replace("parquet", "saved"))
    places = ["a.parquet, row 3", "b.parquet, row 3"] if kind == "parquet" else ["row 3"]
    assert sorted(record.place for record in found if record.document is None) == places
    assert {record.document for record in found} == {"one", "two", "four", None}
    assert len(found) == 4 * len(places)


def test_what_a_folder_of_another_kind_or_without_such_a_split_says(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nno comma\n")
    assert [record.document for record in records_of(tmp_path)] == ["no comma"]
    with pytest.raises(CalibrationError, match=rf"has no split dev; there are: train: give {tmp_path}::train$"):
        records_of(f"{tmp_path}::dev")
