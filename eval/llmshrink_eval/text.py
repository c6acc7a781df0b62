"""The text that is scored: its documents, in the order of the file, with nothing shuffled, cut or stripped.

A spec is one of three things: a local ``.txt`` (ONE document, taken as it is: no newline translation), a local
``.jsonl`` or ``.parquet`` (one document a record, under the key ``text`` or ``content``), or a `datasets` name
``name[:config][:split]`` with the split ``test`` unless it says another. Records that hold an empty string stay
documents: the GPTQ protocol joins them too. `datasets` and `pyarrow` are imported only when used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmshrink_eval.errors import EvalError

TEXT_KEYS = ("text", "content")
DEFAULT_SPLIT = "test"
OTHER_WAYS = "give --text FILE.txt, .jsonl or .parquet"
REACH_SECONDS = 20
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""What JSON can spell and UTF-8 can't: no tokenizer takes it."""


@dataclass(frozen=True)
class Text:
    """name: as reports show it. documents: in file order, as they are."""

    name: str
    documents: tuple[str, ...]


def load_text(spec: str, *, limit_documents: int | None = None) -> Text:
    """Read a text whole, or its first `limit_documents` records.

    spec: a path or a `datasets` name, as the module's docstring says. Raises EvalError, in one line, if the file is
    missing or of another kind, isn't UTF-8, has a broken record or no such column, if the data set can't be fetched,
    and if there is no text in it at all.
    """
    path = Path(spec).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        raise EvalError(f"--text {spec}: is a folder; {OTHER_WAYS}")
    if path.is_file() and reader is None:
        raise EvalError(f"--text {spec}: only .txt, .jsonl and .parquet files are read; {OTHER_WAYS}")
    if reader is not None and not path.is_file():
        raise EvalError(f"--text {spec}: no such file; {OTHER_WAYS}")
    source = _dataset(spec) if reader is None else reader(path)
    name = spec if reader is None else path.name
    documents: list[str] = []
    for document in source:
        if limit_documents is not None and len(documents) == limit_documents:
            break
        documents.append(document)
    if not any(documents):
        raise EvalError(f"--text {spec}: holds no text ({len(documents)} records); {OTHER_WAYS}")
    return Text(name, tuple(documents))


def _read_txt(path: Path) -> Iterator[str]:
    try:
        yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error, 0) from error


def _read_jsonl(path: Path) -> Iterator[str]:
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"--text {path}: line {number}"
            if line.strip():
                try:
                    record = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, error, position) from error
                except ValueError as error:
                    raise EvalError(f"{where} isn't JSON ({error}); one object a line is read") from error
                yield _document(record, where)
            position += len(line)


def _read_parquet(path: Path) -> Iterator[str]:
    """One row group is in memory at a time, and of it the one column that is read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EvalError(f"--text {path}: needs the package pyarrow (pip install pyarrow); or {OTHER_WAYS}") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise EvalError(f"--text {path}: not a parquet file ({_first_line(error)})") from error
    with file:
        key = _column(file.schema_arrow.names, f"--text {path}:")
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group, columns=[key]).to_pylist():
                yield _document(row, f"--text {path}: a record of row group {group}")


def _dataset(spec: str) -> Iterator[str]:
    """Stream `name[:config][:split]`; an empty config is the data set's own default."""
    if spec.count(":") > 2:
        raise EvalError(f"--text {spec}: a data set is name[:config][:split]; {OTHER_WAYS}")
    name, config, split = [*spec.split(":"), "", ""][:3]
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise EvalError(f"--text {spec}: needs the package datasets (pip install datasets); or {OTHER_WAYS}") from error
    try:
        # One question first: offline, `datasets` itself would retry for half a minute and log each try.
        huggingface_hub.HfApi().dataset_info(name, timeout=REACH_SECONDS)
        stream = datasets.load_dataset(name, config or None, split=split or DEFAULT_SPLIT, streaming=True)
        for number, record in enumerate(stream):
            yield _document(record, f"--text {spec}: record {number}")
    except EvalError:
        raise
    # The package and its transports raise dozens of unrelated types for a name that isn't there or no network.
    except Exception as error:
        raise EvalError(
            f"--text {spec}: can't be fetched ({type(error).__name__}: {_first_line(error)}); {OTHER_WAYS}"
        ) from error


def _document(record: Any, where: str) -> str:
    if not isinstance(record, dict):
        raise EvalError(f"{where} is a {type(record).__name__}; read is a string under text or content")
    key = _column(list(record), f"{where}:")
    value = record[key]
    if not isinstance(value, str):
        raise EvalError(f"{where}: {key} is a {type(value).__name__}, not a string")
    half = LONE_SURROGATE.search(value)
    if half:
        raise EvalError(f"{where}: {key} has half of a surrogate pair ({half[0]!a}), which is no character")
    return value


def _column(names: Sequence[str], where: str) -> str:
    """The first of TEXT_KEYS that is there."""
    for key in TEXT_KEYS:
        if key in names:
            return key
    has = ", ".join(sorted(names)) if names else "none"
    raise EvalError(f"{where} has no column text or content; there are: {has}")


def _not_utf8(path: Path, error: UnicodeDecodeError, start: int) -> EvalError:
    return EvalError(f"--text {path}: not UTF-8 text ({error.reason} at byte {start + error.start}); save it as UTF-8")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")[:160]


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
