"""Where things are kept, how much room is left there, and how the Hub is reached. Nothing is asked of the network."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmshrink.doctoring.found import Checked, Problem
from llmshrink.run.progress import size

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
COUNTING = 1.0
"""Seconds that adding up a cache may take."""


@dataclass(frozen=True)
class Place:
    """A folder that runs write to. least: bytes below which one will soon fail. move: how to have it elsewhere."""

    name: str
    folder: Path
    least: int
    move: str


def places() -> list[Place]:
    """The folders that a run uses, as the environment has them."""
    from huggingface_hub import constants
    from llmshrink_eval.cache import default_folder

    return [
        Place("hub cache", Path(constants.HF_HUB_CACHE), 2_000_000_000, "set HF_HOME to a folder with room"),
        Place("eval cache", default_folder(), 200_000_000, "use --cache FOLDER, or set XDG_CACHE_HOME"),
        Place("temporary", Path(tempfile.gettempdir()), 200_000_000, "set TMPDIR to a folder with room"),
    ]


def disk() -> Checked:
    """The caches and the temporary folder: size, room, and whether they can be written."""
    facts: dict[str, Any] = {}
    notes, problems = [], []
    for place in places():
        there = _nearest(place.folder)
        free = shutil.disk_usage(there).free
        held, whole = _held(place.folder) if place.name != "temporary" else (None, True)
        facts[place.name.replace(" ", "_")] = {
            "folder": str(place.folder), "bytes": held, "counted_whole": whole, "free_bytes": free,
        }  # fmt: skip
        holds = "" if held is None else f", {'' if whole else 'more than '}{size(held)} in it"
        notes.append(f"{place.name}: {place.folder}{holds}, {size(free)} free")
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            problems.append(Problem(f"{place.name}: {there} can't be written", place.move))
        elif free < place.least:
            cleared = "; `hf cache` lists and deletes what is in it" if place.name == "hub cache" else ""
            what = f"{place.name}: {size(free)} free under {there}, and {size(place.least)} are soon needed"
            problems.append(Problem(what, f"{place.move}, or free some{cleared}"))
    tightest = min(each["free_bytes"] for each in facts.values())
    return Checked("disk", facts, f"{size(tightest)} free at the least", problems, notes, slow="adding up the caches")


def _nearest(folder: Path) -> Path:
    """The folder itself, or what is there of the path to it."""
    absolute = Path(os.path.abspath(folder))
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def _held(folder: Path) -> tuple[int, bool]:
    """Bytes of the files below a folder, links not followed; False: it was given up after COUNTING seconds."""
    until = time.monotonic() + COUNTING
    total = 0
    for root, _, names in os.walk(folder):
        if time.monotonic() > until:
            return total, False
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue  # gone since it was listed
    return total, True


def hub() -> Checked:
    """How models arrive: with a token or without (its value is never read out), on line or from the cache alone."""
    from huggingface_hub import constants

    token = _token(Path(constants.HF_TOKEN_PATH))
    offline = [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    address = urlsplit(constants.ENDPOINT)
    endpoint = f"{address.scheme}://{address.hostname}{f':{address.port}' if address.port else ''}"
    notes = [] if token else ["gated and private models need a token: hf auth login, or HF_TOKEN"]
    if offline:
        names = " and ".join(offline)
        notes.append(f"{names} {'is' if len(offline) == 1 else 'are'} set: what isn't in the cache isn't found")
    line = f"{endpoint}, {f'token from {token}' if token else 'no token'}{', offline' if offline else ''}"
    return Checked("hub", {"endpoint": endpoint, "token": token, "offline": offline}, line, notes=notes)


def _token(file: Path) -> str | None:
    """Where huggingface_hub finds a token, in its own order; None where it finds none."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return name
    try:
        return str(file) if file.read_text(encoding="utf-8").strip() else None
    except OSError:
        return None
