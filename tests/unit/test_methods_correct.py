"""The corrected target against the normal equations in float64."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from torch import Tensor

from llmshrink.calibration.statistics import Statistics, merge, through_one
from llmshrink.methods import NarrowSpec, QuantizeSpec, SolveError, solver
from llmshrink.methods.correct import corrected
from llmshrink.methods.narrow import narrow
from llmshrink.methods.pruning import PruneSpec, prune


def drifted(
    rows: int, width: int, *, tokens: int = 300, silent: int | None = None, through: bool = False
) -> tuple[Tensor, Statistics]:
    """A weight, and statistics of inputs that drifted from the original's; one input may be always zero. through: W D
    is gathered in D's place."""
    generator = torch.Generator().manual_seed(rows)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    original = torch.randn(tokens, width, generator=generator) @ mix
    compressed = original + 0.1 * torch.randn(tokens, width, generator=generator)
    if silent is not None:
        original[:, silent] = compressed[:, silent] = 0
    weight = torch.randn(rows, width, generator=generator)
    statistics = Statistics(width, cross=True, through=weight if through else None)
    for part in (slice(0, tokens // 3), slice(tokens // 3, None)):
        statistics.add(compressed[part], original[part])
    return weight, statistics


@pytest.mark.parametrize("silent", [None, 5])
@pytest.mark.parametrize("damp", [0.001, 0.1])
@pytest.mark.parametrize("rows", [7, 33, 70])
def test_it_solves_the_normal_equations(rows: int, damp: float, silent: int | None) -> None:
    weight, statistics = drifted(rows, 33, silent=silent)
    assert statistics.cross is not None
    found, events = corrected(weight, statistics, 0.7, damp)
    inverse = torch.linalg.inv(oracle.damped(statistics.hessian, damp))
    wanted = weight.double() + 0.7 * weight.double() @ statistics.cross.double() @ inverse
    assert torch.allclose(found.double(), wanted, atol=1e-4) and events == ()
    if silent is not None:
        assert torch.equal(found[:, silent], weight[:, silent])


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_what_is_gathered_through_the_weight_gives_the_same(rows: int) -> None:
    weight, plain = drifted(rows, 33)
    same, through = drifted(rows, 33, through=True)
    assert torch.equal(weight, same) and through.cross is None and plain.drift is None and plain.cross is not None
    assert through.drift is not None and through.drift.shape == (rows, 33)
    assert torch.allclose(through.drift, weight @ plain.cross, atol=1e-5)
    found, expected = (corrected(weight, each, 0.7, 0.01)[0] for each in (through, plain))
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(found, weight, atol=1e-2)
    narrowed = [narrow(weight, each, NarrowSpec(20), torch.float32).weight for each in (through, plain)]
    assert torch.allclose(*narrowed, atol=1e-4)
    both = merge(through, drifted(rows, 33, through=True)[1])
    assert both.drift is not None and torch.allclose(both.drift, through.drift, atol=1e-6)


def test_it_is_gathered_so_for_one_weight_of_few_outputs_alone() -> None:
    assert through_one([576], 1536) and through_one([4096], 14336) and through_one([16], 32)
    assert not through_one([17], 32) and not through_one([8, 8], 32) and not through_one([], 32)


def test_one_stream_has_nothing_to_correct() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    statistics = Statistics(32)
    statistics.add(torch.randn(50, 32, generator=torch.Generator().manual_seed(1)))
    assert corrected(weight, statistics, 1.0, 0.1)[0] is weight
    assert corrected(weight, drifted(4, 32)[1], 0.0, 0.1)[0] is weight


def test_more_damping_moves_a_weight_less() -> None:
    weight, statistics = drifted(16, 40, tokens=60)
    assert statistics.cross is not None
    moved = [float((corrected(weight, statistics, 1.0, damp)[0] - weight).norm()) for damp in (0.001, 0.01, 0.1, 0.9)]
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
    assert solved.events == (said,) and solved.damping == 0.1
    assert said in prune(weight, statistics, PruneSpec(corrected_damp=0.0)).events


def test_a_hessian_that_no_damping_helps_is_refused() -> None:
    _, statistics = drifted(4, 32)
    statistics.hessian.copy_(torch.eye(32) - 3 * torch.ones(32, 32).triu(1) - 3 * torch.ones(32, 32).tril(-1))
    with pytest.raises(SolveError, match=r"can't be factorised.*\(32 inputs, mean 1\): calibrate with more tokens"):
        corrected(torch.randn(4, 32), statistics, 1.0, 0.1)


def test_nan_is_refused() -> None:
    weight, statistics = drifted(4, 32)
    assert statistics.cross is not None
    statistics.cross[2, 3] = float("nan")
    with pytest.raises(SolveError, match="the cross term holds NaN or infinity"):
        corrected(weight, statistics, 1.0, 0.1)
