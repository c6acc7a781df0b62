"""Where rows are filed: each under what its figures depend on, so that it is found again and a killed one goes on.

    <cache>/rows/<name>-<digest of the key>/<state of the code>/
        result.json     what was measured; appears whole, when all of it was
        failed.json     why it couldn't be, instead; tried again at the next run
        attempts.jsonl  a line when a run starts, one when it ends: a row that was killed has used time before
        out             the checkpoint (out.partial while it is made: llmshrink's own runs go on in it)
        log.txt         what the run printed

The key: the source, the command, the texts, versions, dtype and threads. The state of the code is beside it: a row of
another state is measured again, or, where that is asked for, shown with the commit that it was measured at.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.real.source import ROOT

NUMERIC_ROOMS = (
    *(f"llmshrink/{room}" for room in ("calibration", "checkpoint", "distillation", "formats", "methods", "model")),
    *("llmshrink/recipe", "llmshrink/run", "llmshrink/weights", "kernels/llmshrink_kernels/sparse24"),
)
"""What decides the numbers that a run writes, beside its recipe."""
RECIPES = "recipes"
DIGITS = 12


def digest(value: object) -> str:
    """Of plain data, as 12 digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]


def file_digest(path: Path) -> str:
    """Of a file's content, as 12 digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


@cache
def code_state(*places: str) -> str:
    """Of the code in these folders or files, as 12 digits: as it is parsed, without docstrings and comments, which
    change no number. places: from the root of the repository."""
    found = hashlib.sha256()
    for place in places:
        root = ROOT / place
        files = [root] if root.is_file() else sorted({*root.rglob("*.py"), *root.rglob("*.yaml")})
        for file in files:
            text = file.read_text(encoding="utf-8")
            said = ast.dump(_without_docstrings(ast.parse(text))) if file.suffix == ".py" else text
            found.update(f"{file.relative_to(ROOT).as_posix()}\n{said}\n".encode())
    return found.hexdigest()[:DIGITS]


def recipes_in(words: Iterable[str]) -> list[str]:
    """The files of the shipped recipes that a command line names, from the root of the repository."""
    named = (f"{RECIPES}/{word}.yaml" for word in words)
    return sorted({file for file in named if (ROOT / file).is_file()})


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [
                each for each in node.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
            ]
    return tree


@cache
def commit() -> str:
    """The checkout's commit, with + where it was changed since; empty outside a repository."""
    ran = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.stdout.strip()


@dataclass(frozen=True)
class Place:
    """A row's own folder. folder: of this state of the code."""

    folder: Path

    @property
    def out(self) -> Path:
        """Where its checkpoint is, or will be."""
        return self.folder / "out"

    @property
    def log(self) -> Path:
        """What its runs print."""
        return self.folder / "log.txt"

    def result(self) -> dict[str, Any] | None:
        """What was measured, if it was."""
        return _read(self.folder / "result.json")

    def failure(self) -> dict[str, Any] | None:
        """{"reason", "date"} of the last run, if it failed."""
        return _read(self.folder / "failed.json")

    def older(self) -> Place | None:
        """The newest that was measured by another state of the code, if there is one."""
        found = {
            Place(file.parent): str((_read(file) or {})["date"]) for file in self.folder.parent.glob("*/result.json")
        }
        return max(found, key=lambda one: found[one], default=None)

    def keep(self, result: Mapping[str, Any]) -> None:
        """File what was measured."""
        (self.folder / "failed.json").unlink(missing_ok=True)
        _write(self.folder / "result.json", result)

    def fail(self, reason: str, date: str) -> None:
        """File why it couldn't be measured."""
        _write(self.folder / "failed.json", {"reason": reason, "date": date})

    def attempts(self) -> list[dict[str, Any]]:
        """What its runs used so far; one that was killed has no "cpu_seconds"."""
        path = self.folder / "attempts.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        started: dict[int, dict[str, Any]] = {}
        ended: dict[int, dict[str, Any]] = {}
        for line in _records(lines):
            (ended if "cpu_seconds" in line else started)[line["attempt"]] = line
        return [{**started[number], **ended.get(number, {})} for number in sorted(started)]

    def note(self, line: Mapping[str, Any]) -> None:
        """Add a line to the attempts: {"attempt": number, ...}."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "attempts.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def place(cache: Path, name: str, key: Mapping[str, Any], code: str) -> Place:
    """Where a row of this key, measured by this state of the code, is filed."""
    slug = re.sub(r"[^\w.-]+", "-", name).strip("-")
    return Place(cache / "rows" / f"{slug}-{digest(dict(key))}" / code)


def _records(lines: list[str]) -> Iterator[dict[str, Any]]:
    """Of lines of JSON; one that was cut off while it was written is left out."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
