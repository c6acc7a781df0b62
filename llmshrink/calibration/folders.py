"""A folder of data, as `datasets` understands it: data files, or what `save_to_disk` wrote.

`datasets` refuses a whole folder for one line that isn't JSON or one text that isn't UTF-8. So it says which files are
a split's, and who reads single files reads those too; what it saved itself is taken from it as tables, whose rows are
made plain data here. Either way a record that can't be used is an Unusable in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmshrink_eval.leftout import parquet_rows

from llmshrink.calibration.records import KEYS
from llmshrink.errors import CalibrationError

SAVED = ("dataset_dict.json", "state.json")
"""What `datasets` leaves in a folder that it saved."""
DEFAULT_SPLIT = "train"
ROWS = 1000
"""Of a saved data set, read at a time."""


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved what is in the folder."""
    return any((folder / name).is_file() for name in SAVED)


def data_files(folder: Path, config: str, split: str) -> list[Path]:
    """The files of a split, by the rules of `datasets`. config, split: empty for the default.

    Raises whatever `datasets` does where it finds no data, and CalibrationError for a split that there isn't.
    """
    import datasets

    builder = datasets.load_dataset_builder(str(folder), config or None)
    return [Path(file) for file in _split(folder, builder.config.data_files, split)]


def saved_rows(folder: Path, split: str, seed: int, buffer: int) -> Iterator[tuple[Any, str]]:
    """(a row as plain data, or an Unusable; where it stands) of what `datasets` saved, shuffled in a buffer of rows.

    Raises whatever `datasets` does, and CalibrationError for a split that there isn't.
    """
    import datasets

    stream = datasets.IterableDataset.from_generator(_rows, gen_kwargs={"folder": str(folder), "split": split})
    for row in stream.shuffle(seed=seed, buffer_size=buffer):
        yield row["record"], row["place"]


def _split(folder: Path, splits: Mapping[str, Any], asked: str) -> Any:
    name = asked or DEFAULT_SPLIT
    if name not in splits:
        there = [str(each) for each in splits]
        raise CalibrationError(
            f"calibration data {folder} has no split {name}; there are: {', '.join(there)}: give {folder}::{there[0]}"
        )
    return splits[name]


def _rows(folder: str, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    found = datasets.load_from_disk(folder)
    kept = found if isinstance(found, datasets.Dataset) else _split(Path(folder), found, split)
    wanted = [name for name in KEYS if name in kept.column_names]
    tables = (kept.select_columns(wanted) if wanted else kept).with_format("arrow")
    for start in range(0, len(tables), ROWS):
        for number, record in enumerate(parquet_rows(tables[start : start + ROWS]), start=start + 1):
            yield {"record": record, "place": f"row {number}"}
