"""Texts that nobody wrote: records without an end, parquet that unpacks to gigabytes, pages that were changed.

Each reader, for calibration and for evaluation, has the same limits, since it's the same function.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmshrink_eval import leftout
from llmshrink_eval.engines.child import Ended
from llmshrink_eval.errors import EvalError
from llmshrink_eval.leftout import LONGEST_LINE, PASSED_OVER, Parquet, Unusable, bounded_line
from llmshrink_eval.text import load_text

from llmshrink.calibration.text import load_documents
from llmshrink.errors import CalibrationError


def calibration(path: Path) -> list[str]:
    return sorted(record.fault or str(record.document) for record in load_documents(str(path)).stream(0))


def evaluation(path: Path) -> list[str]:
    return sorted(load_text(str(path)).documents)


READERS = pytest.mark.parametrize("read", [calibration, evaluation])


def parquet_of(table: pyarrow.Table, **settings: Any) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, **settings)
    return file.getvalue()


def peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@READERS
@pytest.mark.parametrize("kept", [True, False])
def test_parquet_that_unpacks_to_gigabytes_is_refused(
    kept: bool, read: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kept: whether its schema says that the column is a dictionary, as pandas' categories are."""
    assert leftout.FREE_BYTES == 1 << 28
    monkeypatch.setattr(leftout, "FREE_BYTES", 1 << 24)
    one = pyarrow.array(["x" * 1_000_000])
    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10_000, pyarrow.int32()), one)
    file = tmp_path / "bomb.parquet"
    file.write_bytes(parquet_of(pyarrow.table({"text": repeated}), compression="zstd", store_schema=kept))
    assert file.stat().st_size < 20_000
    before = peak()
    with pytest.raises((CalibrationError, EvalError)) as caught:
        read(file)
    assert "row group 0 unpacks to more than 16,777,216 bytes" in str(caught.value) and str(file) in str(caught.value)
    assert peak() - before < 500_000_000


@READERS
def test_parquet_of_a_billion_nulls_is_refused(read: Callable[[Path], list[str]], tmp_path: Path) -> None:
    nothing = pyarrow.table({"text": pyarrow.nulls(6_000_000, pyarrow.string())})
    (tmp_path / "nulls.parquet").write_bytes(parquet_of(nothing, row_group_size=6_000_000))
    with pytest.raises((CalibrationError, EvalError), match="row group 0 unpacks to more than 268,435,456 bytes"):
        read(tmp_path / "nulls.parquet")


TALK = [{"role": "user", "content": "x" * 1000}]


def repeated(text: str, times: int) -> pyarrow.Array:
    """One text so many times, which takes a number each."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * times, pyarrow.int32()), pyarrow.array([text]))


def listed(values: pyarrow.Array, lists: int = 1) -> pyarrow.Array:
    """The values in so many lists of the same length."""
    return pyarrow.ListArray.from_arrays(range(0, len(values) + 1, len(values) // lists), values)


def talk(times: int) -> pyarrow.Array:
    fields = {"role": repeated("user", times), "content": repeated("x" * 1000, times)}
    return pyarrow.StructArray.from_arrays(list(fields.values()), list(fields))


NESTED: dict[str, Callable[[int], pyarrow.Array]] = {
    "a list": lambda times: listed(repeated("x" * 1000, times)),
    "lists in a list": lambda times: listed(listed(repeated("x" * 1000, times), 1000)),
    "a conversation": lambda times: listed(talk(times)),
    "an object": lambda times: pyarrow.StructArray.from_arrays([listed(talk(times))], ["of"]),
}


@pytest.mark.parametrize("kind", NESTED)
def test_one_row_that_repeats_a_value_a_million_times_is_refused(kind: str, tmp_path: Path) -> None:
    """It is unpacked before it can be counted, and so in a process with little memory."""
    file = tmp_path / "row.parquet"
    bomb = pyarrow.table({"messages": NESTED[kind](5_000_000)})
    file.write_bytes(parquet_of(bomb, compression="zstd", store_schema=False))
    assert file.stat().st_size < 20_000
    before = peak()
    with Parquet(file) as opened, pytest.raises(Unusable, match="row group 0 unpacks to more than 268,435,456 bytes"):
        opened.read(0, ["messages"])
    assert peak() - before < 100_000_000
    with pytest.raises(CalibrationError, match=r"row group 0 unpacks .* from a file of .* write the file again"):
        calibration(file)


def test_an_honest_list_is_read_and_a_reader_that_dies_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "talk.parquet"
    rows = [{"messages": TALK, "text": "a"}, {"messages": [*TALK, *TALK], "text": "b"}]
    file.write_bytes(parquet_of(pyarrow.Table.from_pylist(rows)))
    with Parquet(file) as opened:
        assert opened.read(0, ["messages", "text"]) == rows

    def killed(line: bytes) -> bytes:
        raise Ended(11)

    monkeypatch.setattr(leftout._READER, "answer", killed)
    with Parquet(file) as opened:
        with pytest.raises(Unusable, match=r"^row group 0 can't be read \(SIGSEGV ended the process that"):
            opened.read(0, ["messages"])
        assert opened.read(0, ["text"]) == [{"text": "a"}, {"text": "b"}]  # which isn't asked of it


@READERS
def test_an_honest_group_of_many_batches_is_read_whole(
    read: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"story {number}" for number in range(100)]
    (tmp_path / "text.parquet").write_bytes(parquet_of(pyarrow.table({"text": texts})))
    monkeypatch.setattr(leftout, "BATCH_ROWS", 7)
    assert read(tmp_path / "text.parquet") == sorted(texts)


@READERS
def test_a_page_that_isnt_as_its_checksum_says_is_refused(read: Callable[[Path], list[str]], tmp_path: Path) -> None:
    """One byte of a text, so that what is read would be a text too."""
    data = parquet_of(pyarrow.table({"text": ["a story of a dog"]}), compression="none", write_page_checksum=True,
                      use_dictionary=False, write_statistics=False)  # fmt: skip
    (tmp_path / "text.parquet").write_bytes(data)
    assert read(tmp_path / "text.parquet") == ["a story of a dog"]
    assert data.count(b"of a dog") == 1
    (tmp_path / "text.parquet").write_bytes(data.replace(b"of a dog", b"of a fog"))
    with pytest.raises((CalibrationError, EvalError), match=r"row group 0 can't be read .*; copy the file again"):
        read(tmp_path / "text.parquet")


@READERS
def test_a_line_without_an_end_is_left_out(
    read: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftout, "LONGEST_LINE", 50_000)
    lines = ['{"text": "first"}', '{"text": "' + "x" * 700_000 + '"}', '{"text": "last"}']
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    kept = [said for said in read(tmp_path / "text.jsonl") if "longer" not in said]
    assert kept == ["first", "last"]
    assert read is evaluation or "is longer than 50,000 bytes" in calibration(tmp_path / "text.jsonl")


def test_a_long_line_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftout, "LONGEST_LINE", 10)
    monkeypatch.setattr(leftout, "PASSED_OVER", 10**6)
    file = io.BytesIO(b"x" * 3_000_000 + b"\n" + b"0123456789\n" + b"0123456789\nend")
    found = [bounded_line(file) for _ in range(5)]
    assert [length for _, length in found] == [3_000_001, 11, 11, 3, 0]
    assert [len(line) for line, _ in found] == [11, 11, 11, 3, 0]
    assert LONGEST_LINE == 64_000_000


@READERS
def test_a_file_of_one_endless_line_is_left(
    read: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PASSED_OVER * LONGEST_LINE == 1_024_000_000
    monkeypatch.setattr(leftout, "LONGEST_LINE", 1_000_000)
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "first"}\n')
    os.truncate(file, 40_000_000_000)
    with pytest.raises((CalibrationError, EvalError)) as caught:
        read(file)
    assert f"{file}: line 2 is longer than 16,000,000 bytes, and no more is read" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"[" * 100_000, "is nested more than 100 deep"),
        (b'{"text": ' * 150 + b"1" + b"}" * 150, "is nested more than 100 deep"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "isn't JSON (Exceeds the limit (4300 digits)"),
        (b'{"text": "\xff"}', "isn't UTF-8 (invalid start byte at its byte 10)"),
        (b'{"text": 1e999}', "has text that is a number"),
        (b"\0\0\0\0", "isn't JSON"),
        (b'{"messages": [{"role": "user", "content": "' + b"\\ud800" + b'"}]}', "half of a surrogate pair"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_line_that_is_no_record_is_left_out_with_its_place(line: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "last"}\n')
    records = {record.place: record for record in load_documents(str(tmp_path / "text.jsonl")).stream(0)}
    assert says in records["line 2"].fault and records["line 2"].document is None
    assert {records["line 1"].document, records["line 3"].document} == {"first", "last"}


def kinds() -> Iterator[bytes]:
    texts = pyarrow.table({"text": [f"story {number} " * 20 for number in range(60)], "n": list(range(60))})
    turns = [
        [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": "yes"}] for number in range(9)
    ]
    for compression in ("snappy", "zstd", "none"):
        yield parquet_of(texts, compression=compression, row_group_size=20)
        yield parquet_of(pyarrow.table({"messages": turns}), compression=compression, row_group_size=4)


KINDS = list(kinds())


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.sampled_from(range(len(KINDS))), st.integers(0, 2**32), st.integers(1, 8))
def test_any_damage_to_parquet_is_one_line(
    tmp_path_factory: pytest.TempPathFactory, kind: int, seed: int, flips: int
) -> None:
    """It has no checksums: what still reads is read."""
    drawn, damaged = random.Random(seed), bytearray(KINDS[kind])
    for _ in range(flips):
        damaged[drawn.randrange(len(damaged))] ^= 1 << drawn.randrange(8)
    file = tmp_path_factory.mktemp("damaged") / "text.parquet"
    file.write_bytes(damaged)
    for read in (calibration, evaluation):
        try:
            read(file)
        except (CalibrationError, EvalError) as error:
            said = str(error)
        else:
            said = str(file)
        assert str(file) in said and "\n" not in said and len(said) < 1000


def test_a_name_of_a_column_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    whole = parquet_of(pyarrow.table({"text": ["a"], "other": ["b"]}), compression="none")
    (tmp_path / "text.parquet").write_bytes(whole.replace(b"other", b"oth\xffr"))
    for read in (calibration, evaluation):
        with pytest.raises((CalibrationError, EvalError), match=r"text\.parquet: "):
            read(tmp_path / "text.parquet")


def test_a_file_that_is_no_parquet_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_bytes(b"PAR1" + json.dumps({"text": 1}).encode() + b"\xff\xff\xff\x7fPAR1")
    with pytest.raises(Unusable, match="not a parquet file"):
        Parquet(tmp_path / "text.parquet")
