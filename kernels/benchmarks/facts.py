"""A table of static facts: what the compiler makes of the kernels' defaults, for GPUs that needn't be here.

    python kernels/benchmarks/facts.py [-o kernels/benchmarks/results] [--targets 90]

Counted are the instructions of the main loop in the machine code (llmshrink_kernels/static.py says how), divided by
the weights that they are for, beside the budget: what there is time for while the weight is read at 4.3 TB/s. These
are counts and not times: nothing here was run on a GPU, and the file that is written says so too.
"""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from llmshrink_kernels.static import SHARED_MEMORY
from llmshrink_kernels.tune import Config
from llmshrink_kernels.wna16 import facts
from llmshrink_kernels.wna16.dispatch import Limits, default
from llmshrink_kernels.wna16.prepack import BITS, empty

PROCESSORS = {80: 108, 90: 132, 100: 148}
"""Multiprocessors of an A100, an H100 and a B200."""
SHAPE = (14336, 4096)
NOTE = "Static instruction counts from the compiler. Not yet run on a GPU: no times are in this file."


def rows_of_table(targets: list[int]) -> list[dict[str, Any]]:
    """Every combination that the table shows, compiled: one layer of Llama-3-8B's shape."""
    table = []
    for target in targets:
        for bits in BITS:
            for dtype in (torch.bfloat16, torch.float16):
                for zero_points in (False, True):
                    for rows in (1, 64, 256):
                        table.append(row_of_table(target, bits, dtype, zero_points, rows))
                        print(line(table[-1]), flush=True)
    return table


def row_of_table(target: int, bits: int, dtype: torch.dtype, zero_points: bool, rows: int) -> dict[str, Any]:
    """The default for one weight and number of rows."""
    packed = empty(
        *SHAPE, bits=bits, group_size=128, scale_dtype=dtype, zero_points=zero_points, device=torch.device("meta")
    )
    config = default(packed, rows, Limits("", SHARED_MEMORY[target], PROCESSORS[target]))
    assert isinstance(config, Config), "these rows are few enough for the fused kernel"
    found = facts.case(target, packed, config, dtype).compile()
    return {
        "target": f"sm_{target}",
        "bits": bits,
        "dtype": str(dtype).removeprefix("torch."),
        "zero_points": zero_points,
        "rows": rows,
        "per_weight": round(facts.per_weight(found, config), 3),
        "budget": round(facts.budget(packed), 3),
        "config": asdict(config),
        "registers": found.registers,
        "stack": found.stack,
        "shared": found.shared,
        "loop": dict(sorted(found.loop.items(), key=lambda item: -item[1])),
    }


HEAD = "target  bits  dtype     zero-points  rows  instructions/weight  budget  registers  shared  spilled"


def line(row: dict[str, Any]) -> str:
    """A row of the table, under HEAD."""
    return (
        f"{row['target']:6}  {row['bits']:4}  {row['dtype']:8}  {'yes' if row['zero_points'] else 'no':11}"
        f"  {row['rows']:4}  {row['per_weight']:19.2f}  {row['budget']:6.2f}  {row['registers']:9}"
        f"  {row['shared']:6}  {row['stack']:7}"
    )


def main() -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description="Static facts of the kernels' defaults; needs no GPU.")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--targets", type=int, nargs="+", choices=sorted(SHARED_MEMORY), default=sorted(SHARED_MEMORY))
    options = parser.parse_args()
    print(HEAD)
    table = rows_of_table(options.targets)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    content = {
        "note": NOTE,
        "date": today,
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "kernel": "wna16_matmul",
        "shape": {"out_features": SHAPE[0], "in_features": SHAPE[1], "group_size": 128},
        "facts": table,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"static-facts-triton-{triton.__version__}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{NOTE}\n{path}")


if __name__ == "__main__":
    main()
