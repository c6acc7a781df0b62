"""The benchmark: correctness first, then time, row by row; a result file that is whole after every shape.

    {"version": 1, "date", "device", "versions", "commit", "dtype", "group_size", "ceilings": {"bandwidth", "peak"},
     "rows": [{"shape", "inputs", "outputs", "rows", "contender", "microseconds" | null, "refused",
               "floor_microseconds", "share_of_floor", "over": {PEER: its time / this time}}],
     "solver": [...]}

A row whose result was wrong, or whose kernel refused, has no time and says why.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink_kernels import stopwatch
from llmshrink_kernels.benchmark import clock
from llmshrink_kernels.benchmark.contenders import Contender, Matmul, contenders
from llmshrink_kernels.benchmark.problem import Ceilings, Problem, Shape, floor, problem
from llmshrink_kernels.wna16 import naive

VERSION = 1
SEED = 0

Clock = Callable[[Sequence[Matmul], Tensor], float]


@dataclass(frozen=True)
class Row:
    """One contender on one shape and number of rows; times in microseconds.

    refused: why there is no time. over: peer -> how many times as long the peer took.
    """

    shape: str
    inputs: int
    outputs: int
    rows: int
    contender: str
    microseconds: float | None
    refused: str
    floor_microseconds: float
    share_of_floor: float | None
    over: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What is measured, and with what. seconds: the stopwatch; copies: how many weights take turns under it."""

    rows: Sequence[int]
    dtype: torch.dtype
    group_size: int
    device: torch.device
    ceilings: Ceilings
    who: Sequence[Contender]
    seconds: Clock = clock.graph_seconds
    copies: Callable[[float, torch.device], int] = stopwatch.copies


def of_device(rows: Sequence[int], dtype: torch.dtype, group_size: int, names: Sequence[str] | None = None) -> Bench:
    """The benchmark of the current CUDA device, its ceilings measured now. names: of contenders; all, if None."""
    device = torch.device("cuda", torch.cuda.current_device())
    known = {contender.name: contender for contender in contenders(dtype)}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"--only {unknown[0]}: one of {', '.join(known)} is expected")
    who = [known[name] for name in names or known]
    return Bench(rows, dtype, group_size, device, clock.ceilings(device), who)


def measure(bench: Bench, shape: Shape) -> Iterator[list[Row]]:
    """The rows of one shape, number of rows by number of rows."""
    found: dict[int, list[Row]] = {rows: [] for rows in bench.rows}
    for contender in bench.who:
        for row in _one(bench, shape, contender):
            found[row.rows].append(row)
    for rows in bench.rows:
        yield compared(found[rows], [contender.name for contender in bench.who if contender.peer])


def compared(rows: list[Row], peers: Sequence[str]) -> list[Row]:
    """The rows of one product with how many times as long each peer took."""
    times = {row.contender: row.microseconds for row in rows}
    result = []
    for row in rows:
        over = {
            peer: round(theirs / row.microseconds, 3)
            for peer in peers
            if peer != row.contender and row.microseconds and (theirs := times.get(peer))
        }
        result.append(replace(row, over=over))
    return result


def _one(bench: Bench, shape: Shape, contender: Contender) -> Iterator[Row]:
    """One contender's rows on a shape. Whatever it raises is its own and ends up in its rows."""
    lows = {
        rows: floor(shape, rows, contender.stored_bits, bench.group_size if contender.grouped else 0, bench.ceilings)
        for rows in bench.rows
    }

    def row(rows: int, seconds: float | None, refused: str) -> Row:
        return Row(
            shape.name,
            shape.inputs,
            shape.outputs,
            rows,
            contender.name,
            None if seconds is None else round(seconds * 1e6, 3),
            refused,
            round(lows[rows] * 1e6, 3),
            None if seconds is None else round(lows[rows] / seconds, 4),
        )

    if contender.version() is None:
        yield from (row(rows, None, f"{contender.package} is not installed") for rows in bench.rows)
        return
    try:
        asked = contender.adapt(problem(shape, contender.bits, bench.group_size, bench.dtype, bench.device, SEED))
        count = bench.copies(shape.inputs * shape.outputs * contender.stored_bits / 8, bench.device)
        made = [contender.make(asked) for _ in range(count)]
    except Exception as error:
        yield from (row(rows, None, _reason(error)) for rows in bench.rows)
        return
    for rows in bench.rows:
        try:
            wrong = _wrong(made[0], asked, rows)
            yield row(rows, None if wrong else bench.seconds(made, _inputs(asked, rows)), wrong)
        except Exception as error:
            yield row(rows, None, _reason(error))
    del made, asked
    _free(bench.device)


def _inputs(asked: Problem, rows: int) -> Tensor:
    generator = torch.Generator(asked.codes.device).manual_seed(SEED)
    x = torch.randn(rows, asked.shape.inputs, device=asked.codes.device, generator=generator)
    return x.to(asked.dtype)


def _wrong(multiply: Matmul, asked: Problem, rows: int) -> str:
    """Why the result doesn't count, or nothing: every number of it is held to float64."""
    x = _inputs(asked, rows)
    weight = asked.weight()
    y = multiply(x)
    if y.shape != (rows, asked.shape.outputs):
        return f"wrong result: shape {list(y.shape)}"
    far = (y.double() - x.double() @ weight.T).abs() / naive.allowed_error(x, weight, asked.dtype)
    worst = far.max().item()
    return "" if worst <= 1 else f"wrong result: {worst:.3g} times the allowed error"


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def header(bench: Bench, versions: dict[str, str], commit: str, device_name: str) -> dict[str, Any]:
    """What a result file says before its rows."""
    mine = {contender.package: contender.version() or "" for contender in bench.who if contender.package}
    return {
        "version": VERSION,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name,
        "versions": versions | {name: version for name, version in mine.items() if version},
        "commit": commit,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "group_size": bench.group_size,
        "ceilings": asdict(bench.ceilings),
        "rows": [],
        "solver": [],
    }


def write(content: dict[str, Any], path: Path) -> None:
    """Write a result file whole: a benchmark that is killed leaves what its finished shapes gave."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)
