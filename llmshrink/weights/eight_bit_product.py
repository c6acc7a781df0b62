"""Products of 8 bits: int8 with int8, or FP8 (E4M3) with FP8, and the operator that torch.compile sees whole.

    y[t, n] = s_x[t] * s_w[n] * sum_k q_x[t, k] * q_w[n, k]

q_x and s_x are the input rounded token by token as engines do it (`weights.activations`), q_w and s_w the checkpoint's
codes and scales, of which there is one copy. The sum is of codes alone and scales come after it, as in engines'
kernels. It is taken in one of two ways:

- By torch's own product of codes: for int8 `_int_mm`, whose sums are int32 and exact; for FP8 `_scaled_mm`, on CUDA
  (on a CPU it is slower than the other way). On an x86 CPU without VNNI `_int_mm` is a loop over numbers, at a
  twentieth of the other way's speed, or oneDNN's, which adds pairs of products in 16 bits, and they saturate: it isn't
  taken there. Elsewhere whether a device has it, and whether it is right there, is tried once.
- By blocks of the codes brought to float32: everywhere else, and one notice says so. Codes and their products are exact
  in float32 (TF32 holds them too), only sums are rounded.

The CUDA side hasn't been run on a GPU. The gradient with respect to x is that of the product, as if rounding weren't
there ("straight through"): rounding's own is zero almost everywhere.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from llmshrink_kernels.device import notice
from torch import Tensor, nn

from llmshrink.weights.activations import Activations, coded
from llmshrink.weights.eight_bit import FP8

BLOCK_BYTES = 2 << 20
"""Of the codes in float32 at a time, on a CPU: what its second cache holds. On CUDA 64 times that."""
MOST_INPUTS = 1 << 17
"""127 * 128 times this still fits into int32."""
CUDA_ROWS = 17
"""The fewest rows of x that `_int_mm` takes on CUDA."""
CUDA_STEP: dict[Activations, int] = {"int8": 8, "fp8": 16}
"""What inputs and outputs must be multiples of for torch's products on CUDA."""


def tolerance(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a product may be from the exact one: float64 [M, N]. x: rounded, [M, K]; weight: [N, K]; float64."""
    limits = torch.finfo(dtype)
    exact, size = (x @ weight.T).abs(), x.abs() @ weight.abs().T
    return limits.eps / 2 * exact + 2**-21 * size + limits.tiny * limits.eps / 2


def takes(kind: Activations, shape: tuple[int, int], device: torch.device) -> bool:
    """Whether torch's own product is used for a weight of `shape`; where not, one notice says what is done instead."""
    if device.type == "meta" or shape[1] > MOST_INPUTS:
        return False
    if not multiplies(kind, device):
        notice(f"llmshrink: {device.type} here has no fast, exact product of {kind} numbers; computing it in float32")
        return False
    return device.type == "cpu" or all(size % CUDA_STEP[kind] == 0 for size in shape)


@cache
def multiplies(kind: Activations, device: torch.device) -> bool:
    """Whether torch multiplies such codes on `device`, fast and exactly: tried once, where 16 bits would saturate."""
    if device.type == "cpu" and (kind == "fp8" or not torch.cpu._is_vnni_supported()):
        return False
    largest = 127 if kind == "int8" else 16
    try:
        for rows in (1, 32):
            x, w = (torch.full((size, 64), largest, device=device).to(_DTYPE[kind]) for size in (rows, 48))
            if not bool((_whole(x, w) == 64 * largest**2).all()):
                return False
    except (RuntimeError, NotImplementedError):
        return False
    return True


_DTYPE: dict[Activations, torch.dtype] = {"int8": torch.int8, "fp8": FP8}


def _whole(x: Tensor, codes: Tensor) -> Tensor:
    """The sums of products of codes by torch's own operator: float32 [M, N]. x: [M, K]; codes: [N, K]."""
    if codes.dtype == FP8:
        one = torch.ones((), device=x.device)
        y: Tensor = torch._scaled_mm(x, codes.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
        return y
    rows = x.shape[0]
    if x.device.type == "cuda" and rows < CUDA_ROWS:
        x = nn.functional.pad(x, (0, 0, 0, 2 * CUDA_ROWS - 2 - rows))
    return torch._int_mm(x, codes.t())[:rows].to(torch.float32)


def _matmul(x: Tensor, codes: Tensor, scale: Tensor, whole: bool) -> Tensor:
    """x: [M, K]; codes: [N, K]; scale: [N, 1]. Returns [M, N] in x's dtype."""
    kind: Activations = "int8" if codes.dtype == torch.int8 else "fp8"
    y = x.new_empty(x.shape[0], codes.shape[0])
    if y.numel() == 0:
        return y
    rounded, by_token = coded(x.contiguous(), kind)  # else a BLAS may sum x.T in another order than its copy
    by_row = scale.to(torch.float32).t()
    if whole:
        return _whole(rounded, codes).mul_(by_token).mul_(by_row).to(x.dtype)
    rounded = rounded.to(torch.float32)
    for start, stop in _blocks(codes):
        values, unit = _values(codes[start:stop])
        y[:, start:stop] = (rounded @ values.t()).mul_(by_token * unit).mul_(by_row[:, start:stop])
    return y


def _matmul_transposed(y: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """y: [M, N]; returns y W, [M, K], by blocks of W's rows."""
    result = torch.zeros(y.shape[0], codes.shape[1], device=y.device)
    for start, stop in _blocks(codes):
        values, unit = _values(codes[start:stop])
        by_row = scale[start:stop].to(torch.float32).t() * unit
        result += (y[:, start:stop].to(torch.float32) * by_row) @ values
    return result.to(y.dtype)


def _values(codes: Tensor) -> tuple[Tensor, float]:
    """(codes in float32, what they are to be multiplied by).

    An FP8 number is moved into the place of a half's: sign, exponent and mantissa fit as they are, subnormal ones too,
    and only the exponents' biases, 7 and 15, are 8 apart. torch's own conversion takes six times as long on a CPU.
    """
    if codes.dtype == torch.int8:
        return codes.to(torch.float32), 1.0
    wide = (codes.view(torch.int8).to(torch.int16) << 7) & ~(1 << 14)
    return wide.view(torch.float16).to(torch.float32), 256.0


def _blocks(codes: Tensor) -> list[tuple[int, int]]:
    """Rows that are brought to float32 together, as (start, stop)."""
    room = BLOCK_BYTES * (64 if codes.device.type == "cuda" else 1)
    step = max(1, room // (4 * codes.shape[1]))
    return [(start, min(start + step, codes.shape[0])) for start in range(0, codes.shape[0], step)]


def _fake(x: Tensor, codes: Tensor, scale: Tensor, whole: bool) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _fake_transposed(y: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return y.new_empty(y.shape[0], codes.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.llmshrink.eight_bit_matmul_transposed(grad, *ctx.saved_tensors), None, None, None


_LIBRARY = torch.library.Library("llmshrink", "FRAGMENT")
_WEIGHT = "Tensor codes, Tensor scale"
for _name, _schema, _run, _shape in (
    ("eight_bit_matmul", f"(Tensor x, {_WEIGHT}, bool whole) -> Tensor", _matmul, _fake),
    ("eight_bit_matmul_transposed", f"(Tensor y, {_WEIGHT}) -> Tensor", _matmul_transposed, _fake_transposed),
):
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"llmshrink::{_name}", _shape, lib=_LIBRARY)
torch.library.register_autograd("llmshrink::eight_bit_matmul", _backward, setup_context=_keep, lib=_LIBRARY)
