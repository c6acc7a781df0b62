"""The machine: its processor, memory and GPUs, and what they allow.

torch is imported where a GPU is there and nowhere else: only it can say whether this build of it reaches that GPU.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmshrink.doctoring.found import Checked, Problem
from llmshrink.run.arithmetic import automatic
from llmshrink.run.arithmetic import processor as processor_here
from llmshrink.run.progress import size
from llmshrink.serving.processor import Processor, of_flags

INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 bfloat16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX bfloat16",
}
"""Flags of /proc/cpuinfo that decide how fast packed layers and vLLM's CPU build are, and their names."""
QUERY = "name,compute_cap,memory.total,memory.free,driver_version"
CUDA_TORCH = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"


def processor() -> Checked:
    """The CPU, its instruction sets, and the memory that a run may use."""
    import psutil

    described = _cpuinfo()
    flags = set(described.get("flags", "").split())
    sets = [name for flag, name in INSTRUCTIONS.items() if flag in flags]
    may_use = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    limit = _memory_limit()
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": described.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cores_usable": may_use,
        "instruction_sets": sets,
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
        "memory_limit_bytes": limit,
    }
    here = processor_here()
    facts["arithmetic"] = asdict(arithmetic := automatic("bfloat16", "cpu", here))
    notes = [f"computes models in bfloat16 in {arithmetic.dtype}: {arithmetic.why}; all others in float32"]
    if flags and "avx2" not in flags:
        notes.append("without AVX2 packed layers compute slowly, and vLLM's CPU build doesn't run")
    if limit is not None and limit < memory.total:
        notes.append(f"this container may use {size(limit)} of memory")
    line = (
        f"{facts['cpu']}, {may_use} of {facts['cores']} cores, {', '.join(sets) or 'no instruction set that helps'}; "
        f"memory {size(memory.total)}, {size(memory.available)} free"
    )
    return Checked("processor", facts, line, notes=notes)


def as_vllm_sees_it() -> Processor:
    """What of this CPU decides which kernels vLLM's CPU build has, without asking torch."""
    flags = _cpuinfo().get("flags", "").split()
    return of_flags(flags) if flags and platform.machine() in ("x86_64", "AMD64") else Processor()


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo, where there is one."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_limit() -> int | None:
    """Bytes that the container of this process may use, by cgroup v2; None without a limit."""
    try:
        said = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(said) if said.isdigit() else None


def gpu() -> Checked:
    """NVIDIA's GPUs as the driver sees them, whether torch reaches them, and what they allow."""
    seen, trouble = _driver()
    if trouble:
        problem = Problem(f"nvidia-smi fails: {trouble}", "mend or restart NVIDIA's driver until nvidia-smi answers")
        return Checked("gpu", {"gpus": []}, "the driver doesn't answer", [problem])
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not seen:
        return Checked("gpu", {"gpus": []}, "none: everything runs on the CPU, GPU kernels in plain torch")
    facts: dict[str, Any] = {"gpus": seen, "cuda_visible_devices": hidden}
    line = "; ".join(f"{each['name']} (capability {each['capability']}, {each['memory']})" for each in seen)
    notes = [f"{each['name']}: {'; '.join(each['allows'])}" for each in seen]
    if hidden is not None:
        notes.append(f"CUDA_VISIBLE_DEVICES={hidden}: programs see those alone")
    problems = [] if hidden == "" or importlib.util.find_spec("torch") is None else _reach(seen)
    return Checked("gpu", facts, line, problems + _compiler(), notes, slow="importing torch")


def _driver() -> tuple[list[dict[str, Any]], str | None]:
    """What nvidia-smi says of every GPU; and, where it is there and fails, its last words."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], None
    try:
        done = subprocess.run(
            [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [], "no answer within 20 s"
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        said = (lines or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [], None if "No devices were found" in said else said
    return [_described(line) for line in lines], None


def _described(line: str) -> dict[str, Any]:
    name, capability, total, free, driver = (part.strip() for part in line.split(","))
    mebi = 2**20
    major, minor = (int(part) for part in capability.split("."))
    return {
        "name": name,
        "capability": capability,
        "memory": size(int(total) * mebi),
        "memory_bytes": int(total) * mebi,
        "memory_free_bytes": int(free) * mebi,
        "driver": driver,
        "allows": allows((major, minor)),
    }


def allows(capability: tuple[int, int]) -> list[str]:
    """What a GPU of this compute capability can do of what matters here, in words.

    llmshrink's own bound is that of its kernels (llmshrink_kernels.device); vLLM's are the `get_min_capability` of its
    mixed-precision kernels, Marlin and Machete, read from 0.32. Tensor cores for fp8 came with Ada.
    """
    from llmshrink_kernels.device import OLDEST_CAPABILITY

    def yes(condition: bool) -> str:
        return "yes" if condition else "no"

    marlin, machete = capability >= (7, 5), capability[0] == 9
    engine = "Machete and Marlin" if machete else "Marlin" if marlin else "no kernel"
    return [
        f"llmshrink's kernels (2, 3, 4, 8 bits; 2:4): {yes(capability >= OLDEST_CAPABILITY)}",
        f"vLLM's 4 and 8 bits: {engine}",
        f"bfloat16 and 2:4 tensor cores: {yes(capability >= (8, 0))}",
        f"fp8 tensor cores: {yes(capability >= (8, 9))}",
    ]


def _reach(seen: Sequence[dict[str, Any]]) -> list[Problem]:
    """Whether the torch at hand computes on the GPUs that the driver sees."""
    import torch

    if torch.version.cuda is None:
        return [Problem(f"torch {torch.__version__} is a CPU build, and {seen[0]['name']} is there", CUDA_TORCH)]
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        what = f"torch {torch.__version__} can't use the GPU: {' '.join(str(error).split())}"
        return [Problem(what, f"update NVIDIA's driver, or {CUDA_TORCH}")]
    built = {name.removeprefix("sm_").rstrip("af") for name in torch.cuda.get_arch_list() if name.startswith("sm_")}
    majors = {name[:-1] for name in built}
    return [
        Problem(
            f"torch {torch.__version__} has no code for {each['name']} (capability {each['capability']})", CUDA_TORCH
        )
        for each in seen
        if each["capability"].partition(".")[0] not in majors
    ]


def _compiler() -> list[Problem]:
    """Triton builds a small launcher with a C compiler when a kernel first runs."""
    if importlib.util.find_spec("triton") is None:
        return [Problem("Triton isn't installed: the GPU computes packed layers in plain torch", "pip install triton")]
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return []
    return [Problem("Triton needs a C compiler and finds none", "install gcc or clang, or name one in CC")]
