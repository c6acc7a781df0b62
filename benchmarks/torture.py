"""A hundred `kill -9`, a hundred bit-identical results: `python -m benchmarks.torture [--model M --calibration T]`.

One undisturbed run gives the reference and its length. Then, again and again: a fresh output folder, the same command
killed at a seeded random moment of that length (up to three times in a row), then run to its end. After every kill the
output must not be there, or be whole; at the end every file of it must equal the reference byte for byte, except
timing.json, which tells how the run went, and nothing may be left beside it.

With `--faults` a thousand errors of the system and damaged files take the place of the kills (`benchmarks.faults`).
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llmshrink.run.output import partial_folder

RUN_RECORDS = {"timing.json"}


def command(arguments: argparse.Namespace, output: Path) -> list[str]:
    """The command line that is killed and run again."""
    line = [
        sys.executable,
        "-c",
        "from llmshrink.cli import main; main()",
        "quantize",
        arguments.model,
        "-o",
        str(output),
    ]
    if arguments.calibration:
        line += ["--calibration", arguments.calibration]
    return [*line, "--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len)]


def run(line: list[str], *, kill_after: float | None = None) -> int:
    """Returns the exit code, -9 if it was killed. The whole process group dies."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return -signal.SIGKILL
    if process.returncode:
        raise RuntimeError(f"{' '.join(line)} ended with {process.returncode}: {errors.decode()[-2000:]}")
    return process.returncode


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes, of everything but the record of how the run went."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name not in RUN_RECORDS}


def differences(reference: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """The files that are missing, surplus or different."""
    return sorted(name for name in reference.keys() | found.keys() if reference.get(name) != found.get(name))


def done(output: Path) -> bool:
    """Whether a run is over: its output is there, its workspace gone. The same command would refuse to replace it."""
    return output.exists() and not partial_folder(output).exists()


def torture(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Kill and resume until so many kills were made. Returns a line for every fault."""
    rng = random.Random(arguments.seed)
    started = time.monotonic()
    run(command(arguments, folder / "reference"))
    length = time.monotonic() - started
    reference = contents(folder / "reference")
    faults: list[str] = []
    kills = runs = 0
    while kills < arguments.kills:
        output = folder / f"run-{runs}"
        line = command(arguments, output)
        for _ in range(rng.randint(1, 3)):
            if done(output) or run(line, kill_after=rng.uniform(0, length)) == 0:
                break
            kills += 1
            if output.exists() and (wrong := differences(reference, contents(output))):
                faults.append(f"kill {kills}: {output} was there half-done: {wrong}")
        if not done(output):
            run(line)
        if wrong := differences(reference, contents(output)):
            faults.append(f"run {runs}, after {kills} kills: differs in {wrong}")
        left = [path.name for path in folder.iterdir() if path.name not in ("reference", output.name)]
        if left:
            faults.append(f"run {runs}: left behind {left}")
        shutil.rmtree(output)
        runs += 1
        print(f"{kills} of {arguments.kills} kills, {runs} results, {len(faults)} faults", flush=True)
    return faults


def main() -> int:
    """1 and a line for each fault, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, nargs="?", const=0, help="so many faults; no number: each there is")
    parser.add_argument("--start", type=int, default=0, help="with --faults: go on from this one")
    arguments = parser.parse_args()
    if arguments.faults is not None:
        from benchmarks import faults as on_purpose

        wrong = on_purpose.made(arguments.faults or None, arguments.seed, arguments.start)
        print(f"{len(wrong)} wrong" if wrong else "each fault ended in the same bytes or one line")
        return 1 if wrong else 0
    with tempfile.TemporaryDirectory() as scratch:
        faults = torture(arguments, Path(scratch))
    print("\n".join(faults) or "every result is the same, byte for byte")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
