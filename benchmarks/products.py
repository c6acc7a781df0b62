"""GFLOP/s of float32 products on this CPU, by torch's default and by oneDNN: `python -m benchmarks.products`.

On the shapes of a small Llama's linears and of its Hessians, in seconds of this process's CPU time, the best of seven;
on one thread unless OMP_NUM_THREADS says otherwise. The two are held to each other before a time is printed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import torch
from llmshrink_kernels.products import one_dnn, product
from torch import Tensor
from torch.nn import functional

SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536), (1536, 2048))
"""Outputs and inputs."""


def best(work: Callable[[], Tensor]) -> float:
    """Seconds of CPU time."""
    work()
    found = []
    for _ in range(7):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def main() -> None:
    """Print a line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    operator = one_dnn()
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread; used: {product()}")
    with torch.no_grad():
        for outputs, inputs in SHAPES:
            left, right = torch.randn(arguments.rows, inputs), torch.randn(outputs, inputs)
            ways = {"torch": partial(functional.linear, left, right)}
            if operator is not None:
                ways["oneDNN"] = partial(operator, left, right, None, "none", [], "")
                torch.testing.assert_close(ways["oneDNN"](), ways["torch"](), rtol=0, atol=1e-3)
            work = 2e-9 * arguments.rows * outputs * inputs
            rates = "  ".join(f"{name} {work / best(way):7.1f}" for name, way in ways.items())
            print(f"{arguments.rows} x {inputs} x {outputs:5}  {rates} GFLOP/s")


if __name__ == "__main__":
    main()
