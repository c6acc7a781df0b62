"""QuantLinear and, with 4 and 8 bits, SparseLinear on this CPU beside a dense linear: microseconds a call.

    python -m benchmarks.runtime [--shape 4096x4096 ...] [--rows 1 16 256 1024] [--group-size 128] [--bits 4]
    python -m benchmarks.runtime --activations int8     # or fp8: EightBitLinear

Nothing is timed before the packed result is within its tolerance of float64. Contenders take turns within each
round, so that a change in the machine's load meets them all; medians are printed, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from llmshrink_kernels.wna16 import naive, prepack
from torch import Tensor

from llmshrink.methods.pruning.pattern import largest_of_blocks
from llmshrink.runtime.eight_bit import EightBitLinear
from llmshrink.runtime.linear import QuantLinear
from llmshrink.runtime.sparse import SparseLinear
from llmshrink.weights import FP8, Activations, EightBit, GroupedInt, Sparse24, coded
from llmshrink.weights.eight_bit_product import tolerance

SHAPES = ("256x256", "768x256", "256x768", "4096x4096")
ROUNDS = 7
ROUND_SECONDS = 0.05


def contenders(shape: tuple[int, int], rows: int, *, bits: int, group_size: int) -> dict[str, Callable[[], Tensor]]:
    """Name -> a call. shape: (out_features, in_features)."""
    torch.manual_seed(0)
    groups = shape[1] // group_size
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, dtype=torch.int8)
    scale = (torch.randn(shape[0], groups) * 0.05).bfloat16()
    packed = prepack(codes, scale, None, bits=bits, group_size=group_size)
    exact = naive.dequantize(codes, scale, None, group_size)
    calls: dict[str, Callable[[], Tensor]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.randn(rows, shape[1]).to(dtype), exact.to(dtype)
        layer = QuantLinear(packed, dtype=dtype)
        allowed = naive.allowed_error(x, exact, dtype) + 2**-21 * (x.double().abs() @ exact.abs().T)
        assert ((layer(x).double() - x.double() @ exact.T).abs() <= allowed).all(), (shape, rows, dtype)
        name = str(dtype).removeprefix("torch.")
        calls[f"packed {name}"] = partial(layer, x)
        calls[f"dense {name}"] = partial(torch.nn.functional.linear, x, weight)
    if bits in (4, 8):
        mask = largest_of_blocks(codes.abs().float(), 2, 4)
        halved = Sparse24.of(GroupedInt(codes * mask, scale, None, bits, group_size))
        calls |= _sparse(halved, torch.randn(rows, shape[1]).bfloat16())
    return calls


def eight_bit_contenders(shape: tuple[int, int], rows: int, kind: Activations) -> dict[str, Callable[[], Tensor]]:
    """As `contenders`, where inputs are of 8 bits too."""
    torch.manual_seed(0)
    codes = torch.randn(shape) * 40
    whole = codes.clamp(-127, 127).round().to(torch.int8) if kind == "int8" else codes.to(FP8)
    weight = EightBit(whole, (torch.rand(shape[0], 1) * 0.05).bfloat16())
    exact = weight.dequantize(torch.float64)
    calls: dict[str, Callable[[], Tensor]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, layer = torch.randn(rows, shape[1]).to(dtype), EightBitLinear(weight, dtype=dtype)
        rounded, scale = coded(x, kind)
        read = rounded.double() * scale.double()
        assert ((layer(x).double() - read @ exact.T).abs() <= tolerance(read, exact, dtype)).all(), (shape, rows, dtype)
        name = str(dtype).removeprefix("torch.")
        calls[f"{kind} {name}"] = partial(layer, x)
        calls[f"dense {name}"] = partial(torch.nn.functional.linear, x, exact.to(dtype))
    return calls


def _sparse(weight: Sparse24, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The 2:4 layer in bfloat16."""
    exact = weight.dequantize(torch.float64)
    layer = SparseLinear.of(weight, None, dtype=torch.bfloat16)
    allowed = naive.allowed_error(x, exact, torch.bfloat16) + 2**-21 * (x.double().abs() @ exact.abs().T)
    assert ((layer(x).double() - x.double() @ exact.T).abs() <= allowed).all(), (weight.shape, len(x))
    return {"2:4 bfloat16": partial(layer, x)}


def medians(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Microseconds of each."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            count, begin = 0, time.perf_counter()
            while count == 0 or time.perf_counter() - begin < ROUND_SECONDS:
                call()
                count += 1
            found[name].append((time.perf_counter() - begin) / count * 1e6)
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), help="OUTxIN")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 256, 1024])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--activations", choices=("int8", "fp8"), help="of inputs, and of weights with them")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for text in options.shape:
            rows_out, columns = map(int, text.split("x"))
            for rows in options.rows:
                if options.activations:
                    calls = eight_bit_contenders((rows_out, columns), rows, options.activations)
                else:
                    calls = contenders((rows_out, columns), rows, bits=options.bits, group_size=options.group_size)
                found = medians(calls)
                results.append({"shape": text, "rows": rows, "microseconds": found})
                print(
                    f"{text:>12} M={rows:<5}" + "  ".join(f"{name} {us:.0f}" for name, us in found.items()), flush=True
                )
    kind = {"activations": options.activations} if options.activations else {
        "bits": options.bits, "group_size": options.group_size
    }  # fmt: skip
    settings = {**kind, "threads": torch.get_num_threads()}
    print(json.dumps({**settings, "instructions": torch.backends.cpu.get_cpu_capability(), "results": results}))


if __name__ == "__main__":
    main()
