"""Products of float32 matrices on a CPU, by oneDNN's kernels where they are the faster ones.

torch multiplies float32 on x86 by MKL, which takes the AVX2 kernels on any CPU but Intel's. oneDNN, which torch brings
too and uses for bfloat16, goes by what the CPU can: one core of an AMD EPYC with AVX-512 does 215 GFLOP/s instead of
100. Without AVX-512 MKL is the faster one: 88 to 79 on an AMD EPYC with AVX2 alone, and by a third on a Hessian, which
it adds up in place (`python -m benchmarks.products`). The operator is the one that torch's own compiler calls. It knows
no gradient, so that whatever trains multiplies as before.

The two sum in another order, so what is computed by one differs from the other in the last bits; which of them a run
had is part of its identity (`product`).
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDE = "AVX512"
"""Of torch's names for what a CPU can (and ATEN_CPU_CAPABILITY allows), those where oneDNN is faster begin so."""
TOLERANCE = 1e-4
"""How far the two may be apart in the trial, where entries are near 10: sums of 100 terms in float32 differ by 1e-5."""


def _operator() -> Any | None:
    """oneDNN's x W^T where it is the faster one, else None."""
    return one_dnn() if torch.backends.cpu.get_cpu_capability().startswith(WIDE) else None


@cache
def one_dnn() -> Any | None:
    """oneDNN's x W^T, or None where torch hasn't got it, or it isn't right here."""
    if not torch.backends.mkldnn.is_available():
        return None
    found = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if found is None:
        return None
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, 100, generator=generator) for rows in (3, 5))
    try:
        product = found(left, right, None, "none", [], "")
    except (RuntimeError, TypeError):  # not built in, or with other arguments in this version
        return None
    return found if torch.allclose(product, left @ right.T, rtol=0.0, atol=TOLERANCE) else None


def product() -> str:
    """By what float32 is multiplied on this CPU: "oneDNN", or "torch" for torch's default."""
    return "torch" if _operator() is None else "oneDNN"


def _by_operator(*matrices: Tensor) -> Any | None:
    """The operator, where it may multiply these now."""
    fast = all(each.dtype == torch.float32 and each.device.type == "cpu" and each.numel() for each in matrices)
    if not fast or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    return _operator()


def times_transposed(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left @ right.T + bias, as a linear with the weight `right` computes it: [..., in], [out, in] -> [..., out]."""
    operator = _by_operator(left, right)
    if operator is None:
        return functional.linear(left, right, bias)
    result: Tensor = operator(left, right, bias, "none", [], "")
    return result


def columns_of(rows: Tensor) -> Tensor:
    """[rows, columns] -> [columns, rows], laid out as `accumulate_` multiplies it fastest."""
    return rows.T if _by_operator(rows) is None else rows.T.contiguous()


def accumulate_(total: Tensor, left: Tensor, right: Tensor, *, keep: float, new: float) -> None:
    """total = keep * total + new * left @ right.T, in place. left, right: [columns, rows], from `columns_of`."""
    if _by_operator(left, right) is None:
        total.addmm_(left, right.T, beta=keep, alpha=new)
    else:
        total.mul_(keep).add_(times_transposed(left, right), alpha=new)


def _forward(linear: nn.Linear, input: Tensor) -> Tensor:
    return times_transposed(input, linear.weight, linear.bias)


def multiply_fast(model: nn.Module) -> None:
    """Let a model's linears multiply by `times_transposed` from now on, and copies of its modules too.

    One whose forward somebody has replaced (accelerate does where it streams weights) stays as it is."""
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
