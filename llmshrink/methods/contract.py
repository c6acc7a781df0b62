"""What a site solver is given and what it gives back.

A solver is a pure function `(weight, statistics, spec, scale_dtype) -> Solved`: no hooks, no files, and none of its
arguments is written to. `weight` is [out_features, in_features] and may be several sites stacked along out_features,
because rows don't depend on each other; `Solved` therefore keeps its errors by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from llmshrink_kernels.products import times_transposed
from torch import Tensor

from llmshrink.errors import LlmshrinkError
from llmshrink.weights import Dense, EightBit, GroupedInt, Solvable

ScaleSearch = Literal["minmax", "mse", "hessian", "trial"]


class SolveError(LlmshrinkError):
    """A weight or its statistics are such that no answer would be right (NaN, a Hessian that can't be factorised)."""


@dataclass(frozen=True)
class QuantizeSpec:
    """How one site is quantized. The shipped recipes hold the defaults that measurement chose for each bit width.

    scale_search: how the scale of a group is found: `minmax`, least squares (`mse`), least squares weighted by the
        Hessian's diagonal (`hessian`), or by trying candidates in the sweep itself (`trial`; `rtn` has no sweep and
        takes `mse`).
    signed: let a symmetric scale be negative. act_order: quantize loud inputs first (nothing extra is stored).
    corrected: how much of the error of earlier layers this one makes good, 0 (one stream) to 1.
    damp, corrected_damp: damping as a fraction of the Hessian's mean diagonal, of the sweep and of what `corrected`
        divides by. block_size: columns between two lazy updates.
    descent: sweeps of coordinate descent over the codes at the end.
    activations: what inputs are rounded to where the weight is computed with, "none", "int8" or "fp8" (then weights are
        FP8 too, with one scale a row, and the grid's other fields say nothing).
    smooth: how much of what is loud in the inputs has moved into the weight before it comes here, 0 to 1, or "none".
    residual: keep what rounding left, for whoever goes on training from there.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    scale_search: ScaleSearch = "trial"
    signed: bool = True
    act_order: bool = True
    corrected: float = 1.0
    corrected_damp: float = 0.1
    damp: float = 0.1
    block_size: int = 128
    descent: int = 0
    activations: Literal["none", "int8", "fp8"] = "none"
    smooth: float | Literal["none"] = "none"
    residual: bool = False


class SiteStatistics(Protocol):
    """What a method may know of the data at a tap.

    tokens: how many. hessian: float32 or float64 [in, in], X~^T X~ / tokens, undamped, where X~ are the inputs after
    the compressed prefix. cross: [in, in], (X - X~)^T X~ / tokens, where X are the original model's inputs; None with
    one stream. drift: [out, in], what the weight W makes of cross, W (X - X~)^T X~ / tokens, where that is known in its
    place; else None.
    """

    @property
    def tokens(self) -> int: ...
    @property
    def hessian(self) -> Tensor: ...
    @property
    def cross(self) -> Tensor | None: ...
    @property
    def drift(self) -> Tensor | None: ...


@dataclass(frozen=True, eq=False)
class Solved:
    """A solved weight and what it cost.

    error: ||(W - Q) X~||^2 / ||W X~||^2, by the undamped Hessian (without statistics: the identity).
    row_error, row_energy: float32 [out_features], its numerator and denominator by row.
    damping: what was added to the Hessian's diagonal, as a fraction of its mean. events: what went otherwise than
    asked, one line each, for the report.
    residual: float32 [out_features, in_features], what each weight was when its code was chosen, compensations and all,
        less what it became; None unless the spec asks for it.
    """

    weight: Solvable
    error: float
    row_error: Tensor
    row_energy: Tensor
    damping: float
    events: tuple[str, ...]
    residual: Tensor | None = None


Solver = Callable[[Tensor, "SiteStatistics | None", QuantizeSpec, torch.dtype], Solved]


def resolve_group_size(in_features: int, group_size: int) -> int:
    """The real number of inputs in a group: -1 is the whole row. Raises SolveError when it doesn't divide the row."""
    size = in_features if group_size == -1 else group_size
    if size < 1 or in_features % size:
        raise SolveError(f"group_size {group_size} doesn't divide {in_features} inputs: choose a divisor, or -1")
    return size


def check_finite(name: str, values: Tensor) -> None:
    """Raise SolveError if `values` hold a NaN or an infinity."""
    # The sum is not finite if any value isn't, and costs no temporary; a finite overflow is looked at again.
    if not torch.isfinite(values.sum()) and not bool(torch.isfinite(values).all()):
        raise SolveError(f"{name} holds NaN or infinity: check the checkpoint, or run the model in float32")


def measure(weight: Tensor, quantized: GroupedInt | EightBit | Dense, hessian: Tensor | None) -> tuple[Tensor, Tensor]:
    """What quantizing cost and what there was to lose, by row: ((W-Q) H (W-Q)^T, W H W^T)'s diagonals.

    weight: float32 [out, in]. Returns two float32 [out]; without a Hessian, squared Euclidean norms.
    """
    errors, energies = [], []
    # 64 MB of float32 at a time: a stacked gate/up of a big model would otherwise need several copies of itself.
    chunk = max(1, (1 << 24) // weight.shape[1])
    for start in range(0, weight.shape[0], chunk):
        rows = weight[start : start + chunk]
        difference = rows - quantized.rows(start, start + chunk).dequantize()
        errors.append(_energy(difference, hessian))
        energies.append(_energy(rows, hessian))
    return torch.cat(errors), torch.cat(energies)


def _energy(rows: Tensor, hessian: Tensor | None) -> Tensor:
    if hessian is None:
        through = rows
    else:
        with torch.no_grad():  # it is symmetric, so it needn't be transposed
            through = times_transposed(rows.to(hessian.dtype), hessian).to(torch.float32)
    # Rounding can leave a tiny negative number where the truth is zero.
    return torch.einsum("oi,oi->o", through, rows).clamp_min_(0.0)


def relative(error: Tensor, energy: Tensor) -> float:
    """sum(error) / sum(energy); an all-zero site that stays zero has lost nothing."""
    lost, total = float(error.double().sum()), float(energy.double().sum())
    return lost / total if total > 0 else lost
