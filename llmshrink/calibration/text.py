"""Where calibration text comes from, read no further than it is used.

A spec is one of four things:

- a local ``.txt``: ONE document, taken as it is (no stripping, no newline translation), read piece by piece;
- a local ``.jsonl`` or ``.parquet``: one document a record, under the key ``text`` (or ``messages``: a conversation,
  a list of ``{"role", "content"}``; or ``prompt`` and ``completion``: two texts, or two parts of a conversation), in
  an order that the seed shuffles;
- ``demo``: stories of the embedded demo language, drawn from the seed;
- a ``datasets`` name ``name[:config][:split]``, streamed and shuffled by the seed within a buffer; name may be a
  local folder that `datasets` reads (data files, or what ``save_to_disk`` wrote).

No spec at all means the demo language for the demo model, and for any other model a public mix of three streams taken
in turn, one document each: web (fineweb-edu), encyclopedia (Wikipedia), code (codeparrot-clean). All three are plain
data files, no loading script. `datasets` and `pyarrow` are imported only when used.
"""

from __future__ import annotations

import itertools
import json
import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeGuard

from llmshrink.errors import CalibrationError

Messages: TypeAlias = Sequence[Mapping[str, Any]]

PUBLIC_MIX = (
    "HuggingFaceFW/fineweb-edu:sample-10BT:train",
    "wikimedia/wikipedia:20231101.en:train",
    "codeparrot/codeparrot-clean-valid::train",
)
PUBLIC_MIX_NAME = "public mix (fineweb-edu, wikipedia, codeparrot-clean)"
OTHER_WAYS = "give --calibration FILE.txt, .jsonl or .parquet, or --calibration demo"

TEXT_KEYS = ("text", "content")
PAIR_KEYS = ("prompt", "completion")
PIECE_CHARACTERS = 1 << 16
SHUFFLE_BUFFER = 1000
SAVED = ("dataset_dict.json", "state.json")
"""What `datasets` leaves in a folder that it saved."""
REACH_SECONDS = 20
DEMO_SEED = 20_000
"""Far from the seeds of training and of the tests, so that calibration never repeats either."""


@dataclass(frozen=True)
class Completion:
    """What was asked and what is to be answered: both texts, or both the messages of one conversation."""

    prompt: str | Messages
    completion: str | Messages


Document: TypeAlias = str | Messages | Completion


@dataclass(frozen=True)
class Documents:
    """A named source of text, opened anew by each call of `stream`.

    stream: seed -> documents in the order of that seed. When `single`, what it yields are consecutive pieces of one
    document (concatenate them), and the seed changes nothing.
    """

    name: str
    stream: Callable[[int], Iterator[Document]]
    single: bool = False


def load_documents(spec: str | None, *, source_kind: str = "hub") -> Documents:
    """Name the text that `spec` stands for; nothing is read yet but the existence of a file.

    spec: a path, ``demo``, a `datasets` name, or None for the default of this kind of model.
    source_kind: "hub", "folder" or "demo" (checkpoint.source.Source.kind).
    Raises CalibrationError if a file is missing or of a kind that isn't read. The streams raise it for what they
    find while they are read: no network, a broken record, a column that isn't there.
    """
    if spec is None and source_kind != "demo":
        return Documents(PUBLIC_MIX_NAME, _public_mix)
    if spec is None or spec == "demo":
        return Documents("demo", _demo)
    path = Path(spec).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if path.is_file() and reader is None:
        raise CalibrationError(f"--calibration {spec}: only .txt, .jsonl and .parquet files are read; {OTHER_WAYS}")
    if reader is not None and not path.is_file():
        raise CalibrationError(f"--calibration {spec}: no such file; {OTHER_WAYS}")
    if reader is not None:
        return Documents(path.name, lambda seed: reader(path, seed), single=path.suffix.lower() == ".txt")
    folder = Path(spec.partition(":")[0]).expanduser()
    name = folder.resolve().name + spec[len(spec.partition(":")[0]) :] if folder.is_dir() else spec
    return Documents(name, lambda seed: _dataset(spec, seed))


def _demo(seed: int) -> Iterator[Document]:
    from llmshrink.demo import language

    return language.stories(DEMO_SEED + seed)


def _public_mix(seed: int) -> Iterator[Document]:
    streams = [_dataset(name, seed) for name in PUBLIC_MIX]
    return itertools.chain.from_iterable(zip(*streams, strict=False))


def _read_txt(path: Path, _seed: int) -> Iterator[Document]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            while piece := file.read(PIECE_CHARACTERS):
                yield piece
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"--calibration {path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
            ) from error


def _read_jsonl(path: Path, seed: int) -> Iterator[Document]:
    """Shuffle the lines' offsets, not the lines: a file of any size costs 8 bytes a record."""
    with path.open("rb") as file:
        offsets = array("Q")
        position = 0
        for line in file:
            if line.strip():
                offsets.append(position)
            position += len(line)
        random.Random(seed).shuffle(offsets)
        for offset in offsets:
            file.seek(offset)
            try:
                record = json.loads(file.readline())
                document = _document(record)
            except (ValueError, RecursionError) as error:
                said = (
                    error if isinstance(error, CalibrationError) else f"isn't JSON ({error}); one object a line is read"
                )
                raise CalibrationError(f"--calibration {path}: line {_line_at(file, offset)} {said}") from error
            yield document


def _line_at(file: BinaryIO, offset: int) -> int:
    """The number, from 1, of the line that begins at a byte."""
    file.seek(0)
    number = 1
    while file.tell() < offset:
        file.readline()
        number += 1
    return number


def _read_parquet(path: Path, seed: int) -> Iterator[Document]:
    """Shuffle the row groups, then the rows in each: one row group is in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    order = random.Random(seed)
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise CalibrationError(f"--calibration {path}: not a parquet file ({_first_line(error)})") from error
    with file:
        names = file.schema_arrow.names
        wanted = [key for key in (*TEXT_KEYS, "messages", *PAIR_KEYS) if key in names]
        if not wanted or wanted in ([PAIR_KEYS[0]], [PAIR_KEYS[1]]):
            raise CalibrationError(
                f"--calibration {path}: has the columns {names}, none of them {', '.join(TEXT_KEYS)} or messages, "
                f"nor both of {' and '.join(PAIR_KEYS)}; rename the one that holds the text to text, or {OTHER_WAYS}"
            )
        groups = list(range(file.num_row_groups))
        order.shuffle(groups)
        for group in groups:
            rows = file.read_row_group(group, columns=wanted).to_pylist()
            order.shuffle(rows)
            for row in rows:
                try:
                    document = _document(row)
                except CalibrationError as error:
                    raise CalibrationError(f"--calibration {path}: a record of row group {group} {error}") from error
                yield document


def _dataset(spec: str, seed: int) -> Iterator[Document]:
    """Stream `name[:config][:split]`; an empty config is the data set's own default."""
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
        folder = Path(name).expanduser()
        if not folder.is_dir():
            # One question first: offline, `datasets` itself would retry for half a minute and log each try.
            huggingface_hub.HfApi().dataset_info(name, timeout=REACH_SECONDS)
        if folder.is_dir() and any((folder / saved).is_file() for saved in SAVED):
            found = datasets.load_from_disk(str(folder))
            kept = found if isinstance(found, datasets.Dataset) else found[split or "train"]
            stream = kept.to_iterable_dataset()
        else:
            path = str(folder) if folder.is_dir() else name
            stream = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
        for record in stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER):
            yield _document(record)
    except CalibrationError as error:
        raise CalibrationError(f"--calibration {spec}: a record {error}") from error
    # The package and its transports raise dozens of unrelated types for a name that isn't there or no network.
    except Exception as error:
        verb = "read" if Path(name).expanduser().is_dir() else "fetched"
        raise CalibrationError(
            f"calibration data {spec} can't be {verb} ({type(error).__name__}: {_first_line(error)}); {OTHER_WAYS}"
        ) from error


def _document(record: Any) -> Document:
    """The conversation or the text of a record; a record with both is a conversation.

    Raises CalibrationError with the end of a line, to which the caller gives the file and the place.
    """
    if isinstance(record, dict):
        messages = record.get("messages")
        if _is_conversation(messages):
            for number, message in enumerate(messages):
                _check_message(message, f"messages[{number}]")
            return list(messages)
        for key in TEXT_KEYS:
            if isinstance(record.get(key), str):
                return str(record[key])
        prompt, completion = (record.get(key) for key in PAIR_KEYS)
        if isinstance(prompt, str) and isinstance(completion, str):
            return Completion(prompt, completion)
        if _is_conversation(prompt) and _is_conversation(completion):
            for key, part in zip(PAIR_KEYS, (prompt, completion), strict=True):
                for number, message in enumerate(part):
                    _check_message(message, f"{key}[{number}]")
            return Completion(prompt, completion)
    has = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise CalibrationError(
        f"has {has}; read are a string under text, a list of messages under messages, or both of prompt and "
        f"completion: rename the key, or {OTHER_WAYS}"
    )


def _is_conversation(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def _check_message(message: Mapping[str, Any], place: str) -> None:
    """A template makes an empty string of what isn't there, so it would go unnoticed.

    content: text or a list of parts; a message that calls tools may do without.
    """
    content = message.get("content")
    if not isinstance(message.get("role"), str):
        missing = "role"
    elif not (isinstance(content, str | list) or message.get("tool_calls")):
        missing = "content"
    else:
        return
    raise CalibrationError(
        f"has a message without {missing} ({place} has {sorted(message)}); "
        'a message is {"role": "user", "content": "..."}'
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")[:160]


_READERS: dict[str, Callable[[Path, int], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
