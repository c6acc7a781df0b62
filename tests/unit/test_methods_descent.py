"""Coordinate descent over codes: the naive loop in float64, an error that never rises, and zeros that stay."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import oracle
import pytest
import torch
from torch import Tensor

from llmshrink.calibration.statistics import Statistics
from llmshrink.methods import Pattern, PruneSpec, QuantizeSpec, SiteSpec, solve
from llmshrink.methods.descent import descend
from llmshrink.methods.gptq import gptq
from llmshrink.methods.pruning import prune
from llmshrink.weights import GroupedInt

ROWS, WIDTH, SIZE = 12, 192, 32
SPEC = QuantizeSpec(bits=3, group_size=SIZE, corrected=0.0)
PRUNE = PruneSpec("sparsegpt", Pattern.n_of_m(2, 4), corrected=0.0)


@cache
def site() -> tuple[Tensor, Statistics]:
    """A weight over correlated inputs of different loudness; 192 of them: the second block isn't whole."""
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) * (0.2 + 2 * torch.rand(WIDTH, generator=generator))
    statistics = Statistics(WIDTH)
    statistics.add(torch.randn(900, WIDTH, generator=generator) @ mix / WIDTH**0.5)
    return torch.randn(ROWS, WIDTH, generator=generator), statistics


def start(*, masked: bool, symmetric: bool) -> tuple[GroupedInt, Tensor, Tensor | None]:
    """What the sweep leaves, its target, and the mask."""
    weight, statistics = site()
    spec = replace(SPEC, symmetric=symmetric)
    if not masked:
        found = gptq(weight, statistics, spec, torch.float32).weight
        assert isinstance(found, GroupedInt)
        return found, weight, None
    pruned = prune(weight, statistics, PRUNE)
    found = solve(weight, statistics, SiteSpec(PRUNE, spec), torch.float32).weight
    assert isinstance(found, GroupedInt)
    return found, pruned.weight, pruned.mask


def error(found: GroupedInt, target: Tensor, hessian: Tensor) -> float:
    moved = found.dequantize().double() - target.double()
    return float(((moved @ hessian) * moved).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_no_sweep_raises_the_error_and_zero_stays_zero(masked: bool, symmetric: bool) -> None:
    found, target, mask = start(masked=masked, symmetric=symmetric)
    hessian = oracle.damped(site()[1].hessian, SPEC.damp)
    errors = [error(found, target, hessian)]
    for _ in range(4):
        found = descend(found, target, hessian.float(), mask, 1)
        errors.append(error(found, target, hessian))
        if mask is not None:
            assert not found.dequantize()[~mask].any()
    assert errors[1] < 0.995 * errors[0]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_it_is_the_naive_loop(masked: bool, symmetric: bool) -> None:
    found, target, mask = start(masked=masked, symmetric=symmetric)
    hessian = oracle.damped(site()[1].hessian, SPEC.damp)
    swept = descend(found, target, hessian.float(), mask, 2)
    codes = found.codes.clone()
    for row in range(ROWS):
        value, wanted = found.dequantize()[row].double(), target[row].double()
        for j in 2 * list(range(WIDTH)):
            if mask is None or mask[row, j]:
                scale = float(found.scale[row, j // SIZE])
                zero = 0 if found.zero_point is None else int(found.zero_point[row, j // SIZE])
                best = float(value[j] + (wanted - value) @ hessian[:, j] / hessian[j, j])
                codes[row, j], value[j] = oracle.quantize(best, scale, zero, SPEC.bits)
    assert (codes == swept.codes).double().mean() > 0.995
    assert not torch.equal(found.codes, swept.codes)
    again = replace(found, codes=codes)
    assert error(swept, target, hessian) == pytest.approx(error(again, target, hessian), rel=2e-3)


def test_it_ends_where_no_code_would_move_and_is_the_specs_choice() -> None:
    weight, statistics = site()
    hessian = oracle.damped(statistics.hessian, SPEC.damp).float()
    for masked in (True, False):
        found, target, mask = start(masked=masked, symmetric=True)
        settled = descend(found, target, hessian, mask, 60)
        assert torch.equal(descend(settled, target, hessian, mask, 1).codes, settled.codes)
        asked = SiteSpec(PRUNE if masked else None, replace(SPEC, descent=60))
        through = solve(weight, statistics, asked, torch.float32)
        assert isinstance(through.weight, GroupedInt)
        assert (through.weight.codes == settled.codes).double().mean() > 0.99
        assert torch.equal(through.weight.scale, found.scale)
