"""The corrected target against the normal equations in float64."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from torch import Tensor

from llmshrink.calibration.statistics import Statistics
from llmshrink.methods import QuantizeSpec, SolveError, solver
from llmshrink.methods.correct import corrected
from llmshrink.methods.pruning import PruneSpec, prune


def drifted(rows: int, width: int, *, tokens: int = 300, silent: int | None = None) -> tuple[Tensor, Statistics]:
    """A weight, and statistics of inputs that drifted from the original's; one input may be always zero."""
    generator = torch.Generator().manual_seed(rows)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    original = torch.randn(tokens, width, generator=generator) @ mix
    compressed = original + 0.1 * torch.randn(tokens, width, generator=generator)
    if silent is not None:
        original[:, silent] = compressed[:, silent] = 0
    statistics = Statistics(width, cross=True)
    statistics.add(compressed, original)
    return torch.randn(rows, width, generator=generator), statistics


@pytest.mark.parametrize("silent", [None, 5])
@pytest.mark.parametrize("damp", [0.001, 0.1])
@pytest.mark.parametrize("rows", [7, 33, 70])
def test_it_solves_the_normal_equations(rows: int, damp: float, silent: int | None) -> None:
    weight, statistics = drifted(rows, 33, silent=silent)
    assert statistics.cross is not None
    found, events = corrected(weight, statistics.cross, statistics.hessian, 0.7, damp)
    inverse = torch.linalg.inv(oracle.damped(statistics.hessian, damp))
    wanted = weight.double() + 0.7 * weight.double() @ statistics.cross.double() @ inverse
    assert torch.allclose(found.double(), wanted, atol=1e-4) and events == ()
    if silent is not None:
        assert torch.equal(found[:, silent], weight[:, silent])


def test_more_damping_moves_a_weight_less() -> None:
    weight, statistics = drifted(16, 40, tokens=60)
    assert statistics.cross is not None
    moved = [
        float((corrected(weight, statistics.cross, statistics.hessian, 1.0, damp)[0] - weight).norm())
        for damp in (0.001, 0.01, 0.1, 0.9)
    ]
    assert moved == sorted(moved, reverse=True) and moved[0] > 2 * moved[-1]


def test_the_sweep_and_the_target_have_each_their_damping() -> None:
    weight, statistics = drifted(12, 32)
    spec = QuantizeSpec(bits=8, group_size=-1, scale_search="minmax", damp=0.5, corrected_damp=0.001)
    near = oracle.target(weight, statistics, spec)
    far = oracle.target(weight, statistics, replace(spec, corrected_damp=0.5))
    found = solver("gptq").solve(weight, statistics, spec, torch.float32).weight.dequantize().double()
    assert (found - near).norm() < 0.2 * (far - near).norm()
    pruned = prune(weight, statistics, PruneSpec("magnitude", damp=0.5, corrected_damp=0.001))
    assert torch.allclose(pruned.target.double(), near, atol=1e-4)


def test_a_singular_hessian_is_damped_more_and_said() -> None:
    statistics = Statistics(32, cross=True)
    statistics.add(torch.ones(3, 32), torch.full((3, 32), 1.1))
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    solved = solver("gptq").solve(weight, statistics, QuantizeSpec(group_size=16, corrected_damp=0.0), torch.float32)
    said = "the corrected target's Cholesky failed in float32: done in float64 with damping 0.01"
    assert solved.events == (said,) and solved.damping == 0.01
    assert said in prune(weight, statistics, PruneSpec(corrected_damp=0.0)).events


def test_a_hessian_that_no_damping_helps_is_refused() -> None:
    hessian = torch.eye(32) - 3 * torch.ones(32, 32).triu(1) - 3 * torch.ones(32, 32).tril(-1)
    with pytest.raises(SolveError, match=r"can't be factorised.*\(32 inputs, mean 1\): calibrate with more tokens"):
        corrected(torch.randn(4, 32), torch.eye(32), hessian, 1.0, 0.1)


def test_nan_is_refused() -> None:
    weight, statistics = drifted(4, 32)
    assert statistics.cross is not None
    statistics.cross[2, 3] = float("nan")
    with pytest.raises(SolveError, match="the cross term holds NaN or infinity"):
        corrected(weight, statistics.cross, statistics.hessian, 1.0, 0.1)
