"""GPTQ with the scale search, the order and the target that measurement chose.

The steps, each of them an option of the spec: factorise the damped Hessian once (`factor`); move the target to make
good what earlier layers broke (`correct`); fix each group's scale beforehand (`scales`) or try candidates in the sweep
(`trial`); quantize column after column, later columns absorbing the errors (`sweep`); look at each code again with all
others in place (`descent`).

act_order quantizes loud inputs first, while there are still many columns left to absorb their errors. Groups stay
where they are in the weight, so nothing is stored for it. With scales fixed beforehand columns go by diag(H) alone; the
trial needs a group's columns together, so groups go by the mean of their diag(H) and columns likewise inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.methods.contract import (
    QuantizeSpec,
    SiteStatistics,
    Solved,
    SolveError,
    check_finite,
    measure,
    relative,
    resolve_group_size,
)
from llmshrink.methods.correct import corrected
from llmshrink.methods.descent import descend
from llmshrink.methods.factor import Factor, damped, factorise
from llmshrink.methods.registry import site_solver
from llmshrink.methods.scales import Grid, fit, minmax
from llmshrink.methods.sweep import sweep_
from llmshrink.methods.trial import trial_sweep_
from llmshrink.weights import GroupedInt


@site_solver("gptq", reads=frozenset({"hessian", "cross"}))
def gptq(weight: Tensor, statistics: SiteStatistics | None, spec: QuantizeSpec, scale_dtype: torch.dtype) -> Solved:
    """Quantize a weight so that its output on the calibration inputs changes least.

    weight: [out_features, in_features], any float dtype. statistics: required; `cross` or `drift` is read when
    `spec.corrected` is above 0. scale_dtype: how scales will be stored. Raises SolveError on NaN, on a group size that
    doesn't divide in_features, and on a Hessian that no damping makes positive definite.
    """
    if statistics is None:
        raise SolveError("method gptq needs calibration data: give some, or use method rtn")
    check_finite("the weight", weight)
    size, factor = _factor(weight, statistics, spec)
    original = weight.to(torch.float32)
    target, said = corrected(original, statistics, spec.corrected, spec.corrected_damp)
    events = factor.events + said
    columns = target.index_select(1, factor.order).T.contiguous()
    quantized = _quantize_(columns, statistics.hessian.diagonal(), factor, size, spec, scale_dtype)
    residual = _natural(columns, factor) if spec.residual else None
    if spec.descent:
        swept = quantized
        quantized = descend(swept, target, damped(statistics.hessian, factor.damping), None, spec.descent)
        residual = _moved(residual, swept, quantized)
    error, energy = measure(original, quantized, statistics.hessian)
    return Solved(quantized, relative(error, energy), error, energy, factor.damping, events, residual)


def gptq_on(
    target: Tensor, mask: Tensor, statistics: SiteStatistics, spec: QuantizeSpec, scale_dtype: torch.dtype
) -> tuple[GroupedInt, Tensor | None]:
    """Quantize a pruned weight: what isn't in the mask stays exactly zero, and the rest makes good both.

    Returns it, and the `residual` of Solved.

    target: float32 [out, in], the best weight on the mask, which is already what `spec.corrected` would ask for: with
    least squares on the mask, what is left of the output's error is orthogonal to all that the mask allows, so that
    coming near this target is coming near the original's output. mask: bool [out, in].
    """
    size, factor = _factor(target, statistics, spec)
    columns, keep = (part.index_select(1, factor.order).T.contiguous() for part in (target, mask.to(torch.float32)))
    swept = _quantize_(columns, statistics.hessian.diagonal(), factor, size, spec, scale_dtype, keep)
    residual = _natural(columns, factor) if spec.residual else None
    if not spec.descent:
        return swept, residual
    quantized = descend(swept, target, damped(statistics.hessian, factor.damping), mask, spec.descent)
    return quantized, _moved(residual, swept, quantized)


def _natural(columns: Tensor, factor: Factor) -> Tensor:
    """What the sweep left in its columns, [in, rows] in the factor's order, as a weight: [out, in]."""
    return torch.empty_like(columns).index_copy_(0, factor.order, columns).T.contiguous()


def _moved(residual: Tensor | None, before: GroupedInt, after: GroupedInt) -> Tensor | None:
    """The residual of other codes for the same compensated weight."""
    return None if residual is None else residual + before.dequantize() - after.dequantize()


def _factor(weight: Tensor, statistics: SiteStatistics, spec: QuantizeSpec) -> tuple[int, Factor]:
    size = resolve_group_size(weight.shape[1], spec.group_size)
    order = column_order(statistics.hessian.diagonal(), size, spec)
    return size, factorise(statistics.hessian, order, spec.damp)


def _quantize_(
    columns: Tensor,
    diagonal: Tensor,
    factor: Factor,
    size: int,
    spec: QuantizeSpec,
    scale_dtype: torch.dtype,
    keep: Tensor | None = None,
) -> GroupedInt:
    """The sweep itself. columns: float32 [in, rows] in the factor's order, overwritten by what each lost when its turn
    came; keep: as in `sweep_`."""
    order = factor.order
    if spec.scale_search == "trial":
        codes, grid = trial_sweep_(columns, factor, size, spec, scale_dtype, keep)
        grid = _scatter(grid, order[::size] // size)
    else:
        grid = fixed_scales(columns, diagonal, factor, size, spec, scale_dtype)
        codes = sweep_(columns, factor.unit, grid, order // size, spec.bits, spec.block_size, keep)
    return GroupedInt(
        torch.empty_like(codes).index_copy_(0, order, codes).T.contiguous(),
        grid.scale.T.to(scale_dtype, memory_format=torch.contiguous_format),
        None if grid.zero is None else grid.zero.T.to(torch.int8, memory_format=torch.contiguous_format),
        spec.bits,
        size,
    )


def column_order(diagonal: Tensor, size: int, spec: QuantizeSpec) -> Tensor:
    """The input that is quantized i-th: int64 [in]. diagonal: of the Hessian, [in]. Ties keep their natural order."""
    if not spec.act_order:
        return torch.arange(diagonal.shape[0], device=diagonal.device)
    if spec.scale_search != "trial":
        return diagonal.argsort(descending=True, stable=True)
    grouped = diagonal.view(-1, size)
    within = grouped.argsort(dim=1, descending=True, stable=True)
    groups = grouped.mean(1).argsort(descending=True, stable=True)
    first = torch.arange(0, diagonal.shape[0], size, device=diagonal.device)
    return (within + first.unsqueeze(1)).index_select(0, groups).view(-1)


def fixed_scales(
    columns: Tensor, diagonal: Tensor, factor: Factor, size: int, spec: QuantizeSpec, dtype: torch.dtype
) -> Grid:
    """Scales of all groups on the target, before the sweep: [groups, rows] in the natural order of groups.

    columns: float32 [in, rows] in the factor's order. diagonal: of the Hessian, [in], in the natural order.
    """
    natural = columns.index_select(0, factor.order.argsort()).view(-1, size, columns.shape[1])
    if spec.scale_search == "minmax":
        return minmax(natural, spec, dtype)
    importance = diagonal.to(torch.float32).view(-1, size) if spec.scale_search == "hessian" else None
    return fit(natural, importance, spec, dtype)


def _scatter(grid: Grid, groups: Tensor) -> Grid:
    """Put grids that are in the order of the sweep, [groups, rows], where their groups are in the weight."""
    scale = torch.empty_like(grid.scale).index_copy_(0, groups, grid.scale)
    zero = None if grid.zero is None else torch.empty_like(grid.zero).index_copy_(0, groups, grid.zero)
    return Grid(scale, zero)
