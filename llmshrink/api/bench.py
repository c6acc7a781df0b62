"""`llmshrink.bench_kernels`: the twin of `llmshrink bench kernels`."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from llmshrink.errors import LlmshrinkError, PathLike
from llmshrink.paths import expanded


def bench_kernels(
    *,
    output: PathLike,
    shapes: Sequence[str] = ("llama3-8b", "llama3-70b"),
    rows: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
    group_size: int = 128,
    tune: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time the kernels on the current CUDA device beside their peers; results to `output`, as JSON and as a roofline.

    shapes: "llama3-8b", "llama3-70b" or KxN. rows: of x; 1 to 4096 if None. only: names of contenders; all, if None.
    tune: first search the fastest configuration for each of our formats, shape and number of rows, and remember them in
    the user's cache. say: gets a line for every step. Returns what the JSON file holds, with its path under "path".
    Raises LlmshrinkError for bad input and where there is no CUDA device or no Triton.
    """
    import torch
    from llmshrink_kernels.benchmark import problem
    from llmshrink_kernels.device import has_triton

    say = say or (lambda line: None)
    counts = list(problem.ROWS if rows is None else rows)
    if not counts or min(counts) < 1:
        raise LlmshrinkError(f"--rows {','.join(map(str, counts))}: numbers of rows from 1 on are expected")
    if group_size not in (32, 64, 128, 256):
        raise LlmshrinkError(f"--group-size {group_size}: 32, 64, 128 or 256 is expected")
    if dtype not in ("bfloat16", "float16"):
        raise LlmshrinkError(f"--dtype {dtype}: bfloat16 or float16 is expected")
    try:
        asked = problem.named(list(shapes))
    except ValueError as error:
        raise LlmshrinkError(str(error)) from error
    if not torch.cuda.is_available():
        raise LlmshrinkError(
            "bench kernels times kernels on a CUDA device, and this machine has none; what the compiler makes of them"
            " needs none: python kernels/benchmarks/facts.py, in a checkout"
        )
    if not has_triton():
        raise LlmshrinkError("bench kernels needs Triton: pip install triton")
    # Imports the kernels, and Triton with them.
    from llmshrink_kernels.benchmark import run

    try:
        bench = run.of_device(counts, getattr(torch, dtype), group_size, only)
    except ValueError as error:
        raise LlmshrinkError(str(error)) from error
    if tune:
        _tune(bench, asked, say)
    return _measure(bench, asked, expanded(output), say)


def _tune(bench: Any, shapes: Sequence[Any], say: Callable[[str], None]) -> None:
    """Search each format of ours, shape and class of rows once."""
    from llmshrink_kernels.benchmark.problem import problem

    for shape in shapes:
        for who in bench.who:
            if who.search is None:
                continue
            asked = who.adapt(problem(shape, who.bits, bench.group_size, bench.dtype, bench.device, 0))
            # Plans are filed by rows up to a power of two, 16 at the least: others of a class would be searched again.
            for count in sorted({max(16, 1 << (rows - 1).bit_length()) for rows in bench.rows}):
                best = who.search(asked, count)[0]
                say(f"tuned {shape.name}, {who.name}, {count} rows: {best.plan}, {1e6 * (best.seconds or 0):.1f} us")


def _measure(bench: Any, shapes: Sequence[Any], output: Path, say: Callable[[str], None]) -> dict[str, Any]:
    import torch
    import triton
    from llmshrink_kernels.benchmark import run, solver

    from llmshrink import __version__

    device_name = torch.cuda.get_device_name(bench.device)
    versions = {
        "llmshrink": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }
    content = run.header(bench, versions, commit(), device_name)
    date = re.sub(r"[^0-9T]", "", content["date"][:16])
    path = output / f"kernels-{re.sub(r'[^A-Za-z0-9]+', '-', device_name).strip('-').lower()}-{date}.json"
    ceilings = content["ceilings"]
    say(f"{device_name}: {ceilings['bandwidth'] / 1e12:.2f} TB/s copied, {ceilings['peak'] / 1e12:.0f} TFLOP/s bf16")
    for shape in shapes:
        for rows in run.measure(bench, shape):
            content["rows"] += [vars(row) for row in rows]
            for row in rows:
                say(line(vars(row)))
        content["solver"] += [vars(solved) for solved in solver.measure(shape.outputs, bench.device)]
        for solved in content["solver"][-2:]:
            times = f"{solved['over_eager']} times as fast as the eager loop"
            say(f"{shape.name}  {solved['operator']}: {times if solved['over_eager'] else 'not the eager result'}")
        run.write(content, path)
    try:
        from llmshrink_kernels.benchmark.plot import plot

        plot(content, path.with_suffix(".png"))
    except ImportError as error:
        say(f"no roofline: {error.name} is not installed (pip install matplotlib)")
    return content | {"path": str(path)}


def line(row: dict[str, Any]) -> str:
    """One row for a person."""
    over = "".join(f"  {times:.2f}x {peer}" for peer, times in row["over"].items())
    head = f"{row['shape']:20}  M {row['rows']:<5} {row['contender']:17}"
    if row["microseconds"] is None:
        return f"{head}  -  {row['refused']}"
    return f"{head} {row['microseconds']:10.1f} us  {100 * row['share_of_floor']:5.1f} % of the floor's speed{over}"


def commit() -> str:
    """The commit of the checkout that runs, with a mark where files differ from it; unknown outside a checkout."""
    here = Path(__file__).parent
    asked = ["git", "-C", os.fspath(here), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
