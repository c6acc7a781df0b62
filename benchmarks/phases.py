"""Where the time of a quantization goes: `python -m benchmarks.phases --llama 8b` (what `make gpu-quantize` runs).

Makes a random Llama (Llama-3-8B's shape, or a smaller one) in a temporary folder, or takes MODEL, quantizes it once
with its functions wrapped by clocks, and prints the seconds of each phase: forwards, Hessians, factorisation, sweep,
I/O, and all else. A phase's seconds are its own, without what it called of another; on a CUDA device every boundary
waits for the device, so that the phases are right and their sum is a little more than a run without clocks takes.
Beside them the peak of device memory and of the process's own.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SHAPES = {
    "8b": {"hidden": 4096, "ffn": 14336, "layers": 32, "shard_layers": 4, "vocabulary": 128256},
    "1b": {"hidden": 2048, "ffn": 8192, "layers": 16, "shard_layers": 4, "vocabulary": 128256},
    "tiny": {"hidden": 256, "ffn": 768, "layers": 4, "shard_layers": 2, "vocabulary": 512},
}
GOAL_SECONDS = 60.0
"""For 128 x 2048 tokens of the 8B shape on an H100 or H200, excluding I/O; not measured yet."""


class Clock:
    """Seconds by phase, each without the phases inside it."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._stack: list[str] = []
        self._since = time.perf_counter()

    def _turn(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._stack[-1] if self._stack else "all else"] += now - self._since
        self._since = now

    def around(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted as `phase`."""

        @functools.wraps(function)
        def timed(*args: Any, **named: Any) -> Any:
            self._turn()
            self._stack.append(phase)
            try:
                return function(*args, **named)
            finally:
                self._turn()
                self._stack.pop()

        return timed

    def wrap(self) -> None:
        """Put clocks around everything that a phase is made of, in the modules that call it."""
        from llmshrink.calibration.statistics import Statistics
        from llmshrink.checkpoint.index import CheckpointIndex
        from llmshrink.methods import gptq
        from llmshrink.model.blocks import Call
        from llmshrink.model.chain import Chain
        from llmshrink.model.paused import PausedForward
        from llmshrink.run import quantize

        for phase, place, name in (
            ("forwards", PausedForward, "advance"),
            ("forwards", Call, "run"),
            ("forwards", Chain, "logits"),
            ("Hessians", Statistics, "add"),
            ("factorisation", gptq, "factorise"),
            ("factorisation", gptq, "corrected"),
            ("sweep", gptq, "trial_sweep_"),
            ("sweep", gptq, "sweep_"),
            ("I/O", CheckpointIndex, "read"),
            ("I/O", CheckpointIndex, "fingerprint"),
            ("I/O", quantize, "write_part"),
        ):
            setattr(place, name, self.around(phase, getattr(place, name)))


def main() -> int:
    """Quantize once and print the phases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder; left out: a random Llama")
    parser.add_argument("--llama", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--recipe", default="gptq-w4a16")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", help="left out: CUDA where it is there")
    parser.add_argument("-o", "--output", type=Path, help="a folder for the figures as JSON")
    arguments = parser.parse_args()
    import llmshrink
    from benchmarks.make_llama import write
    from llmshrink.run.asked import pick_device
    from llmshrink.run.progress import peak_memory

    device = pick_device(arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(arguments.model) if arguments.model else Path(scratch) / "model"
        if not arguments.model:
            write(model, seed=0, **SHAPES[arguments.llama])
        clock = Clock(device)
        clock.wrap()
        started = time.perf_counter()
        report = llmshrink.quantize(
            model,
            output=Path(scratch) / "out",
            recipe=arguments.recipe,
            calibration="demo",
            samples=arguments.samples,
            seq_len=arguments.seq_len,
            device=str(device),
            verify=False,
        )
        whole = time.perf_counter() - started
    clock.seconds["all else"] += whole - sum(clock.seconds.values())
    found = {
        "model": arguments.model or f"random Llama {arguments.llama}",
        "recipe": arguments.recipe,
        "tokens": [arguments.samples, arguments.seq_len],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "llmshrink": llmshrink.__version__},
        "seconds": {**clock.seconds, "whole": whole, "without I/O": whole - clock.seconds["I/O"]},
        "peak_vram": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        "peak_rss": peak_memory(),
    }
    for phase, seconds in sorted(found["seconds"].items(), key=lambda item: item[1]):
        print(f"{phase:16} {seconds:9.2f} s   {seconds / whole:6.1%}")
    vram, rss = found["peak_vram"] / 1e9, found["peak_rss"] / 1e9
    print(f"peak memory      {vram:.2f} GB on {found['device']}, {rss:.2f} GB here")
    if not arguments.model and arguments.llama == "8b":
        ratio = found["seconds"]["without I/O"] / GOAL_SECONDS
        print(f"goal             {GOAL_SECONDS:.0f} s without I/O on an H100 or H200: {ratio:.2f} of it")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"quantize-{time.strftime('%Y-%m-%d')}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(path)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
