"""Which configuration a kernel runs with: measured ones where there are any, a default that is right everywhere else.

A plan is a `Config` or the name of another way ("dequantize"), and belongs to a key: kernel, device, package version
and shape class, as one readable line. It is looked for in two tables, the first that has the key wins:

    the user's   $XDG_CACHE_HOME/llmshrink/kernels.json (~/.cache without it), what `search` found on this machine
    the shipped  configurations/*.json beside this file, from machines that the package was measured on: none so far

Nothing is searched at first use: no key in the tables means the kernel's own default. A cache is a convenience, so a
file that can't be read, an entry that makes no sense, or one that the compiler or the driver refuses when it is first
launched, is passed over with a notice and never an error; it is written whole and renamed into place, so that no reader
sees half of one. When two processes save at once one of the two results may be lost, and is found again by the next
search.

    {"version": 1, "plans": {"wna16 | NVIDIA H100 80GB HBM3 | 0.1.0 | ...": {"block_m": 16, ...} | "dequantize"}}
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from llmshrink_kernels import stopwatch
from llmshrink_kernels.device import notice

FORMAT = 1
SHIPPED = Path(__file__).with_name("configurations")
WAYS = ("dequantize",)
"""Plans that are no configuration of the fused kernel."""
TAKEN: dict[str, Sequence[int]] = {
    "block_m": (16, 32, 64, 128),
    "block_n": (64, 128),
    "block_k": range(1, 8193),
    "num_warps": (4, 8),
    "num_stages": range(1, 9),
    "split_k": range(1, 17),
}
"""What the kernels were compiled and checked for: searches try nothing else, and filed plans may hold nothing else."""


@dataclass(frozen=True)
class Config:
    """How a kernel is cut up.

    block_m, block_n, block_k: rows of x, output features and inputs that one program takes (a step of it, along the
    inputs). num_warps: its threads / 32. num_stages: steps in flight. split_k: programs that share the inputs.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int


Plan = Config | str
Clock = Callable[[Sequence[Callable[[], object]]], float]


@functools.cache
def version() -> str:
    """The installed package's version, a part of every key: another version's kernels may like other numbers."""
    try:
        return importlib.metadata.version("llmshrink")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def key(kernel: str, device: str, **shape: object) -> str:
    """The line that a plan is filed under; `shape` is whatever tells the kernel's shape classes apart, in order."""
    return " | ".join([kernel, device, version(), *(f"{name} {value}" for name, value in shape.items())])


def user_file() -> Path:
    """Where searches are remembered."""
    base = os.environ.get("XDG_CACHE_HOME")
    # The base directory specification: a relative path is to be ignored.
    root = Path(base) if base and Path(base).is_absolute() else Path(os.path.expanduser("~/.cache"))
    if not root.is_absolute():  # no home folder, as in a container under a number alone
        root = Path(tempfile.gettempdir()) / f"llmshrink-{os.getuid()}"
    return root / "llmshrink" / "kernels.json"


def lookup(name: str) -> Plan | None:
    """The plan filed under `name`, or None."""
    return None if name in _withdrawn else _tables(user_file()).get(name)


def withdraw(name: str, error: Exception) -> bool:
    """Whether what failed with `error` was a filed plan: it is then passed over for the rest of the process."""
    if lookup(name) is None:
        return False
    notice(
        f"llmshrink kernels: the configuration filed under {name!r} can't be launched"
        f" ({' '.join(str(error).split())[:120]}); the default is used"
    )
    _withdrawn.add(name)
    return True


def remember(name: str, plan: Plan) -> None:
    """File a plan in the user's cache, for this process and later ones."""
    path = user_file()
    plans = dict(_read(path)) | {name: plan}
    content = {other: asdict(found) if isinstance(found, Config) else found for other, found in plans.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump({"version": FORMAT, "plans": content}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
    _tables.cache_clear()
    _withdrawn.discard(name)


_withdrawn: set[str] = set()
"""Names whose plan was filed and could not be launched."""


@functools.cache
def _tables(user: Path) -> Mapping[str, Plan]:
    """The shipped plans with the user's over them; read once, as every call of a kernel asks."""
    plans: dict[str, Plan] = {}
    for path in [*sorted(SHIPPED.glob("*.json")), user]:
        plans |= _read(path)
    return plans


def _read(path: Path) -> dict[str, Plan]:
    """The plans of a file; those that make no sense are left out, with a notice."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != FORMAT:
            return {}
        entries = dict(content["plans"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        notice(f"llmshrink kernels: {path} can't be read ({error!r}) and is ignored; a new search writes it again")
        return {}
    plans = {name: _plan(entry) for name, entry in entries.items()}
    if None in plans.values():
        bad = next(name for name, plan in plans.items() if plan is None)
        notice(
            f"llmshrink kernels: {path} has entries that are no configuration ({bad!r} is one); they are ignored, and"
            " a new search replaces them"
        )
    return {name: plan for name, plan in plans.items() if plan is not None}


def _plan(entry: object) -> Plan | None:
    if isinstance(entry, str):
        return entry if entry in WAYS else None
    if not isinstance(entry, dict) or set(entry) != set(TAKEN):
        return None
    # type(): True is an int to isinstance.
    if not all(type(value) is int and value in TAKEN[name] for name, value in entry.items()):
        return None
    return Config(**entry)


@dataclass(frozen=True)
class Trial:
    """One candidate of a search: its median seconds, or why it has none."""

    plan: Plan
    seconds: float | None
    refused: str


def search(
    candidates: Sequence[Plan],
    run: Callable[[Plan, int], Tensor],
    accept: Callable[[Tensor], bool],
    *,
    copies: int = 1,
    clock: Clock | None = None,
) -> list[Trial]:
    """Try every candidate, fastest first; those that failed, or computed something else, come last and have no time.

    run: computes with a plan and a copy of the weight, by its number below `copies`. accept: whether that is the right
    result; a candidate is timed only when it is. clock: seconds of one of some calls that take turns, one for each copy
    (`stopwatch.seconds`, when not given). Raises RuntimeError when nothing passed.
    """
    measure = clock or stopwatch.seconds
    trials = []
    for plan in candidates:
        try:
            right = accept(run(plan, 0))
            calls = [functools.partial(run, plan, copy) for copy in range(copies)]
            trials.append(Trial(plan, measure(calls) if right else None, "" if right else "wrong result"))
        # A candidate that the compiler or the driver refuses (registers, shared memory) is only not the one.
        except Exception as error:
            trials.append(Trial(plan, None, f"{type(error).__name__}: {error}"))
    if all(trial.seconds is None for trial in trials):
        raise RuntimeError(f"none of {len(trials)} configurations gave the right result: {trials[:3]}")
    return sorted(trials, key=lambda trial: float("inf") if trial.seconds is None else trial.seconds)
