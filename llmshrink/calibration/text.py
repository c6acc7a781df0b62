"""Where calibration text comes from, read no further than it is used.

A spec is one of four things:

- a local ``.txt``: ONE document, taken as it is (no stripping, no newline translation), read piece by piece;
- a local ``.jsonl`` or ``.parquet``: one document a record, under the key ``text`` (or ``messages``: a conversation,
  a list of ``{"role", "content"}``, with its ``tools``; or ``prompt`` and ``completion``: two texts, or two parts of
  a conversation), in an order that the seed shuffles (`records.py`);
- ``demo``: stories of the embedded demo language, drawn from the seed;
- a ``datasets`` name ``name[:config][:split]``, streamed and shuffled by the seed within a buffer; name may be a
  local folder that `datasets` reads (data files, or what ``save_to_disk`` wrote; `folders.py`).

No spec at all means the demo language for the demo model, and for any other model a public mix of three streams taken
in turn, one document each: web (fineweb-edu), encyclopedia (Wikipedia), code (codeparrot-clean). All three are plain
data files, no loading script. `datasets` and `pyarrow` are imported only when used.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import shown
from llmshrink_eval.leftout import Endless, Parquet, Unusable, bounded_line, parse_line

from llmshrink.calibration.folders import DEFAULT_SPLIT, data_files, is_saved, saved_rows
from llmshrink.calibration.records import (
    KEYS,
    PAIR_KEYS,
    TEXT_KEYS,
    TOOLS_KEY,
    Completion,
    Document,
    Messages,
    Record,
    read_record,
)
from llmshrink.errors import CalibrationError
from llmshrink.paths import as_text, expanded

__all__ = ["Completion", "Document", "Documents", "Messages", "Record", "load_documents"]

PUBLIC_MIX = (
    "HuggingFaceFW/fineweb-edu:sample-10BT:train",
    "wikimedia/wikipedia:20231101.en:train",
    "codeparrot/codeparrot-clean-valid::train",
)
PUBLIC_MIX_NAME = "public mix (fineweb-edu, wikipedia, codeparrot-clean)"
OTHER_WAYS = "give --calibration FILE.txt, .jsonl or .parquet, or --calibration demo"

PIECE_CHARACTERS = 1 << 16
SHUFFLE_BUFFER = 1000
REACH_SECONDS = 20
DEMO_SEED = 20_000
"""Far from the seeds of training and of the tests, so that calibration never repeats either."""


@dataclass(frozen=True)
class Documents:
    """A named source of text, opened anew by each call of `stream`.

    stream: seed -> records in the order of that seed, those that can't be used among them. When `single`, what it
    yields are consecutive pieces of one document (concatenate them), and the seed changes nothing.
    """

    name: str
    stream: Callable[[int], Iterator[Record]]
    single: bool = False


def load_documents(spec: str | None, *, source_kind: str = "hub") -> Documents:
    """Name the text that `spec` stands for; nothing is read yet but the existence of a file.

    spec: a path, ``demo``, a `datasets` name, or None for the default of this kind of model.
    source_kind: "hub", "folder" or "demo" (checkpoint.source.Source.kind).
    Raises CalibrationError if a file is missing or of a kind that isn't read. The streams raise it for what they
    find while they are read: no network, a file that isn't of its kind, a column that isn't there.
    """
    if spec is None and source_kind != "demo":
        return Documents(PUBLIC_MIX_NAME, _public_mix)
    if spec is None or spec == "demo":
        return Documents("demo", _demo)
    path = expanded(spec)
    reader = _READERS.get(path.suffix.lower())
    if path.is_file() and reader is None:
        raise CalibrationError(f"--calibration {spec}: only .txt, .jsonl and .parquet files are read; {OTHER_WAYS}")
    if reader is not None and not path.is_file():
        raise CalibrationError(f"--calibration {spec}: no such file; {OTHER_WAYS}")
    if reader is not None:
        return Documents(as_text(path.name), lambda seed: reader(path, seed), single=path.suffix.lower() == ".txt")
    folder = expanded(spec.partition(":")[0])
    name = folder.resolve().name + spec[len(spec.partition(":")[0]) :] if folder.is_dir() else spec
    return Documents(as_text(name), lambda seed: _dataset(spec, seed))


def _demo(seed: int) -> Iterator[Record]:
    from llmshrink.demo import language

    return map(Record, language.stories(DEMO_SEED + seed))


def _public_mix(seed: int) -> Iterator[Record]:
    streams = [_dataset(name, seed, f"{name}: ") for name in PUBLIC_MIX]
    return itertools.chain.from_iterable(zip(*streams, strict=False))


def _read_txt(path: Path, _seed: int) -> Iterator[Record]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            while piece := file.read(PIECE_CHARACTERS):
                yield Record(piece)
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"--calibration {path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
            ) from error


def _read_jsonl(paths: Sequence[Path], seed: int) -> Iterator[Record]:
    """Shuffle the lines' places, not the lines: files of any size cost 32 bytes a record."""
    files, offsets, numbers = array("Q"), array("Q"), array("Q")
    for which, path in enumerate(paths):
        position = number = 0
        with path.open("rb") as file:
            while True:
                number += 1
                try:
                    line, length = bounded_line(file)
                except Endless as error:
                    raise CalibrationError(f"--calibration {path}: line {number} {error}") from error
                if not length:
                    break
                if line.strip():
                    files.append(which)
                    offsets.append(position)
                    numbers.append(number)
                position += length
    order = array("Q", range(len(offsets)))
    random.Random(seed).shuffle(order)
    for record in order:
        path = paths[files[record]]
        with path.open("rb") as file:  # anew for each: a folder may hold more files than can be open
            file.seek(offsets[record])
            try:
                parsed = parse_line(bounded_line(file)[0])
            except Unusable as error:
                parsed = error
        yield read_record(parsed, f"{_within(path, paths)}line {numbers[record]}")


def _read_parquet(paths: Sequence[Path], seed: int) -> Iterator[Record]:
    """Shuffle the row groups, then the rows in each: one row group is in memory at a time."""
    order = random.Random(seed)
    places = [(path, group) for path in paths for group in range(_row_groups(path))]
    order.shuffle(places)
    for path, group in places:
        numbered = _rows(path, group)
        order.shuffle(numbered)
        for number, row in numbered:
            yield read_record(row, f"{_within(path, paths)}row {number}")


def _row_groups(path: Path) -> int:
    """How many a file has. Raises CalibrationError for one that isn't parquet or that holds nothing to read."""
    with _parquet(path) as file:
        wanted = {key for key in KEYS if key in file.names}
        if wanted <= {PAIR_KEYS[0], TOOLS_KEY} or wanted <= {PAIR_KEYS[1], TOOLS_KEY}:
            raise CalibrationError(
                f"--calibration {path}: has the columns {shown(file.names)}, none of them {', '.join(TEXT_KEYS)} or "
                f"messages, nor both of {' and '.join(PAIR_KEYS)}; rename the one that holds the text to text, or "
                f"{OTHER_WAYS}"
            )
        return len(file.rows)


def _rows(path: Path, group: int) -> list[tuple[int, Any]]:
    """A row group's rows, each with its number in the file."""
    with _parquet(path) as file:
        rows = file.read(group, [key for key in KEYS if key in file.names])
        return list(enumerate(rows, start=sum(file.rows[:group]) + 1))


@contextmanager
def _parquet(path: Path) -> Iterator[Parquet]:
    """The file while it is open. Raises CalibrationError for what is wrong with it, then and while it is read."""
    try:
        with Parquet(path) as file:
            yield file
    except Unusable as error:
        raise CalibrationError(f"--calibration {path}: {error}") from error


def _within(path: Path, paths: Sequence[Path]) -> str:
    """What precedes a place of one file among several."""
    return f"{path.name}, " if len(paths) > 1 else ""


def _folder(folder: Path, config: str, split: str, seed: int) -> Iterator[Record]:
    """The records of a local folder, in the order of the seed."""
    import datasets

    if is_saved(folder):
        for row, place in saved_rows(folder, split, seed, SHUFFLE_BUFFER):
            yield read_record(row, place)
        return
    paths = data_files(folder, config, split)
    readers = {_SEVERAL.get(path.suffix.lower()) for path in paths}
    reader = readers.pop() if len(readers) == 1 else None
    if reader is not None:
        yield from reader(paths, seed)
        return
    stream = datasets.load_dataset(str(folder), config or None, split=split or DEFAULT_SPLIT, streaming=True)
    yield from _streamed(stream, seed)


def _dataset(spec: str, seed: int, within: str = "") -> Iterator[Record]:
    """Stream `name[:config][:split]`; an empty config is the data set's own default. within: what precedes a place."""
    name, config, split = [*spec.split(":"), "", ""][:3]
    if spec.count(":") > 2:
        raise CalibrationError(f"--calibration {spec}: a data set is name[:config][:split]; {OTHER_WAYS}")
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise CalibrationError(
            f"--calibration {spec}: needs the package datasets (pip install datasets); or {OTHER_WAYS}"
        ) from error
    try:
        folder = expanded(name)
        if folder.is_dir():
            yield from _folder(folder, config, split, seed)
            return
        # One question first: offline, `datasets` itself would retry for half a minute and log each try.
        huggingface_hub.HfApi().dataset_info(name, timeout=REACH_SECONDS)
        stream = datasets.load_dataset(name, config or None, split=split or DEFAULT_SPLIT, streaming=True)
        yield from _streamed(stream, seed, within)
    except CalibrationError:
        raise
    # The package and its transports raise dozens of unrelated types for a name that isn't there or no network.
    except Exception as error:
        verb = "read" if expanded(name).is_dir() else "fetched"
        raise CalibrationError(
            f"calibration data {spec} can't be {verb} ({type(error).__name__}: {_first_line(error)}); {OTHER_WAYS}"
        ) from error


def _streamed(stream: Any, seed: int, within: str = "") -> Iterator[Record]:
    """Records as `datasets` gives them, shuffled within a buffer. within: what precedes a place."""
    for number, record in enumerate(stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), start=1):
        yield read_record(record, f"{within}record {number} in the order of the seed")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")[:160]


_SEVERAL: dict[str, Callable[[Sequence[Path], int], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
"""What reads any number of files of a kind, as one."""
_READERS: dict[str, Callable[[Path, int], Iterator[Record]]] = {
    ".txt": _read_txt,
    ".jsonl": lambda path, seed: _read_jsonl([path], seed),
    ".parquet": lambda path, seed: _read_parquet([path], seed),
}
