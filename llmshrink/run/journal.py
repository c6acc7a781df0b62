"""The state of a run is its finished shards; the journal says which they are and what they were made from.

`OUT.partial/journal.jsonl`: the first line is the run's identity (everything that bit-identity depends on: source,
recipe, calibration, versions, device, instruction set, dtype, threads), how many parts the last start kept, and what
was read of the sources; each further line is one finished part with its shards' checksums and what the report will say
of it, or what was read of the sources since. A line is appended only after its shards are durable. On a restart the
identity must be equal, the sources must be what was read (`checkpoint.unchanged`), and the shards are verified; the
parts that hold are kept, and the run goes on at the first that doesn't.

The checkpoint grows in `OUT.partial/checkpoint`, which the last step renames to `OUT`. The journal goes after that: a
crash in between leaves a journal beside a complete `OUT`, and the next start only tidies up.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import Unreadable, parse_json, read_json
from llmshrink_eval.listing import named
from llmshrink_eval.refused import refused

from llmshrink.checkpoint.unchanged import Changed, Watched
from llmshrink.errors import OutputError
from llmshrink.run import disk
from llmshrink.run.difference import changed_beside, first_difference
from llmshrink.run.foreign import refuse_foreign
from llmshrink.run.lock import LOCK, Lock
from llmshrink.run.output import RECORD, check_output, entries, in_place, is_ours, partial_folder
from llmshrink.run.recordfile import check_line

JOURNAL = "journal.jsonl"
CHECKPOINT = "checkpoint"
OLD = "old"
ACTIVATIONS = "activations"
TRAINING = "training"
PUBLISHING = "publishing.json"
OURS = (
    *(JOURNAL, JOURNAL + ".tmp", LOCK, CHECKPOINT, OLD, ACTIVATIONS, TRAINING),
    *(PUBLISHING, PUBLISHING + ".tmp"),
)
"""All that a workspace ever holds; a folder with anything else in it is somebody else's."""


@dataclass(frozen=True)
class Part:
    """A finished part: its name ("block 3", "outside"), shard file -> {sha256, bytes, tensors}, and report rows."""

    name: str
    shards: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]

    @property
    def of_block(self) -> bool:
        """Whether it is one of the model's blocks, whose rows are the report's."""
        return self.name.startswith("block ")


class Workspace:
    """`OUT.partial`, locked for this process, with its journal and the growing checkpoint. Use as a context manager."""

    def __init__(self, output: Path, *, overwrite: bool) -> None:
        self.output = Path(os.path.abspath(output))
        if not self.output.name:
            raise OutputError(f"output {output} is the root of the disk; name a folder with -o")
        self.folder = partial_folder(self.output)
        self.checkpoint = self.folder / CHECKPOINT
        self.overwrite = overwrite
        self.parts: list[Part] = []
        self._sources: Mapping[str, Watched] = {}
        self._noted: dict[str, int] = {}
        self._lock = Lock(self.folder)
        self._made: list[Path] = []

    def __enter__(self) -> Workspace:
        for path in (self.folder, *(self.folder / name for name in OURS)):
            refuse_foreign(path)
        with suppress(OSError):
            self.folder.rmdir()  # empty: the crash came between the last two steps of a finished run
        if not self.journal.exists():
            check_output(self.output, overwrite=self.overwrite)
        if self.folder.is_dir() and any(path.name not in OURS for path in self.folder.iterdir()):
            raise OutputError(
                f"{self.folder} is in the way and wasn't written by llmshrink; choose another folder with -o"
            )
        self._made = [path for path in self.folder.parents if not path.exists()]
        self._lock.take(self.output)
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._lock.held:
            return
        if self.folder.is_dir() and not self.journal.exists():
            shutil.rmtree(self.folder)  # nothing was begun, so nothing is left
            for path in self._made:
                with suppress(OSError):
                    path.rmdir()
        self._lock.release()

    @property
    def journal(self) -> Path:
        return self.folder / JOURNAL

    def finished_bytes(self) -> int:
        """Bytes of the shards that are already in the workspace, whether or not they will be kept."""
        if not self.checkpoint.is_dir():
            return 0
        return sum(path.stat().st_size for path in named(self.checkpoint, "*.safetensors"))

    def begin(
        self,
        identity: dict[str, Any],
        sources: Mapping[str, Watched] | None = None,
        beside: Mapping[str, str] | None = None,
    ) -> list[Part] | None:
        """Open the journal for a run of this identity; returns the finished parts that still hold.

        sources: what is read meanwhile, by what it is for; each is held to what the run has read of it before.
        beside: sha256 of each file that is copied as it is; those of the run's first start are held to.

        What a training run of this identity left in `training` stays; it is the Trainer's to check.

        None: this very run was already published and only its journal was left; it is now tidied up.
        Raises OutputError when the folder holds another run's unfinished state, or the output exists, and
        `overwrite` isn't set; Changed, then too, when a source isn't what was read of it.
        """
        self._sources = sources or {}
        if self._aside.exists() and not self.output.exists():
            os.replace(self._aside, self.output)  # a crash in the middle of `publish`
        if (self.folder / PUBLISHING).exists():
            self._move_in()  # the same, inside an output that can't be renamed
        try:
            lines = _read_lines(self.journal)
        except OutputError:
            if not self.overwrite:
                raise
            lines = []
        differs = first_difference(lines[0].get("identity", {}), identity) if lines else None
        seen = _seen(lines)
        if differs is not None and not self.overwrite:
            # The same folder with other weights is better told as what it is.
            self._go_on_from({name: said for name, said in seen.items() if self._is_of(name, said)})
        if lines and differs is None and not self.checkpoint.exists() and is_ours(self.output):
            self._tidy()
            return None
        check_output(self.output, overwrite=self.overwrite)
        if lines and differs is None:
            differs = changed_beside(lines[0].get("beside"), beside)
        if differs is None:
            try:
                self._go_on_from(seen)
            except Changed as error:
                if not self.overwrite:
                    raise
                differs = str(error)
        if differs is not None and not self.overwrite:
            raise OutputError(f"{self.folder} holds an unfinished run {differs}, or start anew with --overwrite")
        self._rehearse()
        self.checkpoint.mkdir(exist_ok=True)
        self._as_private_as_the_output()
        self.parts = self._verified(lines[1:]) if lines and differs is None else []
        known = {name for part in self.parts for name in part.shards}
        stays = {LOCK, JOURNAL, CHECKPOINT} | ({TRAINING} if lines and differs is None else set())
        rest = [path for path in self.folder.iterdir() if path.name not in stays]
        said = {name: source.seen() for name, source in self._sources.items()}
        self._noted = {name: len(each["sums"]) for name, each in said.items()}
        for path in [*rest, *(p for p in self.checkpoint.iterdir() if p.name not in known)]:
            _remove(path)  # leftovers of a crash
        head = {"identity": identity, "kept": len(self.parts), "sources": said, "beside": beside}
        kept = [_line(head), *(_line(vars(part)) for part in self.parts)]
        disk.write_text(self.journal, "\n".join(kept) + "\n")
        return self.parts

    def _as_private_as_the_output(self) -> None:
        """Who may look into the output that is replaced may look into this one, and no one else, from the start."""
        if self.output.is_dir():
            mode = stat.S_IMODE(self.output.stat().st_mode)
            for folder in (self.folder, self.checkpoint):
                folder.chmod(mode | stat.S_IRWXU)

    def _verified(self, lines: list[dict[str, Any]]) -> list[Part]:
        """The longest run of parts from the start, in a run's order, whose shards are there with the right bytes."""
        held: list[Part] = []
        for line in lines:
            if "name" not in line:
                continue  # of what was read
            part = Part(line["name"], line["shards"], line["rows"])
            if not _follows(part, held):
                return held
            for name, shard in part.shards.items():
                path = self.checkpoint / name
                if (
                    not path.is_file()
                    or path.stat().st_size != shard["bytes"]
                    or disk.sha256_of(path) != shard["sha256"]
                ):
                    return held
            held.append(part)
        return held

    def _is_of(self, name: str, said: Mapping[str, Any]) -> bool:
        source = self._sources.get(name)
        return source is not None and source.seen()["folder"] == said["folder"]

    def _go_on_from(self, seen: Mapping[str, Mapping[str, Any]]) -> None:
        for name, said in seen.items():
            if name in self._sources:
                self._sources[name].go_on_from(said)

    def note_sources(self) -> None:
        """Write down what was read of the sources since that was last done."""
        new = {}
        for name, source in self._sources.items():
            said, noted = source.seen(), self._noted[name]
            if len(said["sums"]) > noted:
                new[name] = {**said, "sums": dict(list(said["sums"].items())[noted:])}
                self._noted[name] = len(said["sums"])
        if new:
            disk.append_line(self.journal, _line({"sources": new}))

    def finish_part(self, part: Part) -> None:
        self.note_sources()
        disk.append_line(self.journal, _line(vars(part)))
        self.parts.append(part)

    def check_sources(self) -> None:
        """Raise Changed where a source isn't what was read of it any more."""
        for source in self._sources.values():
            source.check_unchanged()

    def publish(self) -> None:
        """Give the checkpoint its final name: the last step of a run.

        An older output of ours is moved aside first and deleted after, so that `output` is absent for a moment but
        never mixed. Where it can't be renamed, its files are, one by one, the record last. Raises OutputError, with
        all that was done kept, where somebody put files there meanwhile, and Changed where a source did.
        """
        self.check_sources()
        check_output(self.output, overwrite=self.overwrite)
        disk.fsync_folder(self.checkpoint)
        if in_place(self.output):
            made = [path.name for path in self.checkpoint.iterdir()]
            # A folder of ours is known by its record: so that comes when all else is there.
            made.sort(key=lambda name: (name == RECORD, name == "config.json", name))
            disk.write_json(self.folder / PUBLISHING, {"old": entries(self.output), "new": made})
            self._move_in()
        else:
            if self.output.is_dir() and any(self.output.iterdir()):
                _remove(self._aside)
                disk.replace(self.output, self._aside)
            disk.replace(self.checkpoint, self.output)
        self._tidy()

    def _move_in(self) -> None:
        """Move the files of an older output aside and the checkpoint's in, one by one; goes on where it was stopped."""
        try:
            moved = read_json(self.folder / PUBLISHING)
            places = [*moved["old"], *moved["new"]]
        except (Unreadable, KeyError, TypeError) as error:
            raise self._unmoved() from error
        if not all(isinstance(name, str) and Path(name).name == name for name in places):
            raise self._unmoved()
        self._aside.mkdir(exist_ok=True)
        for name in moved["old"]:
            if os.path.lexists(self.output / name) and not os.path.lexists(self._aside / name):
                disk.replace(self.output / name, self._aside / name)
        for name in moved["new"]:
            if (self.checkpoint / name).exists():
                disk.replace(self.checkpoint / name, self.output / name)
        with suppress(FileNotFoundError):
            self.checkpoint.rmdir()
        (self.folder / PUBLISHING).unlink()
        disk.fsync_folder(self.folder)

    def _unmoved(self) -> OutputError:
        return OutputError(
            f"{self.folder / PUBLISHING} is damaged, so that it isn't known which files are in their place; "
            f"move those of {self.checkpoint} to {self.output} by hand, and remove {self.folder}"
        )

    def _rehearse(self) -> None:
        """Move an older output aside and back, as the end will; what can't be renamed now couldn't be then.

        Raises OutputError. A crash in between is one in the middle of `publish`.
        """
        if in_place(self.output) or not self.output.is_dir():
            return
        _remove(self._aside)
        try:
            disk.replace(self.output, self._aside)
        except OSError as error:
            raise OutputError(
                f"output {self.output} can't be renamed, so that the result couldn't take its place: "
                f"{refused(error, 'choose another folder with -o')}"
            ) from error
        finally:
            if self._aside.exists():
                disk.replace(self._aside, self.output)

    @property
    def _aside(self) -> Path:
        return self.folder / OLD

    def _tidy(self) -> None:
        """Remove what surrounds a published output, the journal last: until then a restart knows that all is done."""
        for path in self.folder.iterdir():
            if path != self.journal:
                _remove(path)
        self.journal.unlink()
        self.folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


def _follows(part: Part, held: list[Part]) -> bool:
    """Whether a run writes such a part behind those: blocks one after another, behind what isn't of one."""
    blocks = sum(each.of_block for each in held)
    if part.of_block:
        return bool(held) and part.name == f"block {blocks}"
    return not blocks and part.name not in {each.name for each in held}


def _line(value: dict[str, Any]) -> str:
    """A line of the journal: the CRC-32 of the rest as 8 hex digits, a space, JSON."""
    body = json.dumps(value)
    return f"{zlib.crc32(body.encode()):08x} {body}"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines, as far as each is what was written: from one that was cut off or changed on, parts are made again.

    Raises OutputError where not even the first is: it says which run this is, and was written whole.
    """
    raw = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    lines: list[dict[str, Any]] = []
    for each in raw:
        checksum, _, body = each.removesuffix(b"\n").partition(b" ")
        if not each.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(body):
            break
        try:
            value = parse_json(body)
            check_line(value, first=not lines)
        except (ValueError, TypeError, KeyError, AttributeError):
            break  # somebody else's, however right its checksum
        lines.append(value)
    if raw and not lines:
        why = "is of an earlier llmshrink" if raw[0].startswith(b"{") else "is damaged"
        raise OutputError(
            f"{path} {why}, so that its run can't go on; start anew with --overwrite, which deletes what was finished"
        )
    return lines


def _seen(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the lines say was read of each source, all together."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        for name, said in line.get("sources", {}).items():
            before = found.get(name, {"sums": {}})
            found[name] = {**said, "sums": {**before["sums"], **said["sums"]}}
    return found
