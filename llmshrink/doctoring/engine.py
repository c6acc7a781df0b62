"""vLLM: whether it is there, new enough, of the right build, and whether it will find llmshrink's plugin.

The plugin is looked for as vLLM looks for it: an entry point of its group, let through by VLLM_PLUGINS, that loads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from packaging.requirements import Requirement

from llmshrink.doctoring import machine, packages
from llmshrink.doctoring.found import Checked, Problem
from llmshrink.serving.launch import INSTALL_CPU, INSTALL_CUDA, Installed, installed
from llmshrink.serving.processor import Processor
from llmshrink.serving.vllm.plugin import GROUP, KERNELS, NAME, kernels_place

ALLOWED = "VLLM_PLUGINS"
WITHOUT = {
    "AVX-512": "this CPU has no AVX-512: vLLM has no int4 kernel and no cache of FP8 for it; llmshrink's plugin serves "
    "4 bits",
    "VNNI": "this CPU has no VNNI: vLLM's own products of int8 overflow; llmshrink's plugin computes them",
}


def vllm(*, gpus: int, processor: Processor | None = None) -> Checked:
    """What serves, and the plugin in it. gpus: how many the driver sees. processor: the CPU; None: this one."""
    engine = installed()
    line = INSTALL_CUDA if gpus else INSTALL_CPU
    if engine is None:
        return Checked("vllm", {"version": None, "plugin": None}, f"not installed; to serve or verify with it: {line}")
    state, problems = _plugin(list(entry_points(group=GROUP)), os.environ.get(ALLOWED))
    oldest = _oldest()
    if oldest is not None and not oldest.specifier.contains(engine.version, prereleases=True):
        problems.append(Problem(f"{engine.distribution} {engine.version}: llmshrink needs {oldest.specifier}", line))
    if gpus and engine.cpu:
        problems.append(Problem(f"{engine.distribution} {engine.version} is a CPU build, and a GPU is there", line))
    try:
        kernels_place(os.environ.get(KERNELS))
    except ValueError as error:
        problems.append(Problem(str(error), f"unset {KERNELS}"))
    lacks = sorted((processor or machine.as_vllm_sees_it()).lacks) if engine.cpu else []
    facts: dict[str, Any] = {
        "distribution": engine.distribution,
        "version": engine.version,
        "plugin": state,
        "cpu_lacks": lacks,
    }
    notes = [WITHOUT[instructions] for instructions in lacks]
    return Checked("vllm", facts, f"{_named(engine)}; the plugin {state}", problems, notes)


def _named(engine: Installed) -> str:
    return f"{engine.version}{' for CPUs' if engine.cpu else ''} ({engine.distribution})"


def _oldest() -> Requirement | None:
    """What llmshrink's extra `vllm` asks for, where llmshrink is installed."""
    ours = packages.find(packages.OURS)
    asked = [Requirement(text) for text in ours.requires] if ours else []
    return next((requirement for requirement in asked if requirement.name == "vllm"), None)


def _plugin(found: Sequence[EntryPoint], allowed: str | None) -> tuple[str, list[Problem]]:
    """Whether vLLM will run llmshrink's plugin, in a word; and why not. allowed: VLLM_PLUGINS, as it is set."""
    ours = next((entry for entry in found if entry.name == NAME), None)
    if ours is None:
        fix = "pip install --force-reinstall --no-deps llmshrink (or pip install -e . in the checkout)"
        return "isn't seen", [Problem(f"no entry point {NAME} in {GROUP}: vLLM can't find llmshrink's plugin", fix)]
    if allowed is not None and NAME not in allowed.split(","):
        fix = f"unset {ALLOWED}, or add {NAME} to it"
        return "is switched off", [Problem(f"{ALLOWED}={allowed!r} keeps llmshrink's plugin out of vLLM", fix)]
    try:
        ours.load()
    except Exception as error:  # whatever an import may raise: vLLM would log it and go on without the plugin
        said = " ".join(str(error).split())
        fix = "pip install --force-reinstall --no-deps llmshrink"
        return "fails to load", [Problem(f"llmshrink's plugin {ours.value}: {type(error).__name__}: {said}", fix)]
    return "is seen", []
