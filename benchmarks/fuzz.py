"""Inputs that nobody would write: `python -m benchmarks.fuzz` (`make fuzz`), drawn by a seed.

Configs, tokenizers, chat templates, headers, weights' indexes, calibration records, recipes, records of finished runs,
journals and command lines are taken as they should be and changed: a value of another kind or size, a key gone or
twice, nesting, bytes flipped or cut. Each is then read by a verb that reads such a file, in a process that was forked
for the purpose and reads a few hundred. It must end with exit code 0, 1 or 2 within `PATIENCE` seconds, with a line
that says why and no traceback. What doesn't is kept, and named; and so is it an error when fewer inputs were drawn than
were asked for in the time.

    python -m benchmarks.fuzz --inputs 5000 --seed 0 --keep build/fuzz
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import tiny
from benchmarks.injected import PATIENCE, Ended, carried_out, printing_to, strike_at
from benchmarks.lines import VERBS, command_line
from benchmarks.strange import (
    changed_bytes,
    changed_generation,
    changed_json,
    changed_template,
    changed_text,
    changed_tokenizer,
)

MEMORY = 12 << 30
"""Bytes of addresses that a process may have: what wants more is a bomb that wasn't refused."""
LONGEST = 20_000
"""Characters that a command may print on stderr."""
TEXT = "--calibration talk.jsonl --samples 2 --seq-len 32"
SMALL = f"{TEXT} --group-size 32 --batch-size 2"
A_PROCESS = 200
"""Inputs that one process reads."""


@dataclass(frozen=True)
class Kind:
    """One kind of input. file: what is changed, below the folder; the first such. commands: what reads it, in turn.

    structured: whether it may be changed as JSON; else as text and bytes. share: of the inputs, in hundredths. own: how
    its JSON is changed, where not as any.
    """

    name: str
    file: str
    commands: tuple[str, ...]
    structured: bool
    share: int
    own: Callable[[str, random.Random], bytes] = changed_json


SAY = "generate model Once --max-new-tokens 2"
PLAN = f"plan model {SMALL}"
KINDS = (
    Kind("config", "model/config.json", (PLAN, "distill model w4 -o out --data talk.jsonl --dry-run"), True, 9),
    Kind("side file", "model/tokenizer.json", (PLAN, SAY), True, 4, changed_tokenizer),
    Kind("side file", "model/tokenizer_config.json", (PLAN, SAY), True, 4, changed_template),
    Kind("side file", "model/generation_config.json", (SAY,), True, 4, changed_generation),
    Kind("config", "w4/config.json", ("inspect w4", "generate w4 Once --max-new-tokens 1", "verify w4"), True, 4),
    Kind("header", "model/model.safetensors", (PLAN,), False, 4),
    Kind("header", "sharded/model.safetensors.index.json", (f"plan sharded {SMALL}",), True, 4),
    Kind("header", "w4/model-block-00000.safetensors", ("inspect w4", "verify w4"), False, 4),
    Kind("header", "sparse/model.safetensors.index.json", ("convert sparse -o out --format llmshrink",), True, 2),
    Kind("record", "w4/llmshrink.json", ("inspect w4", "push w4 user/name --dry-run", "serve w4 --dry-run"), True, 10),
    Kind("record", "w4/verify/verified.json", ("verify w4", "push w4 user/name --dry-run"), True, 3),
    Kind("record", "w4/README.md", ("push w4 user/name --dry-run",), False, 1),
    Kind("recipe", "recipe.yaml", (f"plan model --recipe recipe.yaml {TEXT}",), False, 14),
    Kind("calibration", "talk.jsonl", (PLAN, "distill model w4 -o out --data talk.jsonl --dry-run"), True, 11),
    Kind("journal", "half.partial/journal.jsonl", (f"quantize model -o half {SMALL}",), True, 11),
)
"""The rest are command lines."""


def changed(kind: Kind, data: bytes, rng: random.Random) -> bytes:
    """One input of a kind."""
    if kind.structured and rng.random() < 0.8:
        if not kind.file.endswith(".jsonl"):
            return kind.own(data.decode(), rng)
        lines = data.splitlines(keepends=True)
        # A journal's lines begin with their checksum, which whoever edits one may put right, or not.
        at = rng.randrange(len(lines))
        sum_, space, body = lines[at].partition(b" ") if kind.name == "journal" else (b"", b"", lines[at])
        body = changed_json(body.decode(), rng)
        if space and rng.random() < 0.8:
            sum_ = b"%08x" % zlib.crc32(body)
        lines[at] = sum_ + space + body + b"\n"
        return b"".join(lines)
    if kind.file.endswith((".yaml", ".jsonl", ".md")) and rng.random() < 0.8:
        return changed_text(data.decode(), rng)
    return changed_bytes(data, rng)


def complaint(ended: Ended) -> str:
    """What is wrong with how a command ended; empty if nothing. Several lines of error are what a recipe may have."""
    if ended.code is None or ended.code not in (0, 1, 2) or "Traceback" in ended.said:
        return ended.complaint() or f"exit code {ended.code}"
    if ended.code == 2 and "llmshrink: error: " not in ended.said:
        return f"exit code 2 and no line: {ended.said[-300:]!r}"
    return f"{len(ended.said):,} characters on stderr" if len(ended.said) > LONGEST else ""


def set_up(folder: Path) -> None:
    """What is changed and read: a model, the same in shards, outputs of ours, one half made, a text, a recipe.

    Every verb is carried out once here, so that processes forked from this one import nothing.
    """
    from safetensors.torch import load_file, save_file

    from llmshrink.recipe.read import load_recipe, to_yaml

    tiny.model(folder / "model")
    shutil.copytree(folder / "model", folder / "sharded")
    tensors = load_file(folder / "sharded" / "model.safetensors")
    (folder / "sharded" / "model.safetensors").unlink()
    names = sorted(tensors)
    where: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / "sharded" / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    talk = [{"role": "user", "content": "Once"}, {"role": "assistant", "content": "there was a fox. " * 40}]
    lines = [{"text": "There was a fox in the wood, and it was old. " * 20}] * 6 + [{"messages": talk}]
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "recipe.yaml").write_text(to_yaml(load_recipe("gptq-w4a16")))
    for line in (f"quantize model -o w4 {SMALL}", f"prune model -o sparse --recipe sparsegpt-2of4 {TEXT}"):
        tiny.carried_out_here(_absolute(line.split(), folder))
    for line in dict.fromkeys(
        [line for kind in KINDS for line in kind.commands] + [line for line, _ in VERBS.values()]
    ):
        if " -o half " not in line:
            tiny.carried_out_here(_absolute(line.split(), folder))
            shutil.rmtree(folder / "out", ignore_errors=True)
    half = _absolute(f"quantize model -o half {SMALL}".split(), folder)
    sites = carried_out(half, folder, look=True).sites
    shutil.rmtree(folder / "half")
    carried_out(half, folder, strike_at(sites, len(sites) * 7 // 10, ""))
    if not (folder / "half.partial" / "journal.jsonl").exists():
        raise RuntimeError("a run that was killed left no journal")
    shutil.copytree(folder / "half.partial", folder / "kept.partial")


def _absolute(words: Sequence[str], folder: Path) -> list[str]:
    """The words with the folder's own files named from the root."""
    own = {"model", "sharded", "sparse", "w4", "out", "cache", "half", "talk.jsonl", "recipe.yaml"}
    return [str(folder / word) if word in own else word for word in words]


class Reader:
    """A process forked from this one that carries out one command line after another."""

    def __init__(self, log: Path) -> None:
        self.log, self.done = log, 0
        (asked, self._ask), (self._answer, answer) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._ask)
            _read_on(asked, answer, log)
        os.close(asked)
        os.close(answer)

    def read(self, words: Sequence[str]) -> Ended:
        """How a command ends. Where it doesn't, or the process dies of it, that is over too (`over`)."""
        self.done += 1
        line = json.dumps(list(words)).encode() + b"\n"
        os.write(self._ask, len(line).to_bytes(8, "big") + line)
        if not select.select([self._answer], [], [], PATIENCE)[0]:
            self.done = A_PROCESS
            return Ended(None, "")
        said = os.read(self._answer, 1)
        if said:
            return Ended(said[0], self.log.read_text(errors="replace"))
        self.done = A_PROCESS
        return Ended(os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), self.log.read_text(errors="replace"))

    @property
    def over(self) -> bool:
        """Whether another should take its place."""
        return self.done >= A_PROCESS

    def close(self) -> None:
        """End the process."""
        for fd in (self._ask, self._answer):
            os.close(fd)
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            return


def _read_on(asked: int, answer: int, log: Path) -> None:
    """In the forked process, which this never leaves."""
    try:
        printing_to(log)
        from llmshrink.cli import run

        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        with os.fdopen(asked, "rb") as stream:
            while size := stream.read(8):
                words = json.loads(stream.read(int.from_bytes(size, "big")))
                os.ftruncate(1, 0)
                code = 70
                try:
                    code = run(words)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os.write(answer, bytes([code]))
    finally:
        os._exit(71)


class Fuzz:
    """Draws inputs by a seed, and keeps those that end as none should."""

    def __init__(self, folder: Path, seed: int, keep: Path | None) -> None:
        self.folder, self.rng, self.keep = folder, random.Random(seed), keep
        self.counts: Counter[str] = Counter()
        self.found: list[str] = []
        self._reader: Reader | None = None

    @property
    def count(self) -> int:
        """How many were drawn."""
        return self.counts.total()

    def one(self) -> None:
        """Draw one, and see how it ends."""
        drawn = self.rng.randrange(100)
        for kind in KINDS:
            if drawn < kind.share:
                return self._changed(kind)
            drawn -= kind.share
        words = command_line(self.rng)
        return self._tried("command line", words, " ".join(words).encode("utf-8", "replace"))

    def close(self) -> None:
        """End the process that reads."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _changed(self, kind: Kind) -> None:
        path = self.folder / kind.file
        before = path.read_bytes()
        data = changed(kind, before, self.rng)
        path.write_bytes(data)
        try:
            self._tried(kind.name, self.rng.choice(kind.commands).split(), data)
        finally:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(before)

    def _tried(self, name: str, words: Sequence[str], data: bytes) -> None:
        self.counts[name] += 1
        if self._reader is None:
            self._reader = Reader(self.folder / "log")
        ended = self._reader.read(_absolute(words, self.folder))
        if self._reader.over:
            self.close()
        said = complaint(ended)
        for left in ("out", "out.partial", "half"):
            shutil.rmtree(self.folder / left, ignore_errors=True)
        if name == "journal":
            shutil.rmtree(self.folder / "half.partial", ignore_errors=True)
            shutil.copytree(self.folder / "kept.partial", self.folder / "half.partial")
        if not said:
            return
        self.found.append(f"input {self.count}, {name}, {' '.join(words)[:80]}: {said}")
        print(self.found[-1], flush=True)
        if self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / f"{self.count}-{name.replace(' ', '-')}").write_bytes(data)


def run(goes_on: Callable[[int, float], bool], seed: int, keep: Path | None) -> Fuzz:
    """Draw inputs while `goes_on` (how many were drawn, seconds since the start)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        set_up(folder)
        fuzz = Fuzz(folder, seed, keep)
        started = time.monotonic()
        before = os.getcwd()
        os.chdir(folder)
        try:
            while goes_on(fuzz.count, time.monotonic() - started):
                fuzz.one()
                if fuzz.count % 500 == 0:
                    seconds = time.monotonic() - started
                    print(f"{fuzz.count} inputs in {seconds:.0f} s, {len(fuzz.found)} wrong", flush=True)
        finally:
            os.chdir(before)
            fuzz.close()
    return fuzz


def main() -> int:
    """1 and a line for each input that ended as none should, and where there wasn't the time for all; or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="so long at most, however few that are; else 10, and all of them")
    parser.add_argument("--inputs", type=int, default=5000, help="so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where inputs that end wrong are kept")
    arguments = parser.parse_args()
    most = 60 * (10 if arguments.minutes is None else arguments.minutes)
    fuzz = run(lambda count, seconds: count < arguments.inputs and seconds < most, arguments.seed, arguments.keep)
    print(", ".join(f"{count} of {name}" for name, count in fuzz.counts.most_common()))
    print(f"{fuzz.count} inputs, {len(fuzz.found)} wrong")
    if arguments.minutes is None and fuzz.count < arguments.inputs:
        print(f"{arguments.inputs} were asked for, and 10 minutes were over: a quieter machine is needed")
        return 1
    return 1 if fuzz.found else 0


if __name__ == "__main__":
    sys.exit(main())
