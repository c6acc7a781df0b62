"""Rows that were measured before and are kept in the repository: on other machines, or too slow to measure every time.

A file a row in results/, with the figures, their date, machine, commit and the state of the code. One is shown where
nothing is filed here for its row, as long as the row's command is the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.real.rows import Row

FOLDER = Path(__file__).parent / "results"


def find(row: Row) -> dict[str, Any] | None:
    """The row's figures, if some are kept that its present command gave."""
    file = _file(row)
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found if tuple(found["command"]) == row.command else None


def write(row: Row, figures: Mapping[str, Any]) -> Path:
    """Keep the row's figures; those of an earlier day go. Returns the file."""
    file = _file(row)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return file


def _file(row: Row) -> Path:
    return FOLDER / f"{re.sub(r'[^a-z0-9.]+', '-', row.name.lower())}.json"
