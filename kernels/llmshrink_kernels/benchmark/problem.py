"""What is multiplied: the shapes of real layers, the random weight, and the floor under any kernel's time.

    T = max( [K N b/8 + 2 N K/g + 2 M (K + N)] / BW , 2 M N K / PEAK )

are the bytes of a weight of b bits with a 16-bit scale for every g inputs, of x and of y, each moved once; and the
multiply-adds. No kernel can be faster than BW (the device's copies, read and write counted) and PEAK allow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmshrink_kernels.wna16 import naive

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)


@dataclass(frozen=True)
class Shape:
    """One linear of a model. inputs: K. outputs: N, of the fused layer that engines run."""

    name: str
    inputs: int
    outputs: int


MODELS = {
    "llama3-8b": (
        Shape("llama3-8b qkv", 4096, 6144),
        Shape("llama3-8b o", 4096, 4096),
        Shape("llama3-8b gate_up", 4096, 28672),
        Shape("llama3-8b down", 14336, 4096),
    ),
    "llama3-70b": (
        Shape("llama3-70b qkv", 8192, 10240),
        Shape("llama3-70b o", 8192, 8192),
        Shape("llama3-70b gate_up", 8192, 57344),
        Shape("llama3-70b down", 28672, 8192),
    ),
}


def named(names: list[str]) -> list[Shape]:
    """The shapes of `names`: a model of MODELS, or KxN for one of your own. Raises ValueError naming the bad one."""
    shapes: list[Shape] = []
    for name in names:
        inputs, _, outputs = name.partition("x")
        if name in MODELS:
            shapes += MODELS[name]
        elif inputs.isdecimal() and outputs.isdecimal() and int(inputs) and int(outputs):
            shapes.append(Shape(name, int(inputs), int(outputs)))
        else:
            raise ValueError(f"--shapes {name}: one of {', '.join(MODELS)}, or KxN (4096x14336) is expected")
    return list(dict.fromkeys(shapes))


@dataclass(frozen=True)
class Ceilings:
    """What the device can do, measured. bandwidth: bytes/s of a copy, read and write. peak: FLOP/s in bfloat16."""

    bandwidth: float
    peak: float


def floor(shape: Shape, rows: int, bits: float, group_size: int, ceilings: Ceilings) -> float:
    """Seconds that no kernel can beat. bits: stored for a weight, scales aside; group_size: 0 is a weight without."""
    weights = shape.inputs * shape.outputs
    scales = 2 * weights / group_size if group_size else 0
    moved = weights * bits / 8 + scales + 2 * rows * (shape.inputs + shape.outputs)
    return max(moved / ceilings.bandwidth, 2 * rows * weights / ceilings.peak)


@dataclass(frozen=True)
class Problem:
    """A weight of random grouped integers. codes: int8 [N, K]. scale: [N, K/g] in the dtype of x and y."""

    shape: Shape
    codes: Tensor
    scale: Tensor
    bits: int
    group_size: int
    dtype: torch.dtype

    def weight(self) -> Tensor:
        """What the integers mean: float64 [N, K]."""
        return naive.dequantize(self.codes, self.scale, None, self.group_size)


def problem(shape: Shape, bits: int, group_size: int, dtype: torch.dtype, device: torch.device, seed: int) -> Problem:
    """A random weight; the same for the same arguments. Outputs are about as large as inputs."""
    generator = torch.Generator(device).manual_seed(seed)
    top = 1 << (bits - 1)
    size = (shape.outputs, shape.inputs)
    codes = torch.randint(-top, top, size, dtype=torch.int8, device=device, generator=generator)
    groups = -(-shape.inputs // group_size)
    spread = torch.rand(shape.outputs, groups, device=device, generator=generator) + 0.5
    return Problem(shape, codes, (spread / (top * shape.inputs**0.5)).to(dtype), bits, group_size, dtype)


def prune(codes: Tensor) -> Tensor:
    """2:4: of every four codes of a row the two largest are kept, the others zero. int8 [N, K], K a multiple of 4."""
    fours = codes.view(codes.shape[0], -1, 4)
    kept = fours.abs().topk(2, dim=-1).indices
    return torch.zeros_like(fours).scatter(-1, kept, fours.gather(-1, kept)).view_as(codes)
