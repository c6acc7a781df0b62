"""What is known of each window, kept in a file as it comes, so that an interrupted pass goes on where it stopped.

One line a window: the CRC-32 of the rest as 8 hex digits, a space, and JSON. Lines are appended whole and never
changed; a line that doesn't match its checksum (the last one of a killed process) is no record, and what it was about
is measured again.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmshrink_eval.bounded import parse_json
from llmshrink_eval.divergence import Disagreement, WindowDivergence


@dataclass(frozen=True)
class WindowRecord:
    """nats: the sum of -log p over the window's scored tokens. divergence: from the original, where there is one."""

    window: int
    nats: float
    divergence: WindowDivergence | None = None


class CheckedLines:
    """An append-only file of JSON objects, one a line with its checksum."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[dict[str, Any]]:
        """Every whole line, in order; what isn't whole is cut off the end, so that the next append starts a line."""
        if not self._path.exists():
            return []
        data = self._path.read_bytes()
        found: list[dict[str, Any]] = []
        good = 0
        for line in data.splitlines(keepends=True):
            checksum, _, body = line.partition(b" ")
            if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(body):
                break
            found.append(parse_json(body))
            good += len(line)
        if good < len(data):
            with self._path.open("r+b") as file:
                file.truncate(good)
        return found

    def append(self, objects: Sequence[dict[str, Any]]) -> None:
        """Add lines in one write."""
        bodies = [json.dumps(one, separators=(",", ":")).encode() + b"\n" for one in objects]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(b"".join(b"%08x %s" % (zlib.crc32(body), body) for body in bodies))


def to_json(record: WindowRecord) -> dict[str, Any]:
    """Exact: a float64 is written so that it reads back the same, float32 arrays as base64 of their bytes."""
    made: dict[str, Any] = {"window": record.window, "nats": record.nats}
    if record.divergence is not None:
        part = record.divergence
        made["divergence"] = {
            "kl": base64.b64encode(part.kl.numpy().tobytes()).decode(),
            "kl_sum": part.kl_sum,
            "same_top1": part.same_top1,
            "shared_top5": part.shared_top5,
            "error": part.error,
            "worst": [[place.position, place.kl, place.original, place.compressed] for place in part.worst],
        }
    return made


def from_json(made: dict[str, Any]) -> WindowRecord:
    """What `to_json` made."""
    part = made.get("divergence")
    if part is None:
        return WindowRecord(made["window"], made["nats"])
    return WindowRecord(
        made["window"],
        made["nats"],
        WindowDivergence(
            kl=torch.frombuffer(bytearray(base64.b64decode(part["kl"])), dtype=torch.float32),
            kl_sum=part["kl_sum"],
            same_top1=part["same_top1"],
            shared_top5=part["shared_top5"],
            error=part["error"],
            worst=tuple(
                Disagreement(position, kl, _pairs(original), _pairs(compressed))
                for position, kl, original, compressed in part["worst"]
            ),
        ),
    )


def _pairs(listed: list[list[Any]]) -> tuple[tuple[int, float], ...]:
    return tuple((int(token), float(logprob)) for token, logprob in listed)
