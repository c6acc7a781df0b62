"""Faults made on purpose, one a run: `python -m benchmarks.torture --faults` (`make torture-faults`).

Four verbs run on a tiny model. An undisturbed run of each tells every place in our code that calls the system for one
of its files. Then each of these calls fails in turn, with another error each time round (EIO, EROFS, EACCES and the
like); each file of what a killed run left is damaged in turn, in each way; and the system itself sets limits: of a
file's size, of open files, of a disk. Every run must end in the reference's bytes, or in one line on stderr with exit
code 1 or 2; the same command without a fault must then end in the reference's bytes too. Only damage may be refused
there instead, and is when the workspace has been removed.

The faults and their order follow from the seed and their number alone, so that `--start` goes on where a run stopped.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from benchmarks import tiny
from benchmarks.injected import Ended, Limits, Site, Strike, carried_out, on_small_disk, strike_at
from benchmarks.torture import contents, differences
from llmshrink.cli.stopping import BESIDE
from llmshrink.run.output import partial_folder

ERRORS = ("EIO", "EROFS", "EACCES", "ESTALE", "EFBIG", "ENOSPC", "EDQUOT", "EMFILE", "ENAMETOOLONG", "EPERM")
DAMAGES = ("flip", "cut", "empty", "longer", "gone", "folder", "link", "older")
LEAST = 1000
"""Faults that are made where no number is asked for, or as many as there are."""
KILLED_AT = (0.4, 0.7, 0.99)
"""Where runs are killed whose leavings are damaged, as shares of an undisturbed run's calls."""
SMALL = "--calibration story.txt --samples 2 --seq-len 32 --batch-size 2"
VERBS = {
    "quantize": f"quantize model -o out --group-size 32 {SMALL}",
    "prune": f"prune model -o out --recipe sparsegpt-2of4 {SMALL}",
    "convert": "convert sparse -o out --format llmshrink",
    "distill": "distill model w4 -o out --data story.txt --steps 2 --batch-size 2 --seq-len 32 --eval-steps 1",
}
SOURCES = {"w4": VERBS["quantize"], "sparse": VERBS["prune"]}
"""What verbs read, and the verb that makes it."""


@dataclass(frozen=True)
class Failing:
    """A call fails once."""

    verb: str
    strike: Strike

    def __str__(self) -> str:
        """As a line of the report names it."""
        return f"{self.verb}: {self.strike.error} at {self.strike.site}, time {self.strike.nth}"


@dataclass(frozen=True)
class Damaged:
    """A run was killed (the `killed`-th snapshot), and a file of what it left is damaged; chosen: where, in it."""

    verb: str
    killed: int
    file: str
    how: str
    chosen: int

    def __str__(self) -> str:
        """As a line of the report names it."""
        return f"{self.verb}, killed at {KILLED_AT[self.killed]:.0%}: {self.file} {self.how} ({self.chosen})"


@dataclass(frozen=True)
class Limited:
    """The system itself refuses: files beyond so many bytes, more open files, a disk of so many bytes, no output."""

    verb: str
    limits: Limits
    disk: int | None = None

    def __str__(self) -> str:
        """As a line of the report names it."""
        return f"{self.verb}: {f'a disk of {self.disk} bytes' if self.disk else self.limits}"


Fault = Failing | Damaged | Limited


def damage(path: Path, how: str, chosen: int, older: bytes, elsewhere: Path) -> None:
    """Do a kind of damage to a file. older: what it was before; elsewhere: a folder for what a link leads to."""
    data = bytearray(path.read_bytes())
    mode = path.stat().st_mode
    path.unlink()
    match how:
        case "flip" if data:
            data[chosen % len(data)] ^= 1 << chosen % 8
        case "cut":
            del data[chosen % (len(data) + 1) :]
        case "empty":
            data.clear()
        case "longer":
            data += b"\0more"
        case "older":
            data = bytearray(older)
        case "folder":
            path.mkdir()
        case "link":
            elsewhere.mkdir(exist_ok=True)
            (elsewhere / path.name).write_bytes(data)
            path.symlink_to(elsewhere / path.name)
    if how not in ("gone", "folder", "link"):
        path.write_bytes(data)
        path.chmod(mode)


@dataclass
class Bench:
    """A verb in a folder, and what an undisturbed run makes. sites: its calls, in order. snapshots: what killed runs
    left, file by file."""

    folder: Path
    verb: str
    reference: dict[str, bytes] = field(default_factory=dict)
    sites: tuple[Site, ...] = ()
    snapshots: list[dict[str, bytes]] = field(default_factory=list)

    @classmethod
    def made(cls, folder: Path, verb: str) -> Bench:
        """Look at an undisturbed run, and at killed ones. Raises RuntimeError where that doesn't end well."""
        bench = cls(folder, verb)
        bench.tidy()
        ended = bench.run(look=True)
        if ended.code:
            raise RuntimeError(f"the undisturbed run ended with {ended.code}: {ended.said}")
        bench.reference, bench.sites = contents(bench.output), ended.sites
        for number, share in enumerate(KILLED_AT):
            bench.tidy()
            bench.run(strike_at(bench.sites, int(len(bench.sites) * share), ""))
            bench.keep(number)
        bench.tidy()
        return bench

    @property
    def output(self) -> Path:
        """Where the run writes."""
        return self.folder / "out"

    def left(self) -> list[Path]:
        """The output, and what a run has beside it, where they are there."""
        return [path for path in (self.output, *(Path(f"{self.output}{each}") for each in BESIDE)) if path.exists()]

    def keep(self, number: int) -> None:
        """Take what a killed run left aside, as a snapshot."""
        kept = self.folder / f"kept-{self.verb}-{number}"
        kept.mkdir()
        for path in self.left():
            shutil.copytree(path, kept / path.name, symlinks=True, dirs_exist_ok=True)
        self.snapshots.append(contents(kept))

    def run(self, strike: Strike | None = None, limits: Limits | None = None, *, look: bool = False) -> Ended:
        """The command, with one fault or none."""
        words = words_in(self.folder, VERBS[self.verb], self.output)
        return carried_out(words, self.folder, strike, limits, look=look)

    def tidy(self) -> None:
        """Away with what a run wrote."""
        for path in (*self.left(), self.folder / "elsewhere"):
            shutil.rmtree(path, ignore_errors=True)

    def wrong(self) -> list[str]:
        """How the output differs from the reference."""
        return differences(self.reference, contents(self.output)) if self.output.exists() else ["there is no output"]

    def tried(self, fault: Fault) -> str:
        """What goes wrong with one fault; empty if nothing does."""
        self.tidy()
        match fault:
            case Failing():
                return self._then(self.run(fault.strike))
            case Damaged():
                return self._damaged(fault)
            case Limited() if fault.disk is None:
                return self._then(self.run(limits=fault.limits))
            case _:
                return self._on_small_disk(fault.disk or 0)

    def _then(self, first: Ended) -> str:
        """What is wrong with how a disturbed run ended, or with the same command after it."""
        if said := first.complaint():
            return said
        whole = self.output.exists() and not partial_folder(self.output).exists()
        if first.code == 0 or whole:
            return f"exit code {first.code}, and {self.wrong()}" if self.wrong() else ""
        if not self.left():
            return ""  # what is now run is the undisturbed run
        again = self.run()
        if again.code:
            return f"the same command without a fault: {again.complaint() or again.said.strip().splitlines()[-1]}"
        return f"after {first.said.strip().splitlines()[-1:]}: {self.wrong()}" if self.wrong() else ""

    def _damaged(self, fault: Damaged) -> str:
        shutil.copytree(self.folder / f"kept-{self.verb}-{fault.killed}", self.folder, dirs_exist_ok=True)
        older = self.snapshots[max(0, fault.killed - 1)].get(fault.file, b"")
        elsewhere = self.folder / "elsewhere"
        damage(self.folder / fault.file, fault.how, fault.chosen, older, elsewhere)
        before = contents(elsewhere) if elsewhere.exists() else {}
        again = self.run()
        if said := again.complaint():
            return said
        if before and contents(elsewhere) != before:
            return "what the link leads to was written"
        if again.code:
            # As the line said, or as anybody would: everything away, and once more.
            self.tidy()
            again = self.run()
            if again.code:
                return f"refused, and when all was removed: {again.said.strip().splitlines()[-1]}"
        return f"differs in {self.wrong()}" if self.wrong() else ""

    def _on_small_disk(self, size: int) -> str:
        place = self.folder / "disk"

        def act(resize: Callable[[int], None]) -> str:
            there = _OnDisk(self.folder, self.verb, self.reference)
            said = there.run().complaint()
            if said:
                return said
            resize(64 << 20)
            again = there.run() if not there.output.exists() else None
            if again is not None and again.code:
                return f"when the disk had room: {again.complaint() or again.said.strip().splitlines()[-1]}"
            return f"differs in {there.wrong()}" if there.wrong() else ""

        return on_small_disk(place, size, act)


class _OnDisk(Bench):
    """Its output is on the disk that `_on_small_disk` mounts."""

    @property
    def output(self) -> Path:
        return self.folder / "disk" / "out"


def words_in(folder: Path, line: str, output: Path) -> list[str]:
    """A command line's words, with the folder's own files named from the root."""
    own = {"model", "story.txt", *SOURCES}
    return [str(output) if word == "out" else str(folder / word) if word in own else word for word in line.split()]


def set_up(folder: Path, verbs: Collection[str] = tuple(VERBS)) -> None:
    """A model, a text, and what verbs read; all of them, and the verbs, are carried out once here."""
    from llmshrink.demo.language import text

    tiny.model(folder / "model")
    (folder / "story.txt").write_text(text(7, 20_000), encoding="utf-8")
    for name, line in SOURCES.items():
        tiny.carried_out_here(words_in(folder, line, folder / name))
    for verb in sorted(set(verbs) - {"quantize", "prune"}):
        tiny.carried_out_here(words_in(folder, VERBS[verb], folder / f"once-{verb}"))


def of_calls(bench: Bench, turn: int, but: Collection[Site] = ()) -> Iterator[Failing]:
    """Each call fails once, but those. turn: how often they have, so that another error comes, and another time."""
    sites = [site for site in dict.fromkeys(bench.sites) if site not in but]
    for number, site in enumerate(sites):
        times = bench.sites.count(site)
        yield Failing(bench.verb, Strike(site, turn % times, ERRORS[(number + turn) % len(ERRORS)]))


def of_files(bench: Bench, rng: random.Random) -> Iterator[Damaged]:
    """Each file of the last snapshot in each way; of earlier ones, each file in one way."""
    for killed, snapshot in enumerate(bench.snapshots):
        earlier = bench.snapshots[killed - 1] if killed else {}
        for number, file in enumerate(sorted(snapshot)):
            for at, how in enumerate(DAMAGES):
                if how == "older" and (file not in earlier or earlier[file] == snapshot[file]):
                    continue
                if how in ("flip", "cut") and not snapshot[file]:
                    continue
                if killed == len(KILLED_AT) - 2 or at == (number + killed) % len(DAMAGES):
                    yield Damaged(bench.verb, killed, file, how, rng.randrange(1 << 20))


def of_limits(bench: Bench) -> Iterator[Limited]:
    """Sizes of files, open files and disks between nothing and what the run takes; a full disk for what it prints."""
    largest = max(map(len, bench.reference.values()))
    whole = sum(map(len, bench.reference.values()))
    for step in range(8):
        yield Limited(bench.verb, Limits(file=4096 + (largest - 4096) * step // 7))
        yield Limited(bench.verb, Limits(opened=step))
        yield Limited(bench.verb, Limits(), disk=8192 + whole * (step + 1) // 5)
    yield Limited(bench.verb, Limits(full=True))


def faults(benches: Sequence[Bench], count: int | None, seed: int) -> list[Fault]:
    """All limits, all files, and each call that isn't another verb's too; a share of them where fewer are asked for,
    and calls again, of every verb, where more are. count: None is all of them once, and `LEAST` at least."""
    rng = random.Random(seed)
    found: list[Fault] = []
    seen: set[Site] = set()
    for bench in benches:
        found += [*of_limits(bench), *of_files(bench, rng), *of_calls(bench, seed, seen)]
        seen |= set(bench.sites)
    count = max(LEAST, len(found)) if count is None else count
    turn = seed + 1
    while len(found) < count:
        more: list[Fault] = [fault for bench in benches for fault in of_calls(bench, turn)]
        rng.shuffle(more)
        found += islice(more, count - len(found))
        turn += 1
    return [found[number * len(found) // count] for number in range(count)]


def made(count: int | None, seed: int, start: int = 0) -> list[str]:
    """Make faults, from the `start`-th, and print how it goes; count: as `faults` has it. Returns a line for each that
    ended as none should."""
    found: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        set_up(folder)
        benches = {verb: Bench.made(folder, verb) for verb in VERBS}
        for verb, bench in benches.items():
            files = sum(map(len, bench.snapshots))
            print(f"{verb}: {len(bench.sites)} calls from {len(set(bench.sites))} places, {files} files of killed runs")
        drawn = faults(list(benches.values()), count, seed)
        for number, fault in enumerate(drawn[start:], start):
            try:
                said = benches[fault.verb].tried(fault)
            except OSError as refused:
                if not isinstance(fault, Limited) or fault.disk is None:
                    raise
                print(f"fault {number}, {fault}: left out, {refused}", flush=True)
                continue
            if said:
                found.append(f"fault {number}, {fault}: {said}")
                print(found[-1], flush=True)
            if (number + 1) % 50 == 0:
                print(f"{number + 1} of {len(drawn)} faults, {len(found)} wrong", flush=True)
    return found
