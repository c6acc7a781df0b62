"""Inputs that nobody would write: `python -m benchmarks.fuzz` (`make fuzz`), bounded by time and drawn by a seed.

Configs, headers, weights' indexes, calibration records, recipes, records of finished runs, journals and command lines
are taken as they should be and changed: a value of another kind or size, a key gone or twice, nesting, bytes flipped or
cut. Each is then read by the verb that reads such a file, in a process of its own. It must end with exit code 0, 1 or 2
within `PATIENCE` seconds, with a line that says why and no traceback. What doesn't is kept, and named.

    python -m benchmarks.fuzz --minutes 10 --seed 0 --keep build/fuzz
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.faults import Ended, Fault, carried_out

MEMORY = 12 << 30
"""Bytes of addresses that a process may have: what wants more is a bomb that wasn't refused."""
LONGEST = 20_000
"""Characters that a command may print on stderr."""
DEEP = 3000
"""Levels of a JSON value that no reader should follow."""
MORE_KEYS = ("x", "quantization_config", "text_config", "auto_map", "layer_types", "")
MORE_BYTES = (b"\0", b"\xff\xfe", b"[" * DEEP, b"9" * 5000, b'{"a":1}', b"&a [*a,*a]", b"\n- ")
MORE_LINES = ("a: &a [1, 2]", "b: *a", "2020-01-01: 1", "? [a]", "- " * 400, "\t", "!!python/x y")
SMALL = "--calibration talk.jsonl --samples 2 --seq-len 32 --group-size 32 --batch-size 2"


@dataclass(frozen=True)
class Kind:
    """One kind of input. file: what is changed, below the folder; the first such. command: what reads it.

    structured: whether it may be changed as JSON; else as text and bytes. share: of the inputs.
    """

    name: str
    file: str
    command: tuple[str, ...]
    structured: bool
    share: float


KINDS = (
    Kind("config", "model/config.json", ("plan", "model"), True, 5),
    Kind("header", "model/model.safetensors", ("plan", "model"), False, 3),
    Kind("index", "sharded/model.safetensors.index.json", ("plan", "sharded"), True, 2),
    Kind("tokenizer", "model/tokenizer_config.json", ("plan", "model"), True, 1),
    Kind("generation", "model/generation_config.json", ("plan", "model"), True, 1),
    Kind("recipe", "recipe.yaml", ("plan", "model", "--recipe", "recipe.yaml"), False, 4),
    Kind("output's config", "made/config.json", ("inspect", "made"), True, 2),
    Kind("record", "made/llmshrink.json", ("inspect", "made"), True, 3),
    Kind("output's header", "made/*.safetensors", ("inspect", "made"), False, 2),
    Kind("calibration", "talk.jsonl", ("quantize", "model", "-o", "out", *SMALL.split()), True, 0.5),
    Kind("journal", "half.partial/journal.jsonl", ("quantize", "model", "-o", "half", *SMALL.split()), False, 0.5),
)


def nested(levels: int) -> list[Any]:
    """A list in a list, so deep."""
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


def strange(rng: random.Random) -> Any:
    """A value that hardly anybody expects."""
    return rng.choice(
        (
            *(0, -1, 1, 2, 7, 2**31, 2**63, -(2**63), 10**12, 10**30, 10**400, 0.0, -0.5, 1e308, 1e-320),
            *(float("nan"), float("inf"), float("-inf"), True, False, None, "", "x", "0", "-1", "auto", "float16"),
            *("\0", "\ud800", "\u202e", "../../etc/passwd", "a" * 10_000, "\n\n", "{{ 1 }}", "http://x", "~nobody/x"),
            *([], {}, [0], [None], ["x", 1], {"": 0}, {"x": {"x": 1}}, [1e400], [[[[[[]]]]]]),
        )
    )


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys that lead to it."""
    found = [path] if path else []
    if isinstance(tree, dict | list):
        for key, each in tree.items() if isinstance(tree, dict) else enumerate(tree):
            found += places(each, (*path, key))
    return found


def changed_json(text: str, rng: random.Random) -> bytes:
    """JSON with one to three changes of its values or keys."""
    tree = json.loads(text)
    raw = ""
    for _ in range(rng.randint(1, 3)):
        known = places(tree)
        if not known:
            break
        *way, last = rng.choice(known)
        holder = tree
        for key in way:
            holder = holder[key]
        match rng.randrange(8):
            case 0:
                del holder[last]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("x", "quantization_config", "text_config", "auto_map", "layer_types"))] = strange(
                    rng
                )
            case 2:
                holder[last] = "@deep@"
                raw = "[" * DEEP + "]" * DEEP
            case 3 if isinstance(holder[last], int | float):
                holder[last] = holder[last] * rng.choice((-1, 0, 2, 1000, 10**9))
            case _:
                holder[last] = strange(rng)
    if rng.random() < 0.03:
        tree = strange(rng)
    written = json.dumps(tree)
    return written.replace('"@deep@"', raw or "[]").encode("utf-8", "surrogatepass")


def changed_bytes(data: bytes, rng: random.Random, first: int = 4096) -> bytes:
    """Bytes flipped, cut, put in or taken out, near the beginning as a rule."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(len(found), first if rng.random() < 0.9 else len(found))))
        match rng.randrange(5):
            case 0 if found:
                found[at % len(found)] ^= 1 << rng.randrange(8)
            case 1:
                del found[at:]
            case 2:
                found[at:at] = rng.choice(
                    (b"\0", b"\xff\xfe", b"[" * DEEP, b"9" * 5000, b'{"a":1}', b"&a [*a,*a]", b"\n- ")
                )
            case 3:
                del found[at : at + rng.randrange(1, 64)]
            case _:
                found[at : at + 8] = rng.randbytes(8)
    return bytes(found)


def changed_text(text: str, rng: random.Random) -> bytes:
    """Lines of YAML or JSON Lines twice, gone, in another order or with another value."""
    lines = text.splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines)) if lines else 0
        match rng.randrange(5):
            case 0 if lines:
                lines.insert(at, lines[at])
            case 1 if lines:
                del lines[at]
            case 2:
                lines.insert(
                    at,
                    rng.choice(("a: &a [1, 2]", "b: *a", "2020-01-01: 1", "? [a]", "- " * 400, "\t", "!!python/x y")),
                )
            case _ if lines:
                key, colon, _ = lines[at].partition(":")
                value = json.dumps(strange(rng))
                lines[at] = f"{key}{colon} {value}" if colon else value
    return "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")


def changed(kind: Kind, data: bytes, rng: random.Random) -> bytes:
    """One input of a kind."""
    if kind.structured and rng.random() < 0.8:
        if not kind.file.endswith(".jsonl"):
            return changed_json(data.decode(), rng)
        lines = data.decode().splitlines()
        at = rng.randrange(len(lines))
        return b"\n".join(changed_json(each, rng) if n == at else each.encode() for n, each in enumerate(lines))
    if kind.file.endswith((".yaml", ".jsonl")) and rng.random() < 0.8:
        return changed_text(data.decode(), rng)
    return changed_bytes(data, rng)


OPTIONS = (
    *("--samples", "--seq-len", "--group-size", "--bits", "--batch-size", "--seed", "--set", "--recipe", "--dtype"),
    *("--device", "--calibration", "--format", "--work-dir", "--max-shard-size", "--kv-cache", "--bos", "--revision"),
)
VERBS = (("plan", "model"), ("quantize", "model", "-o", "out", "--dry-run"), ("inspect", "made"), ("verify", "made"))


def command_line(rng: random.Random) -> list[str]:
    """A verb with options that hardly fit."""
    words = list(rng.choice(VERBS))
    for _ in range(rng.randint(1, 3)):
        value = strange(rng)
        text = value if isinstance(value, str) else json.dumps(value)[:2000]
        words += [rng.choice(OPTIONS), text.replace("\0", "").encode("utf-8", "replace").decode()]
    if rng.random() < 0.2:
        words[1] = rng.choice(("~nobody/x", "a" * 300, "..", "/proc/self/mem", "nowhere/nothing", "/dev/null", "x\ny"))
    return words


def complaint(ended: Ended) -> str:
    """What is wrong with how a command ended; empty if nothing. Several lines of error are what a recipe may have."""
    if ended.code is None or ended.code not in (0, 1, 2) or "Traceback" in ended.said:
        return ended.complaint() or f"exit code {ended.code}"
    if ended.code == 2 and "llmshrink: error: " not in ended.said:
        return f"exit code 2 and no line: {ended.said[-300:]!r}"
    return f"{len(ended.said):,} characters on stderr" if len(ended.said) > LONGEST else ""


def set_up(folder: Path) -> None:
    """What is changed and read: a model, the same in shards, an output of ours, one half made, a text, a recipe."""
    from safetensors.torch import load_file, save_file

    from llmshrink.demo import model_folder
    from llmshrink.recipe.read import load_recipe, to_yaml

    shutil.copytree(model_folder(), folder / "model")
    shutil.copytree(model_folder(), folder / "sharded")
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


def made_outputs(folder: Path) -> None:
    """A finished output, and the workspace of a run that was killed on its way, by the command itself."""
    made = carried_out(_absolute(["quantize", "model", "-o", "made", *SMALL.split()], folder), folder, None)
    if made.code:
        raise RuntimeError(f"a run of the model as it is ended with {made.code}: {made.said}")
    killed = Fault(made.calls * 6 // 10, "")
    carried_out(_absolute(["quantize", "model", "-o", "half", *SMALL.split()], folder), folder, killed)
    if not (folder / "half.partial" / "journal.jsonl").exists():
        raise RuntimeError("a run that was killed left no journal")
    shutil.copytree(folder / "half.partial", folder / "kept.partial")


def _absolute(words: Sequence[str], folder: Path) -> list[str]:
    """The words with the folder's own files named from the root."""
    own = {"model", "sharded", "made", "out", "half", "talk.jsonl", "recipe.yaml"}
    return [str(folder / word) if word in own else word for word in words]


class Fuzz:
    """Draws inputs by a seed, and keeps those that end as none should."""

    def __init__(self, folder: Path, seed: int, keep: Path | None) -> None:
        self.folder, self.rng, self.keep = folder, random.Random(seed), keep
        self.count = 0
        self.found: list[str] = []

    def one(self) -> None:
        """Draw one, and see how it ends."""
        self.count += 1
        if self.rng.random() < 0.2:
            words = command_line(self.rng)
            self._tried("command line", words, " ".join(words).encode("utf-8", "replace"))
            return
        (kind,) = self.rng.choices(KINDS, [kind.share for kind in KINDS])
        path = min(self.folder.glob(kind.file))
        before = path.read_bytes()
        data = changed(kind, before, self.rng)
        path.write_bytes(data)
        try:
            self._tried(kind.name, kind.command, data)
        finally:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(before)

    def _tried(self, name: str, words: Sequence[str], data: bytes) -> None:
        ended = carried_out(_absolute(words, self.folder), self.folder / "nothing", None, memory=MEMORY)
        said = complaint(ended)
        for left in ("out", "out.partial", "half", "half.partial"):
            shutil.rmtree(self.folder / left, ignore_errors=True)
        shutil.copytree(self.folder / "kept.partial", self.folder / "half.partial")
        if not said:
            return
        self.found.append(f"input {self.count}, {name}: {said}")
        print(self.found[-1], flush=True)
        if self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / f"{self.count}-{name.replace(' ', '-')}").write_bytes(data)


def run(goes_on: Callable[[int, float], bool], seed: int, keep: Path | None) -> Fuzz:
    """Draw inputs while `goes_on` (how many were drawn, seconds since the start)."""
    for each in ("transformers.models.llama.modeling_llama", "llmshrink.run.quantize", "llmshrink.planning.plan"):
        import_module(each)  # once, before the processes are forked
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        set_up(folder)
        made_outputs(folder)
        fuzz = Fuzz(folder, seed, keep)
        started = time.monotonic()
        while goes_on(fuzz.count, time.monotonic() - started):
            fuzz.one()
            if fuzz.count % 100 == 0:
                print(f"{fuzz.count} inputs, {len(fuzz.found)} wrong", flush=True)
    return fuzz


def main() -> int:
    """1 and a line for each input that ended as none should, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--inputs", type=int, default=5000, help="at most so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where inputs that end wrong are kept")
    arguments = parser.parse_args()
    fuzz = run(
        lambda count, seconds: count < arguments.inputs and seconds < 60 * arguments.minutes,
        arguments.seed,
        arguments.keep,
    )
    print(f"{fuzz.count} inputs, {len(fuzz.found)} wrong")
    return 1 if fuzz.found else 0


if __name__ == "__main__":
    sys.exit(main())
