"""What this CPU multiplies fastest: GFLOP/s of one core in float32, bfloat16 and float16, and what `auto` takes.

    python -m benchmarks.arithmetic [--size 1024] [--rows 512 1]

Twice in turn: with all that the CPU has, and with torch and oneDNN kept from AVX-512 by `ATEN_CPU_CAPABILITY=avx2
ONEDNN_MAX_CPU_ISA=AVX2`, which is near a CPU with AVX2 alone. (float32 is MKL's, which the two don't bind.) Each is a
process of its own, since both are read once. CPU time is counted, and the best of all rounds taken, so that other work
on the machine disturbs least. Nothing is timed before the product has come near float64's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from llmshrink.run.arithmetic import DTYPE_NAMES, automatic, instructions
from llmshrink.run.asked import DTYPES

CAPS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
ROUNDS = 5
ROUND_SECONDS = 0.05
TURNS = 2


def measure(size: int, rows: int) -> dict[str, float]:
    """dtype -> GFLOP/s of x W^T on one core. x: [rows, size]; W: [size, size]."""
    torch.manual_seed(0)
    exact_x, exact_w = torch.randn(rows, size, dtype=torch.float64), torch.randn(size, size, dtype=torch.float64)
    found = {}
    for name in DTYPE_NAMES:
        x, w = exact_x.to(DTYPES[name]), exact_w.to(DTYPES[name])
        error = (torch.nn.functional.linear(x, w).double() - x.double() @ w.double().T).abs()
        allowed = 4 * torch.finfo(DTYPES[name]).eps * (x.double().abs() @ w.double().abs().T)
        assert (error <= allowed).all(), name
        best = min(_seconds(x, w) for _ in range(ROUNDS))
        found[name] = 2 * rows * size * size / best / 1e9
    return found


def _seconds(x: torch.Tensor, w: torch.Tensor) -> float:
    """CPU time of one product."""
    count, begin = 0, time.process_time()
    while count == 0 or time.process_time() - begin < ROUND_SECONDS:
        torch.nn.functional.linear(x, w)
        count += 1
    return (time.process_time() - begin) / count


def here(size: int, rows: list[int]) -> dict[str, object]:
    """What this process measures, with what `auto` takes for weights stored in each dtype."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        speeds = {count: measure(size, count) for count in rows}
    return {
        "instructions": instructions(torch.backends.cpu.get_cpu_capability()),
        "gflops": speeds,
        "auto": {name: asdict(automatic(name, "cpu")) for name in DTYPE_NAMES},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="of the square weight")
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 1], help="of x: tokens that are read together")
    parser.add_argument("--here", action="store_true", help="this process alone, as JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(here(options.size, options.rows)))
        return
    best: dict[str, dict[str, dict[str, float]]] = {}
    taken: dict[str, dict[str, str]] = {}
    for _ in range(TURNS):
        for caps in ({}, CAPS):
            found = _in_process(caps, options.size, options.rows)
            label = found["instructions"]
            taken[label] = {stored: each["dtype"] for stored, each in found["auto"].items()}
            for rows, speeds in found["gflops"].items():
                kept = best.setdefault(label, {}).setdefault(rows, {})
                kept |= {name: max(speed, kept.get(name, 0.0)) for name, speed in speeds.items()}
    for label, by_rows in best.items():
        chosen = ", ".join(f"{stored} in {dtype}" for stored, dtype in taken[label].items())
        print(f"{label}: auto computes {chosen}")
        for rows, speeds in by_rows.items():
            print(f"{rows:>6} rows  " + "  ".join(f"{name} {speed:.1f}" for name, speed in speeds.items()))
    print(json.dumps({"size": options.size, "gflops": best, "auto": taken}))


def _in_process(caps: dict[str, str], size: int, rows: list[int]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.arithmetic", "--here", "--size", str(size), "--rows", *map(str, rows)]
    clean = {name: value for name, value in os.environ.items() if name not in CAPS}
    done = subprocess.run(command, env={**clean, **caps}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
