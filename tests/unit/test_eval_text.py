"""Where the scored text comes from: as it is, in order, or one line that says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llmshrink_eval.errors import EvalError
from llmshrink_eval.text import load_text

TEXTS = ["first\r\n", "", "  third é "]


def write(path: Path, texts: list[str], key: str = "text") -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps({"id": 1, key: text}) for text in texts))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"id": [1] * len(texts), key: texts}), path, row_group_size=2)
    return path


def test_a_txt_is_one_document_as_it_is(tmp_path: Path) -> None:
    content = "\ufeff \r\nfirst\r\n\n\nsecond é\n "
    (tmp_path / "a.txt").write_bytes(content.encode())
    text = load_text(str(tmp_path / "a.txt"))
    assert text.documents == (content,)
    assert text.name == "a.txt"


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("key", ["text", "content"])
def test_records_keep_their_order_and_empty_ones_stay(tmp_path: Path, name: str, key: str) -> None:
    path = write(tmp_path / name, TEXTS, key)
    assert load_text(str(path)).documents == tuple(TEXTS)
    assert load_text(str(path), limit_documents=2).documents == tuple(TEXTS[:2])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", r"a\.txt: holds no text \(1 records\)"),
        ("a.txt", b"abc\xff", r"not UTF-8 text \(invalid start byte at byte 3\); save it as UTF-8"),
        ("a.jsonl", b"{}", r"holds no text \(none of 1 records can be used: line 1 .* there are: none\)"),
        ("a.jsonl", b"[1]", "line 1 is a list"),
        ("a.jsonl", b'{"text": ""}\n\n', r"holds no text \(1 records\)"),
        ("a.jsonl", b"", r"holds no text \(0 records\)"),
        ("a.parquet", b"no", "not a parquet file"),
        ("a.csv", b"x", "only .txt, .jsonl and .parquet files are read"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvalError, match=says) as caught:
        load_text(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "\xff"}', "isn't UTF-8 (invalid start byte at its byte 10)"),
        (
            b"{broken",
            "isn't JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); one obj",
        ),
        (b'{"body": "x", "id": 1}', "has no column text or content; there are: body, id"),
        (b'{"text": 3}', "has text that is a int, not a string"),
        (b'{"text": null}', "has text that is null"),
        (b'{"text": "cut \\ud83d"}', r"text has half of a surrogate pair ('\ud83d'), which is no character"),
    ],
)
def test_a_record_without_text_is_left_out_and_named(tmp_path: Path, line: bytes, says: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}')
    text = load_text(str(tmp_path / "a.jsonl"))
    assert text.documents == ("a", "b")
    assert (text.left_out.count, text.left_out.read) == (1, 3)
    assert text.left_out.named[0].startswith(f"line 3 {says}")
    assert text.left_out.words().startswith("1 of 3 records was left out: line 3 ")


def test_a_file_that_holds_nothing_of_use_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 1200 + '{"text": "at last"}')
    with pytest.raises(
        EvalError, match=r"none of 1,000 records can be used: line 1 .* and 997 more; no more were read"
    ):
        load_text(str(tmp_path / "a.jsonl"))


def test_a_parquet_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["x"], "body")
    with pytest.raises(EvalError, match="has no column text or content; there are: body, id"):
        load_text(str(path))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"no such file; give --text FILE\.txt"):
        load_text(str(tmp_path / "missing.txt"))
    with pytest.raises(EvalError, match="is a folder"):
        load_text(str(tmp_path))


def test_a_data_set_is_read_from_its_test_split_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(name: str, config: str | None, **options: object) -> list[dict[str, str]]:
        asked.append((name, config, options))
        return [{"text": text} for text in TEXTS]

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    text = load_text("wikitext:wikitext-2-raw-v1")
    assert text.documents == tuple(TEXTS)
    assert text.name == "wikitext:wikitext-2-raw-v1"
    load_text("some/set::train")
    assert asked == [
        ("wikitext", "wikitext-2-raw-v1", {"split": "test", "streaming": True}),
        ("some/set", None, {"split": "train", "streaming": True}),
    ]


def test_a_data_set_with_other_columns_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"question": "x", "answer": "y"}])
    with pytest.raises(EvalError, match="record 1 has no column text or content; there are: answer, question"):
        load_text("some/set")


def test_offline_a_data_set_is_one_line_with_the_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EvalError, match=r"some/set: can't be fetched .*; give --text FILE\.txt") as caught:
        load_text("some/set")
    assert "\n" not in str(caught.value)
    with pytest.raises(EvalError, match=r"a data set is name\[:config\]\[:split\]"):
        load_text("a:b:c:d")
