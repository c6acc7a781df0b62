"""A table of static facts: what the compiler makes of the kernels' defaults, for GPUs that needn't be here.

    python kernels/benchmarks/facts.py [-o kernels/benchmarks/results] [--targets 90]

Counted are the instructions of the main loop in the machine code (llmshrink_kernels/static.py says how), for the two
products divided by the weights that they are for, beside the budget: what there is time for while the weight is read
at 4.3 TB/s. For the sweep of GPTQ, whose work isn't a weight's, it is the whole kernel that is counted. These are
counts and not times: nothing here was run on a GPU, and the file that is written says so too.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from llmshrink_kernels.gptq_block import facts as gptq
from llmshrink_kernels.sparse24 import dispatch as sparse_dispatch
from llmshrink_kernels.sparse24 import facts as sparse
from llmshrink_kernels.sparse24.prepack import empty as empty_sparse
from llmshrink_kernels.static import SHARED_MEMORY, Facts
from llmshrink_kernels.tune import Config
from llmshrink_kernels.wna16 import dispatch, facts
from llmshrink_kernels.wna16.dispatch import Limits
from llmshrink_kernels.wna16.prepack import BITS, empty

PROCESSORS = {80: 108, 90: 132, 100: 148}
"""Multiprocessors of an A100, an H100 and a B200."""
SHAPE = (14336, 4096)
GROUP = 128
HALF, BRAIN = torch.float16, torch.bfloat16
NOTE = "Static instruction counts from the compiler. Not run on a GPU: no times are in this file."

Row = dict[str, Any]


def table(targets: list[int]) -> Iterator[Row]:
    """Every combination that the table shows, compiled one after another: one layer of Llama-3-8B's shape."""
    for target in targets:
        here = Limits("", SHARED_MEMORY[target], PROCESSORS[target], target)
        for bits in BITS:
            for dtype, zero_points in ((BRAIN, False), (HALF, True)):
                for rows in (1, 64):
                    yield dense(here, bits, dtype, zero_points, rows)
        for bits in (4, 8, 16):
            for dtype in (BRAIN, HALF) if bits == 4 else (BRAIN,):
                for rows in (1, 64):
                    yield two_of_four(here, bits, dtype, rows)
        yield of_kernel("gptq_block trial", target, gptq.trial(target, 4, zeros=True).compile())
        yield of_kernel("gptq_block sweep", target, gptq.sweep(target, 4, zeros=True).compile())


def dense(here: Limits, bits: int, dtype: torch.dtype, zero_points: bool, rows: int) -> Row:
    """`wna16_matmul`'s default for one weight and number of rows."""
    packed = empty(*SHAPE, bits=bits, group_size=GROUP, scale_dtype=dtype, zero_points=zero_points, device="meta")
    config = dispatch.default(packed, rows, here)
    assert isinstance(config, Config), "these rows are few enough for the fused kernel"
    found = facts.case(here.capability, packed, config, dtype).compile()
    count = facts.per_weight(found, config), facts.budget(packed)
    return of_product("wna16_matmul", here, found, config, count, bits, dtype, rows) | {"zero_points": zero_points}


def two_of_four(here: Limits, bits: int, dtype: torch.dtype, rows: int) -> Row:
    """`sparse24_matmul`'s default; a weight is one of the dense matrix, kept or not."""
    packed = empty_sparse(*SHAPE, bits=bits, group_size=-1 if bits == 16 else GROUP, dtype=dtype, device="meta")
    config = sparse_dispatch.default(packed, rows, here)
    assert isinstance(config, Config), "these rows are few enough for the fused kernel"
    found = sparse.case(here.capability, packed, config, dtype).compile()
    count = sparse.per_weight(found, config), sparse.budget(packed)
    return of_product("sparse24_matmul", here, found, config, count, bits, dtype, rows)


def of_product(
    kernel: str,
    here: Limits,
    found: Facts,
    config: Config,
    count: tuple[float, float],
    bits: int,
    dtype: torch.dtype,
    rows: int,
) -> Row:
    """A row of one of the products. per_weight: None where the machine code shows no loop."""
    return {
        **of_kernel(kernel, here.capability, found),
        "bits": bits,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "per_weight": round(count[0], 3) if found.loop else None,
        "budget": round(count[1], 3),
        "config": asdict(config),
        "counted": "loop" if found.loop else "whole",
        "instructions": ordered(found.loop or found.whole),
    }


def of_kernel(kernel: str, target: int, found: Facts) -> Row:
    """A row with what any kernel has."""
    return {
        "kernel": kernel,
        "target": f"sm_{target}",
        "registers": found.registers,
        "spilled": found.stack,
        "shared": found.shared,
        "counted": "whole",
        "instructions": ordered(found.whole),
    }


def ordered(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent first."""
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


HEAD = "target  kernel            bits  dtype     zero-points  rows  per weight  budget  registers  shared  spilled"


def line(row: Row) -> str:
    """A row of the table, under HEAD."""
    count, budget = row.get("per_weight"), row.get("budget")
    return (
        f"{row['target']:6}  {row['kernel']:16}  {row.get('bits', ''):4}  {row.get('dtype', ''):8}"
        f"  {'yes' if row.get('zero_points') else 'no' if 'zero_points' in row else '':11}  {row.get('rows', ''):4}"
        f"  {'' if count is None else format(count, '.2f'):>10}  {'' if budget is None else format(budget, '.2f'):>6}"
        f"  {row['registers']:9}  {row['shared']:6}  {row['spilled']:7}"
    )


def main() -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description="Static facts of the kernels' defaults; needs no GPU.")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--targets", type=int, nargs="+", choices=sorted(SHARED_MEMORY), default=sorted(SHARED_MEMORY))
    options = parser.parse_args()
    print(HEAD)
    rows = []
    for row in table(options.targets):
        rows.append(row)
        print(line(row), flush=True)
    content = {
        "note": NOTE,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "shape": {"out_features": SHAPE[0], "in_features": SHAPE[1], "group_size": GROUP},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"static-facts-triton-{triton.__version__}.json"
    # A row on a line: a difference between two compilers shows row by row.
    facts_text = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(content, indent=1)[:-2]},\n "facts": [\n{facts_text}\n]}}\n')
    print(f"{NOTE}\n{path}")


if __name__ == "__main__":
    main()
