"""Fewer inputs for a whole matrix: which go, and what the rest become to make that good.

An FFN's channels are the inputs of the matrix that consumes them (down_proj), and a KV group's query heads are inputs
of o_proj. Removing them from the consumer lets their producers' rows go too, so the model becomes plainly smaller.
Inputs go in units of `unit` consecutive ones: 1 for a channel, (query heads a group) * head_dim for a KV group.

The damage of leaving unit u out, if nothing else moves, is E|W_u x_u|^2 = tr(W_u H_uu W_u^T); the units with the most
stay (`activations`; `magnitude` takes H for the identity). Then all columns that stay make good those that go: with S
what stays, the V that minimises E|W x - V x~_S|^2, x what the original sees and x~ what the smaller model does, solves
the normal equations

    V H_SS = (W (H + a D))_S

in the terms of `Statistics`; a = 1 is the corrected target and a = 0 takes x~ for x. One factorisation does for all
rows. Choosing units by what is left of the damage after the repair (OBS) was measured to bring nothing over this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmshrink.methods.contract import SiteStatistics, SolveError, check_finite, measure, relative
from llmshrink.methods.correct import drift
from llmshrink.methods.factor import attempts
from llmshrink.weights import Dense

Importance = Literal["activations", "magnitude"]


@dataclass(frozen=True)
class NarrowSpec:
    """How the inputs of one matrix become fewer.

    keep: units that stay. unit: consecutive inputs that go together. repair: least squares on what stays.
    corrected: how much of the error of earlier layers the repair makes good, 0 (one stream) to 1. damp: damping as a
    fraction of the Hessian's mean diagonal.
    """

    keep: int
    unit: int = 1
    importance: Importance = "activations"
    repair: bool = True
    corrected: float = 1.0
    damp: float = 0.001

    @property
    def reads(self) -> frozenset[str]:
        """Which statistics are read: a subset of {"hessian", "cross"}."""
        return frozenset({"hessian", "cross"} if self.repair and self.corrected > 0 else {"hessian"})


@dataclass(frozen=True, eq=False)
class Narrowed:
    """A narrower weight and what it cost.

    weight: [out, keep * unit] in the dtype it is stored in. units: int64 [keep], which stayed, ascending.
    error, row_error, row_energy, damping, events: as in `methods.Solved`.
    """

    weight: Tensor
    units: Tensor
    error: float
    row_error: Tensor
    row_energy: Tensor
    damping: float
    events: tuple[str, ...]


def narrow(weight: Tensor, statistics: SiteStatistics, spec: NarrowSpec, dtype: torch.dtype) -> Narrowed:
    """Keep `spec.keep` units of a weight's inputs.

    weight: [out_features, in_features], any float dtype. dtype: how the result is stored. Raises SolveError on NaN, and
    on a Hessian that no damping makes positive definite.
    """
    count = weight.shape[1] // spec.unit
    assert count * spec.unit == weight.shape[1] and 0 < spec.keep < count, (weight.shape, spec)
    check_finite("the weight", weight)
    check_finite("the Hessian", statistics.hessian)
    original, hessian = weight.to(torch.float32), statistics.hessian
    scores = importance(original, hessian if spec.importance == "activations" else None, spec.unit)
    units = largest(scores, spec.keep)
    inputs = inputs_of(units, spec.unit)
    damping, events = 0.0, tuple[str, ...]()
    if spec.repair:
        known = statistics.cross is not None or statistics.drift is not None
        moved = drift(original, statistics) if spec.corrected > 0 and known else None
        found, damping, events = repaired(original, inputs, hessian, moved, spec)
    else:
        found = original.index_select(1, inputs)
    stored = found.to(dtype)
    whole = torch.zeros_like(original).index_copy_(1, inputs, stored.to(torch.float32))
    error, energy = measure(original, Dense(whole), hessian)
    return Narrowed(stored, units, relative(error, energy), error, energy, damping, events)


def importance(weight: Tensor, hessian: Tensor | None, unit: int) -> Tensor:
    """tr(W_u H_uu W_u^T) of every unit: float32 [in / unit]. weight: float32 [out, in]; hessian: [in, in], or None."""
    if hessian is None:
        return weight.square().sum(0).view(-1, unit).sum(1)
    if unit == 1:
        return weight.square().sum(0) * hessian.diagonal().to(torch.float32)
    blocks = [slice(start, start + unit) for start in range(0, weight.shape[1], unit)]
    return torch.stack([((weight[:, u] @ hessian[u, u].to(torch.float32)) * weight[:, u]).sum() for u in blocks])


def largest(scores: Tensor, keep: int) -> Tensor:
    """Places of the `keep` largest scores, ascending: int64 [keep]. Of equal ones the earlier stay."""
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def inputs_of(units: Tensor, unit: int) -> Tensor:
    """The inputs (or, of a producer, the outputs) that make up some units: int64 [len(units) * unit], ascending."""
    return (units.unsqueeze(1) * unit + torch.arange(unit, device=units.device)).view(-1)


def repaired(
    weight: Tensor, inputs: Tensor, hessian: Tensor, moved: Tensor | None, spec: NarrowSpec
) -> tuple[Tensor, float, tuple[str, ...]]:
    """The solution V of the normal equations on `inputs`: float32 [out, len(inputs)], the damping used, events.

    weight: float32 [out, in]. inputs: int64, ascending. hessian: [in, in]. moved: W D, [out, in], or None. The damped H
    pulls towards W, so that an input which is never active keeps its weights.
    """
    diagonal = hessian.diagonal().to(torch.float64)
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if bool(live.any()) else 1.0
    wanted = weight @ hessian.to(torch.float32).index_select(1, inputs)
    if moved is not None:
        wanted += spec.corrected * moved.index_select(1, inputs)
    kept = weight.index_select(1, inputs)
    dead = torch.where(live, 0.0, mean).index_select(0, inputs)
    for damping, dtype in attempts(spec.damp):
        ridge = (dead + damping * mean).to(dtype)
        system = hessian.index_select(0, inputs).index_select(1, inputs).to(dtype)
        system.diagonal().add_(ridge)
        lower, info = torch.linalg.cholesky_ex(system)
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            right = wanted.to(dtype) + kept.to(dtype) * ridge
            found = torch.cholesky_solve(right.T, lower).T.to(torch.float32).contiguous()
            said = (f"Cholesky failed in float32: done in float64 with damping {damping:g}",)
            return found, damping, said if dtype == torch.float64 else ()
    raise SolveError(
        f"the Hessian of {len(inputs)} inputs can't be factorised, even with its mean diagonal {mean:g} added to its "
        "diagonal: calibrate with more tokens, or leave the repair out with --no-repair"
    )
