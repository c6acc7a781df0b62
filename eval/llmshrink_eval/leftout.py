"""Records of a text that can't be used: each is left out, counted, and named by its place with the reason.

One bad record of a million is no reason to refuse the others, and none to pass over it in silence. A source none of
whose first records can be used is another matter: it isn't read to its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmshrink_eval.bounded import DEEPEST, Unreadable, parse_json
from llmshrink_eval.engines.child import Ended, Kept, decode, encode

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""What JSON can spell and UTF-8 can't: no tokenizer takes it."""
HOPELESS = 1000
"""Records without a usable one among them, after which no more are read."""
LONGEST_LINE = 64_000_000
"""Bytes of a record's line: fifteen copies of War and Peace."""
PASSED_OVER = 16
"""A longer line is passed over while it has so many times LONGEST_LINE; what goes on is no file of lines."""
FREE_BYTES, EXPANSION = 1 << 28, 256
"""A row group may unpack to so many bytes, or to so many times those of its file: text packs to a third or a tenth, and
only what nobody wrote to a thousandth."""
ROW_BYTES = 64
"""What a row takes at least when it is read, whatever is in it."""
BATCH_ROWS = 1024
NAMED = 100
SHOWN = 3


class Unusable(ValueError):
    """Why a record can't be used, as what follows its place in a line."""


class Endless(Unusable):
    """A line that isn't passed over either: the file isn't read on."""


@dataclass(frozen=True)
class LeftOut:
    """count: records that were left out, of `read`. named: the first of them, each its place and why."""

    count: int = 0
    read: int = 0
    named: tuple[str, ...] = ()

    def words(self) -> str:
        """Which, and why; nothing where nothing was left out."""
        if not self.count:
            return ""
        more = f" and {self.count - SHOWN:,} more" if self.count > SHOWN else ""
        of = f"{self.count:,} of {self.read:,} records {'was' if self.count == 1 else 'were'} left out"
        said = f"none of {self.read:,} records can be used" if self.count == self.read else of
        return f"{said}: {'; '.join(self.named[:SHOWN])}{more}"

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"count": self.count, "read": self.read, "named": list(self.named)}


class Tally:
    """Counts while a source is read."""

    def __init__(self) -> None:
        self.read = self.count = 0
        self._named: list[str] = []

    @property
    def hopeless(self) -> bool:
        """Whether so many have been read, and none was of use, that it isn't worth going on."""
        return self.count == self.read >= HOPELESS

    def leave_out(self, place: str, why: str) -> None:
        """One of those that were read."""
        self.count += 1
        if len(self._named) < NAMED:
            self._named.append(f"{place} {why}")

    def result(self) -> LeftOut:
        """What was counted so far."""
        return LeftOut(self.count, self.read, tuple(self._named))


def parse_line(line: bytes) -> Any:
    """The JSON of one line. Raises Unusable."""
    if len(line) > LONGEST_LINE:
        raise Unusable(f"is longer than {LONGEST_LINE:,} bytes")
    try:
        return parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unusable(f"isn't UTF-8 ({error.reason} at its byte {error.start})") from error
    except Unreadable as error:
        raise Unusable(f"{error}; one object a line is read") from error


def bounded_line(file: IO[bytes]) -> tuple[bytes, int]:
    """The next line, no more than LONGEST_LINE and a byte of it, and how long it is; empty at the end. Raises
    Endless for one of more than PASSED_OVER times as much."""
    line = file.readline(LONGEST_LINE + 1)
    length = len(line)
    if length > LONGEST_LINE:
        piece = line
        while piece and not piece.endswith(b"\n"):
            piece = file.readline(1 << 20)
            length += len(piece)
            if length > PASSED_OVER * LONGEST_LINE:
                raise Endless(
                    f"is longer than {PASSED_OVER * LONGEST_LINE:,} bytes, and no more is read; one record a line is"
                )
    return line, length


class Parquet:
    """A parquet file of records, opened; close it, or use it in `with`.

    names: of its columns. rows: in each row group. Raises Unusable, as what follows the file's name, where it isn't
    parquet.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self._path, self._bytes = path, path.stat().st_size
        try:
            self._file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
            self.names: list[str] = list(self._file.schema_arrow.names)
            groups = range(self._file.num_row_groups)
            self.rows = [self._file.metadata.row_group(group).num_rows for group in groups]
        # Of a footer that is damaged: thrift's errors are OSErrors, a name that isn't UTF-8 is Python's.
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise Unusable(f"not a parquet file ({_first_line(error)})") from error

    def __enter__(self) -> Parquet:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, group: int, columns: Sequence[str]) -> list[Any]:
        """The rows of a row group as plain data; in the place of one that isn't text, an Unusable that says so.

        Raises Unusable for a group that can't be read, or that unpacks to more than a text can.
        """
        import pyarrow

        if any(pyarrow.types.is_nested(each.type) for each in self._file.schema_arrow if each.name in columns):
            # What a row of lists unpacks to isn't known before it is: it is tried where that can't fill this machine.
            check_apart(self._path, group, columns)
        return [row for table in self.tables(group, columns) for row in parquet_rows(table)]

    @property
    def allowed(self) -> int:
        """Bytes that a row group may unpack to."""
        return max(FREE_BYTES, EXPANSION * self._bytes)

    def tables(self, group: int, columns: Sequence[str]) -> Iterator[Any]:
        """A row group as tables of pyarrow, a few rows in each. Raises Unusable as `read` does."""
        import pyarrow

        try:
            # What is said of a column isn't asked for: pyarrow ends the process where that is damaged.
            unpacked = max(0, self._file.metadata.row_group(group).total_byte_size)
            self._check_size(ROW_BYTES * self.rows[group])
            # One value may be repeated without being stored again: a batch is small enough for each to be the largest.
            batch_rows = max(1, min(BATCH_ROWS, self.allowed // max(unpacked, 1)))
            size = 0
            for batch in self._file.iter_batches(batch_rows, row_groups=[group], columns=list(columns)):
                # A column may be kept as a dictionary, of which each row is a number until it is asked for.
                plain = [
                    part.dictionary_decode() if isinstance(part, pyarrow.DictionaryArray) else part
                    for part in batch.columns
                ]
                size += sum(part.nbytes for part in plain)
                self._check_size(size)
                yield pyarrow.Table.from_arrays(plain, batch.schema.names)
        except (MemoryError, _TooMuch) as error:
            raise Unusable(
                f"row group {group} unpacks to more than {self.allowed:,} bytes from a file of {self._bytes:,}, which "
                "no text does; write the file again"
            ) from error
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise Unusable(f"row group {group} can't be read ({_first_line(error)}); copy the file again") from error

    def _check_size(self, unpacked: int) -> None:
        if unpacked > self.allowed:
            raise _TooMuch


class _TooMuch(Exception):
    pass


def check_apart(path: Path, group: int, columns: Sequence[str]) -> None:
    """Read a row group of a parquet file in a process (`parquet_worker`) whose memory is bounded. Raises Unusable where
    that process does, or ends."""
    job = {"path": str(path.absolute()), "group": group, "columns": list(columns), "free": FREE_BYTES}
    try:
        answer = decode(_READER.answer(encode(job)))
    except Ended as error:
        why = f"{error} ended the process that tried"
        raise Unusable(f"row group {group} can't be read ({why}); copy the file again") from error
    if answer["unusable"] is not None:
        raise Unusable(answer["unusable"])


_READER = Kept("llmshrink_eval.parquet_worker", "reads parquet files")


def parquet_rows(table: Any) -> list[Any]:
    """The rows of a table of pyarrow as plain data; in the place of one that isn't text, an Unusable that says so."""
    try:
        return list(table.to_pylist())
    except (ValueError, OverflowError):
        return [_row(table.slice(number, 1)) for number in range(table.num_rows)]


def _row(table: Any) -> Any:
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Unusable(f"isn't UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, OverflowError) as error:  # a time of the year 300,000, say
        return Unusable(f"has a value that Python can't hold ({_first_line(error)})")


def present(value: Any, depth: int = 0) -> Any:
    """A record without its keys that are null, at any depth: parquet fills in null wherever a key is absent. Raises
    Unusable for one that is nested more than DEEPEST deep."""
    if depth > DEEPEST:
        raise Unusable(f"is nested more than {DEEPEST} deep")
    if isinstance(value, dict):
        return {key: present(item, depth + 1) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [present(item, depth + 1) for item in value]
    return value


def check_characters(value: Any, where: str) -> None:
    """Raise Unusable where a text, at any depth, holds half of a surrogate pair. value: as `present` gives it."""
    if isinstance(value, str):
        half = None if value.isascii() else LONE_SURROGATE.search(value)
        if half:
            raise Unusable(f"{where} has half of a surrogate pair ({half[0]!a}), which is no character")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_characters(key, where)
            check_characters(item, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            check_characters(item, f"{where}[{number}]")


def pick_text(record: Any, keys: Sequence[str]) -> str:
    """The text under the first of `keys` that a record has. Raises Unusable."""
    if not isinstance(record, dict):
        raise Unusable(f"is a {type(record).__name__}; read is a string under {' or '.join(keys)}")
    for key in keys:
        value = record.get(key)
        if value is not None and not isinstance(value, str):
            raise Unusable(f"has {key} that is a {type(value).__name__}, not a string")
        if isinstance(value, str):
            check_characters(value, key)
            return value
    null = next((key for key in keys if key in record), None)
    if null is not None:
        raise Unusable(f"has {null} that is null")
    has = ", ".join(sorted(map(str, record))) or "none"
    raise Unusable(f"has no column {' or '.join(keys)}; there are: {has}")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
