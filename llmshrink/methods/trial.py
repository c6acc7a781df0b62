"""The trial sweep: a group's scale is chosen by quantizing the group with every candidate.

When a group's turn comes, its weights already carry what the groups before it left to make good, so that a scale fitted
to the original weights fits no longer; and a closed form doesn't know that errors inside the group will be
compensated. So the sweep runs inside the group once for each candidate, for all rows and candidates at the same time,
and each row takes the scale with the smallest

    sum_i e_i^2 / U_ii^2,

which is exactly what the group adds to ||(W - Q) X~||^2 once all later columns have adapted. Candidates are multiples
of a least-squares guess, of both signs when `signed`.

Layout: errors are [inputs of the group, candidates, rows] in units of the candidate's scale (so that rounding needs no
scale at all: v = w / s, e = v - clamp(round(v))), which makes a column of all candidates one contiguous vector. The
winner's codes are not stored during the trial: they follow from its errors, since column j was rounded from
w_j / s - sum_{i<j} e_i U_ij / U_ii and e_j is what was left:

    q_j = w_j / s - sum_{i<=j} e_i * (U_ij / U_ii).

Where there are kernels (`fused`) a group is one launch, for all rows and candidates, and the winner comes out of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.methods import fused
from llmshrink.methods.contract import QuantizeSpec
from llmshrink.methods.factor import Factor
from llmshrink.methods.scales import Grid, fit, stored
from llmshrink.methods.sweep import RUN, collect_
from llmshrink.weights import code_range

BUFFER = 1 << 22
MULTIPLES = (0.8, 0.85, 0.9, 0.94, 0.97, 1.0, 1.03, 1.06, 1.1, 1.15, 1.2)
OPPOSITE = (0.9, 1.0, 1.1)
"""Multiples of the other sign than the guess's. As many as of its own bring nothing: KL on wiki7m with 11 and 3 against
11 and 11 is .0289 / .0290 (W4 g128), .0253 / .0250 (W4 g64), .0943 / .0948 (W3 g64), .380 / .395 (W2 g64)."""


def trial_sweep_(
    weight: Tensor, factor: Factor, size: int, spec: QuantizeSpec, dtype: torch.dtype, keep: Tensor | None = None
) -> tuple[Tensor, Grid]:
    """Quantize group after group, and return codes, int8 [in, rows], and grid, [groups in the factor's order, rows].

    weight: float32 [in, rows], transposed and in the factor's order, in which each group's columns must be
    consecutive; overwritten with the errors. keep: as in `sweep.sweep_`, in the same order.
    """
    inputs, rows = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(inputs // size, rows, device=weight.device)
    zero = None if spec.symmetric else torch.empty_like(scale)
    for g, start in enumerate(range(0, inputs, size)):
        stop = start + size
        collect_(weight, factor.unit, 0, start, stop)
        unit = factor.unit[start:stop, start:stop].contiguous()
        part_of = weight[start:stop] if keep is None else weight[start:stop] * keep[start:stop]
        guess = fit(part_of, None, spec, dtype)
        tried = candidates(guess, spec, dtype)
        if keep is None and fused.has_kernels(weight.device):
            from llmshrink_kernels.gptq_block import trial_block

            important = factor.importance[start:stop]
            codes[start:stop], scale[g], best_zero, weight[start:stop] = trial_block(
                weight[start:stop], unit, important, tried.scale, tried.zero, bits=spec.bits
            )
            if zero is not None and best_zero is not None:
                zero[g] = best_zero
            continue
        chunk = max(1, BUFFER // (size * tried.scale.shape[0]))
        for row in range(0, rows, chunk):
            part = slice(row, min(row + chunk, rows))
            best, errors = _try(
                weight[start:stop, part],
                unit,
                factor.importance[start:stop],
                Grid(tried.scale[:, part], None if tried.zero is None else tried.zero[:, part]),
                spec.bits,
                None if keep is None else keep[start:stop, part],
            )
            scale[g, part] = best.scale
            value = weight[start:stop, part] / best.scale
            value.addmm_(unit.T, errors, alpha=-1.0)
            if zero is not None and best.zero is not None:
                zero[g, part] = best.zero
                value += best.zero
            codes[start:stop, part] = value.round_()
            torch.mul(errors, best.scale, out=weight[start:stop, part])
    return codes, Grid(scale, zero)


def candidates(guess: Grid, spec: QuantizeSpec, dtype: torch.dtype) -> Grid:
    """[candidates, rows]: multiples of the guess, and some of its negative when that is allowed."""
    multiples = torch.tensor(MULTIPLES, device=guess.scale.device).unsqueeze(1)
    scale = multiples * guess.scale
    if guess.zero is None:
        opposite = torch.tensor(OPPOSITE, device=guess.scale.device).unsqueeze(1) * -guess.scale
        return Grid(stored(torch.cat([scale, opposite]) if spec.signed else scale, dtype), None)
    low, high = code_range(spec.bits)
    # The clipped range keeps its middle: (low + high) / 2 - zero, in weights, is the same for every multiple.
    centre = (low + high) / 2
    zero = torch.round(centre - (centre - guess.zero) / multiples).clamp_(low, high)
    return Grid(stored(scale, dtype), zero)


def _try(
    weight: Tensor, unit: Tensor, importance: Tensor, grid: Grid, bits: int, keep: Tensor | None
) -> tuple[Grid, Tensor]:
    """Sweep one group with every candidate.

    weight, keep: float32 [size, rows]. grid: [candidates, rows]. Returns the best scale (and zero) of each row, [rows],
    and its errors in units of that scale, [size, rows].
    """
    low, high = code_range(bits)
    size, rows = weight.shape
    candidates = grid.scale.shape[0]
    errors = torch.empty(size, candidates, rows, device=weight.device)
    flat = errors.view(size, candidates * rows)
    inverse = grid.scale.reciprocal()
    nearest = torch.empty(candidates * rows, device=weight.device)
    square = torch.empty(RUN, candidates * rows, device=weight.device)
    damage = torch.zeros(candidates * rows, device=weight.device)
    bounds = None if grid.zero is None else ((low - grid.zero).view(-1), (high - grid.zero).view(-1))
    for run in range(0, size, RUN):
        end = min(run + RUN, size)
        torch.mul(weight[run:end].unsqueeze(1), inverse, out=errors[run:end])
        collect_(flat, unit, 0, run, end)
        for i in range(run, end):
            column = flat[i]
            if i > run:
                column.addmv_(flat[run:i].T, unit[run:i, i], alpha=-1.0)
            torch.round(column, out=nearest)
            if bounds is None:
                nearest.clamp_(low, high)
            else:
                nearest.clamp_(*bounds)
            if keep is not None:
                nearest.view(candidates, rows).mul_(keep[i])
            column.sub_(nearest)
        torch.mul(flat[run:end], flat[run:end], out=square[: end - run])
        damage.addmv_(square[: end - run].T, importance[run:end])
    choice = (damage.view(candidates, rows) * grid.scale.square()).argmin(0, keepdim=True)
    best = Grid(grid.scale.gather(0, choice)[0], None if grid.zero is None else grid.zero.gather(0, choice)[0])
    return best, errors.gather(1, choice.expand(size, 1, rows)).squeeze(1)
