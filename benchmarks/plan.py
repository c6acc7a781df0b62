"""What `llmshrink plan` says beside what the run then takes: `python -m benchmarks.plan [MODEL ...] [--recipe R ...]`.

For each model and recipe the plan and the run are two fresh processes, one right after the other, so that the machine
is as busy for both. Printed are predicted / measured of the safetensors' bytes, bits a weight, disk, peak resident
memory, seconds, and seconds of the processor, which other work on the machine hardly changes. What is further off than
the bounds, which are printed too, has a ! behind it. Without a model it is the demo model, on its own text.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

RECIPES = ("gptq-w4a16", "gptq-w2a16", "rtn-w4a16", "alps-2of4", "alps-2of4:llmshrink", "width-prune", "depth-prune")
COLUMNS = ("output_bytes", "bits_per_weight", "disk_bytes", "peak_ram_bytes", "seconds", "cpu_seconds")
BOUNDS = {name: 0.35 if name.endswith("seconds") else 0.15 for name in COLUMNS}
"""Column -> how far predicted / measured may be from 1."""
LOOKS = 0.05
"""Seconds between two looks at the disk."""


def settings(arguments: argparse.Namespace, recipe: str) -> dict[str, Any]:
    """What plan and run are asked for. recipe: a name, and after a colon the format where it isn't the standard one."""
    name, _, format = recipe.partition(":")
    asked = {"recipe": name, "format": format or None, "calibration": arguments.calibration}
    asked |= {"samples": arguments.samples, "seq_len": arguments.seq_len, "set": arguments.set or None}
    return {key: value for key, value in asked.items() if value is not None}


def child(work: str, model: str, asked: dict[str, Any], output: str) -> dict[str, float]:
    """One of the two processes: "plan" or "run". Returns what is compared."""
    import llmshrink

    if work == "plan":
        made = llmshrink.plan(model, output=output, **asked).to_dict()
        return {name: made[name] for name in COLUMNS} | {"probe_seconds": made["probe_seconds"]}
    import llmshrink.run.quantize
    from llmshrink.recipe.read import load_recipe
    from llmshrink.run.seal import weight_bytes

    if load_recipe(asked["recipe"]).distill is not None:
        import llmshrink.distillation.compress
    most = [0]
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(Path(output), most, done))
    watch.start()
    started = time.process_time()
    report = llmshrink.compress(model, output=output, **asked)
    cpu = time.process_time() - started
    done.set()
    watch.join()
    assert report is not None and report.ok, report
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "output_bytes": weight_bytes(Path(output)),
        "bits_per_weight": llmshrink.inspect(output).bits_per_weight,
        "disk_bytes": most[0],
        "peak_ram_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "seconds": report.seconds,
        "cpu_seconds": cpu,
    }


def _watch(output: Path, most: list[int], done: threading.Event) -> None:
    """Keep the most bytes that everything beside `output` that begins with its name has taken."""
    while not done.wait(LOOKS):
        most[0] = max(most[0], _bytes(output))
    most[0] = max(most[0], _bytes(output))


def _bytes(output: Path) -> int:
    total = 0
    for folder in output.parent.glob(f"{output.name}*"):
        for path in folder.rglob("*"):
            try:
                total += path.stat().st_size if path.is_file() else 0
            except FileNotFoundError:
                continue  # it was renamed in between
    return total


def both(model: str, asked: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """The plan and the run, each in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        return tuple(_child(work, model, asked, f"{folder}/out") for work in ("plan", "run"))  # type: ignore[return-value]


def _child(work: str, model: str, asked: dict[str, Any], output: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.plan", "--child", work, model, json.dumps(asked), output]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    found: dict[str, float] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Compare, a line as soon as it's known."""
    if sys.argv[1:2] == ["--child"]:
        work, model, asked, output = sys.argv[2:]
        print(json.dumps(child(work, model, json.loads(asked), output)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["demo"])
    parser.add_argument("--recipe", action="append", help=f"left out: {', '.join(RECIPES)}")
    parser.add_argument("--calibration")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--set", action="append")
    arguments = parser.parse_args()
    print(
        f"{'predicted / measured':38}" + "".join(f"{name.removesuffix('_bytes'):>17}" for name in COLUMNS) + "   load"
    )
    print(f"{'may be off by':38}" + "".join(f"{bound:>17.0%}" for bound in BOUNDS.values()))
    for model in arguments.models:
        for recipe in arguments.recipe or RECIPES:
            predicted, measured = both(model, settings(arguments, recipe))
            cells = (cell(name, predicted[name], measured[name]) for name in COLUMNS)
            line = f"{Path(model).name + ' ' + recipe:38}" + "".join(f"{cell:>17}" for cell in cells)
            print(f"{line}   {os.getloadavg()[0]:.1f}, probe {predicted['probe_seconds']:.1f} s", flush=True)


def cell(name: str, predicted: float, measured: float) -> str:
    """A column's figure, with what was measured, and a ! where it is out of its bounds."""
    ratio = predicted / measured
    return f"{ratio:.3f} of {_short(name, measured)}{'!' if abs(ratio - 1) > BOUNDS[name] else ' '}"


def _short(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e6:.1f}M"
    return f"{value:.2f}" if name == "bits_per_weight" else f"{value:.1f}s"


if __name__ == "__main__":
    main()
