"""How a report gets onto stdout: lines for a person, or one JSON document for a program."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Protocol

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


class Report(Protocol):
    """What the Python twins return."""

    def to_dict(self) -> dict[str, object]: ...
    def lines(self) -> Sequence[str]: ...


def show(report: Report, *, as_json: bool) -> None:
    """Print a report."""
    if as_json:
        show_json(report.to_dict())
    else:
        print("\n".join(report.lines()))


def show_json(document: Mapping[str, object] | Sequence[object]) -> None:
    """Print a document as JSON."""
    plain = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8"
    text = json.dumps(_finite(document), indent=2, ensure_ascii=plain, allow_nan=False)
    # What isn't text (a name of other bytes) has an escape in JSON, and none in UTF-8.
    print(re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text))


def _finite(value: object) -> object:
    """The same document with null for what JSON has no number for (NaN, infinities)."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
