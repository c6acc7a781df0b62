"""The text that is scored: its documents, in the order of the file, with nothing shuffled, cut or stripped.

A spec is one of three things: a local ``.txt`` (ONE document, taken as it is: no newline translation), a local
``.jsonl`` or ``.parquet`` (one document a record, under the key ``text`` or ``content``), or a `datasets` name
``name[:config][:split]`` with the split ``test`` unless it says another. Records that hold an empty string stay
documents: the GPTQ protocol joins them too. Records that hold no text are left out, counted and named (`leftout`).
`datasets` and `pyarrow` are imported only when used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from llmshrink_eval.errors import EvalError
from llmshrink_eval.leftout import Endless, LeftOut, Parquet, Tally, Unusable, bounded_line, parse_line, pick_text
from llmshrink_eval.refused import refused

TEXT_KEYS = ("text", "content")
DEFAULT_SPLIT = "test"
OTHER_WAYS = "give --text FILE.txt, .jsonl or .parquet"
REACH_SECONDS = 20
Found: TypeAlias = tuple[str, str | Unusable]
"""Where a record stands, and its text or why it has none."""


@dataclass(frozen=True)
class Text:
    """name: as reports show it. documents: in file order, as they are. left_out: records that hold no text."""

    name: str
    documents: tuple[str, ...]
    left_out: LeftOut = field(default_factory=LeftOut)


def load_text(spec: str, *, limit_documents: int | None = None) -> Text:
    """Read a text whole, or its first `limit_documents` records.

    spec: a path or a `datasets` name, as the module's docstring says. Raises EvalError, in one line, if the file is
    missing or of another kind, isn't UTF-8 (a .txt), has no such column, if the data set can't be fetched, and if
    there is no text in it at all, or none in its first many records.
    """
    try:
        return _load(spec, limit_documents)
    except OSError as error:
        raise EvalError(f"--text {spec:.300}: can't be read: {refused(error, OTHER_WAYS)}") from error


def _load(spec: str, limit_documents: int | None) -> Text:
    try:
        path = Path(spec).expanduser()
    except RuntimeError as error:  # ~ without a home folder, or ~user of nobody
        raise EvalError(f"--text {spec}: no such home folder is known here; give the path in full") from error
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
    tally = Tally()
    for place, found in source:
        if limit_documents is not None and len(documents) == limit_documents:
            break
        tally.read += 1
        if isinstance(found, str):
            documents.append(found)
        else:
            tally.leave_out(place, str(found))
            if tally.hopeless:
                raise EvalError(f"--text {spec}: {tally.result().words()}; no more were read; {OTHER_WAYS}")
    left_out = tally.result()
    if not any(documents):
        said = left_out.words() or f"{tally.read} records"
        raise EvalError(f"--text {spec}: holds no text ({said}); {OTHER_WAYS}")
    return Text(name, tuple(documents), left_out)


def _read_txt(path: Path) -> Iterator[Found]:
    try:
        yield "", path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def _read_jsonl(path: Path) -> Iterator[Found]:
    with path.open("rb") as file:
        for number in itertools.count(1):
            try:
                line, length = bounded_line(file)
            except Endless as error:
                raise EvalError(f"--text {path}: line {number} {error}") from error
            if not length:
                return
            if line.strip():
                try:
                    record = parse_line(line)
                except Unusable as error:
                    record = error
                yield f"line {number}", _document(record)


def _read_parquet(path: Path) -> Iterator[Found]:
    """One row group is in memory at a time, and of it the one column that is read."""
    try:
        with Parquet(path) as file:
            keys = [key for key in TEXT_KEYS if key in file.names]
            if not keys:
                has = ", ".join(sorted(file.names)) if file.names else "none"
                raise EvalError(f"--text {path}: has no column text or content; there are: {has}")
            number = 0
            for group in range(len(file.rows)):
                for row in file.read(group, keys):
                    number += 1
                    yield f"row {number}", _document(row)
    except ImportError as error:
        raise EvalError(f"--text {path}: needs the package pyarrow (pip install pyarrow); or {OTHER_WAYS}") from error
    except Unusable as error:
        raise EvalError(f"--text {path}: {error}") from error


def _dataset(spec: str) -> Iterator[Found]:
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
        for number, record in enumerate(stream, start=1):
            yield f"record {number}", _document(record)
    # The package and its transports raise dozens of unrelated types for a name that isn't there or no network.
    except Exception as error:
        raise EvalError(
            f"--text {spec}: can't be fetched ({type(error).__name__}: {_first_line(error)}); {OTHER_WAYS}"
        ) from error


def _document(record: Any) -> str | Unusable:
    try:
        if isinstance(record, Unusable):
            raise record
        return pick_text(record, TEXT_KEYS)
    except Unusable as error:
        return error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> EvalError:
    return EvalError(f"--text {path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")[:160]


_READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
