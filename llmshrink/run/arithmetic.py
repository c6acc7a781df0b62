"""What a model is computed in where nobody asks for a dtype: one decision, for every verb, with its reason.

A CPU multiplies bfloat16 several times as fast as float32 where it has instructions for it (AVX512-BF16, AMX, bf16 of
Arm), and several times as slowly where it hasn't: torch then brings every number to float32 in plain loops. It
multiplies float16 as slowly wherever that was measured (`python -m benchmarks.arithmetic`; never with AVX512-FP16 or
AMX-FP16), and float16 has the smaller range. float32 holds both without loss. So a CPU computes bfloat16 in bfloat16 if
it has instructions for it, and all else in float32; a GPU computes as stored.

Whether it has is read from the CPU's flags, and from the variables that keep torch from using them. Nothing is timed:
the same machine gives the same answer. torch isn't imported, so that the doctor answers without it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
DTYPE_NAMES = ("float32", "bfloat16", "float16")
BFLOAT16 = ("amx_bf16", "avx512_bf16")
"""Flags of x86 CPUs that multiply bfloat16; oneDNN takes the first that is there."""
ATEN, ONEDNN = "ATEN_CPU_CAPABILITY", ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
ATEN_BELOW = ("default", "avx2")
"""Values of ATEN_CPU_CAPABILITY at which torch's own kernels have no AVX-512."""
ONEDNN_BELOW = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")
"""Values of ONEDNN_MAX_CPU_ISA at which oneDNN, which has the products, leaves out bfloat16's instructions."""


@dataclass(frozen=True)
class Processor:
    """bfloat16: the flag of the instructions by which this process multiplies bfloat16, empty where it doesn't.

    why: the same in words, for a person. caps: the variables of the environment that make it so, as NAME=value.
    """

    bfloat16: str
    why: str
    caps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arithmetic:
    """dtype: float32, bfloat16 or float16. why: in words, after "computed in DTYPE: "."""

    dtype: str
    why: str


def processor(cpuinfo: str | None = None, environment: Mapping[str, str] | None = None) -> Processor:
    """What this process may use of its CPU. cpuinfo: text of /proc/cpuinfo; environment: variables; None: the real."""
    environment = os.environ if environment is None else environment
    if cpuinfo is None:
        try:
            cpuinfo = CPUINFO.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return Processor("", f"there is no {CPUINFO} that would say whether this CPU multiplies bfloat16")
    found = re.search(r"^(flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    kind, flags = (found[1], set(found[2].split())) if found else ("flags", set[str]())
    if kind == "Features":
        return _said("bf16") if "bf16" in flags else _said("")
    has = next((flag for flag in BFLOAT16 if flag in flags), "")
    caps = _caps(environment)
    if has and caps:
        keep = "keeps" if len(caps) == 1 else "keep"
        return Processor("", f"{' and '.join(caps)} {keep} torch from this CPU's bfloat16 instructions", caps)
    return _said(has)


def _said(flag: str) -> Processor:
    return Processor(
        flag, f"this CPU multiplies bfloat16 ({flag})" if flag else "this CPU has no bfloat16 instructions"
    )


def _caps(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The variables that keep torch from bfloat16's instructions on x86. One with a value that torch and oneDNN don't
    know does nothing there either; of oneDNN's two names it reads the newer one first."""
    onednn = next((name for name in ONEDNN if environment.get(name)), "")
    low = [(ATEN, ATEN_BELOW)] + ([(onednn, ONEDNN_BELOW)] if onednn else [])
    # torch takes its names in small letters alone.
    own = {ATEN: environment.get(ATEN, ""), **({onednn: environment[onednn].lower()} if onednn else {})}
    return tuple(f"{name}={environment[name]}" for name, below in low if own[name] in below)


def automatic(stored: str, device: str, here: Processor | None = None, *, int4: bool = False) -> Arithmetic:
    """What `auto` computes in.

    stored: the dtype of most weights, without "torch.". device: cpu or cuda. here: the processor; None: this one. int4:
    whether weights of 4 or 8 bits stay packed, so that torch's int4 product multiplies them, which is fast in bfloat16
    on every CPU.
    """
    if stored not in DTYPE_NAMES:
        return Arithmetic("float32", f"weights are stored in {stored}, which nothing is computed in")
    if device != "cpu" or stored == "float32":
        return Arithmetic(stored, "as it is stored")
    if stored == "float16":
        return Arithmetic("float32", "torch multiplies float16 on a CPU more slowly than float32")
    if int4:
        return Arithmetic("bfloat16", "torch's int4 product on a CPU takes bfloat16")
    here = processor() if here is None else here
    return Arithmetic("bfloat16" if here.bfloat16 else "float32", here.why)


def automatic_training(device: str, here: Processor | None = None) -> Arithmetic:
    """What forwards and backwards of float32 weights compute in: bfloat16 where the device multiplies it."""
    if device != "cpu":
        return Arithmetic("bfloat16", "GPUs multiply bfloat16")
    here = processor() if here is None else here
    return Arithmetic("bfloat16" if here.bfloat16 else "float32", here.why)


def instructions(level: str, here: Processor | None = None) -> str:
    """The instruction set that decides the last bits of a sum. level: `torch.backends.cpu.get_cpu_capability()`.

    CPUs of one level differ in whether they multiply bfloat16, and those that do round its sums otherwise.
    """
    flag = (processor() if here is None else here).bfloat16
    return f"{level} with {flag}" if flag else level
