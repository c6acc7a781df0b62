"""Who is timed: ours, what ships with PyTorch, and other packages' kernels where they are installed.

A contender turns a `Problem`'s weight into a function of x. A peer computes with the very same numbers: PyTorch's int4
product and gemlite get our codes and scales in their layout, Humming the compressed-tensors checkpoint that we would
write, and cuBLAS the weight in 16 bits. Whether each got them right is not taken on trust: run.py holds every result to
float64 first.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmshrink_kernels.benchmark.problem import Problem, prune
from llmshrink_kernels.sparse24 import search as sparse24_search
from llmshrink_kernels.sparse24.canonical import compress
from llmshrink_kernels.sparse24.ops import sparse24_matmul
from llmshrink_kernels.sparse24.prepack import PackedSparse
from llmshrink_kernels.sparse24.prepack import prepack as prepack_sparse
from llmshrink_kernels.tune import Trial
from llmshrink_kernels.wna16 import search as wna16_search
from llmshrink_kernels.wna16.compressed import to_stream
from llmshrink_kernels.wna16.ops import wna16_matmul
from llmshrink_kernels.wna16.prepack import PackedWeight, prepack

Matmul = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """One kernel in one format.

    bits: of its codes. stored_bits: of a weight, scales aside. make: a new copy of the weight in the contender's
    layout, and its product with it. grouped: whether it reads scales. adapt: what of the problem's weight it multiplies
    by (2:4 prunes). package: the distribution that it needs, if it isn't ours or PyTorch's. peer: whether others are
    compared with it. search: (problem, rows) -> the trials of its configurations, the best first; None: it has none.
    """

    name: str
    bits: int
    stored_bits: float
    make: Callable[[Problem], Matmul]
    grouped: bool = True
    adapt: Callable[[Problem], Problem] = lambda problem: problem
    package: str = ""
    peer: bool = False
    search: Callable[[Problem, int], list[Trial]] | None = None

    def version(self) -> str | None:
        """Of its package; None where that isn't installed, the empty string where it needs none."""
        if not self.package:
            return ""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def ours(problem: Problem) -> Matmul:
    """`wna16_matmul`, through the operator that models call."""
    packed = _packed(problem)
    return lambda x: wna16_matmul(x, packed)


def search(problem: Problem, rows: int) -> list[Trial]:
    """The configurations of `wna16_matmul`, tried; the best is remembered."""
    return wna16_search.search(_packed(problem), rows, problem.dtype)


def ours_sparse(problem: Problem) -> Matmul:
    """`sparse24_matmul`, likewise."""
    packed = _packed_sparse(problem)
    return lambda x: sparse24_matmul(x, packed)


def search_sparse(problem: Problem, rows: int) -> list[Trial]:
    """The configurations of `sparse24_matmul`, likewise."""
    return sparse24_search.search(_packed_sparse(problem), rows, problem.dtype)


def _packed(problem: Problem) -> PackedWeight:
    return prepack(problem.codes, problem.scale, None, bits=problem.bits, group_size=problem.group_size)


def _packed_sparse(problem: Problem) -> PackedSparse:
    values, positions = compress(problem.codes)
    return prepack_sparse(values, positions, problem.scale, bits=problem.bits, group_size=problem.group_size)


def dense(problem: Problem) -> Matmul:
    """The weight in 16 bits, by the vendor's library."""
    weight = problem.weight().to(problem.dtype)
    return lambda x: x @ weight.T


def torch_int4(problem: Problem) -> Matmul:
    """`torch._weight_int4pack_mm`: (code - 8) * scale + zero, two codes in a byte, the first in the high half."""
    stored = (problem.codes + 8).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(stored[:, ::2] << 4 | stored[:, 1::2], 8)
    scale = problem.scale.t().contiguous()
    scale_and_zero = torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()
    return lambda x: torch._weight_int4pack_mm(x, packed, problem.group_size, scale_and_zero)


def gemlite(problem: Problem) -> Matmul:
    """gemlite's own packing and choice of kernel: (stored - 8) * scale."""
    library: Any = importlib.import_module("gemlite")
    kind = library.DType.BF16 if problem.dtype == torch.bfloat16 else library.DType.FP16
    layer = library.GemLiteLinear(
        problem.bits,
        group_size=problem.group_size,
        in_features=problem.shape.inputs,
        out_features=problem.shape.outputs,
        input_dtype=kind,
        output_dtype=kind,
    )
    top = 1 << (problem.bits - 1)
    layer.pack((problem.codes + top).to(torch.uint8), problem.scale, top, None)
    multiply: Matmul = layer.forward
    return multiply


def humming(problem: Problem) -> Matmul:
    """Humming's layer, loaded with the tensors of a compressed-tensors checkpoint."""
    library: Any = importlib.import_module("humming.layer")
    weights = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "type": "int",
        "num_bits": problem.bits,
        "strategy": "group",
        "group_size": problem.group_size,
        "symmetric": True,
    }
    shape = problem.shape
    layer = library.HummingLayer(
        shape_n=shape.outputs, shape_k=shape.inputs, weight_config=weights, torch_dtype=problem.dtype
    ).to(problem.codes.device)
    layer.load_from_tensors(
        {
            "weight_packed": to_stream(problem.codes, problem.bits),
            "weight_scale": problem.scale,
            "weight_shape": torch.tensor([shape.outputs, shape.inputs]),
        }
    )
    layer.transform()
    multiply: Matmul = layer.forward
    return multiply


def pruned(problem: Problem) -> Problem:
    """The same problem with a 2:4 weight."""
    return replace(problem, codes=prune(problem.codes))


def contenders(dtype: torch.dtype) -> tuple[Contender, ...]:
    """All, in the order of the table; PyTorch's int4 product takes bfloat16 alone."""
    found = [
        Contender("cuBLAS", 4, 16.0, dense, grouped=False, peer=True),
        Contender("llmshrink W4", 4, 4.0, ours, search=search),
        Contender("gemlite W4", 4, 4.0, gemlite, package="gemlite", peer=True),
        Contender("Humming W4", 4, 4.0, humming, package="humming-kernels", peer=True),
        Contender("llmshrink 2:4 W4", 4, 3.0, ours_sparse, adapt=pruned, search=search_sparse),
        Contender("llmshrink W8", 8, 8.0, ours, search=search),
        Contender("llmshrink W3", 3, 3.0, ours, search=search),
        Contender("llmshrink W2", 2, 2.0, ours, search=search),
    ]
    if dtype == torch.bfloat16:
        found.insert(2, Contender("torch int4", 4, 4.0, torch_int4, peer=True))
    return tuple(found)
