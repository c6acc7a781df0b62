"""Fewer inputs: the repair against the normal equations in float64, what is chosen, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from llmshrink.calibration.statistics import Statistics
from llmshrink.methods import NarrowSpec, SolveError, narrow
from llmshrink.methods.narrow import importance, inputs_of, largest


@dataclass(frozen=True)
class Data:
    """W [out, in] float32; the original's inputs and the compressed model's, [tokens, in] float32; their statistics."""

    weight: Tensor
    original: Tensor
    compressed: Tensor
    statistics: Statistics


def data(out: int = 24, width: int = 37, tokens: int = 400, *, dead: tuple[int, ...] = (), seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    original = torch.randn(tokens, width, generator=generator) @ mix
    compressed = original + 0.2 * torch.randn(tokens, width, generator=generator)
    original[:, list(dead)] = compressed[:, list(dead)] = 0.0
    statistics = Statistics(width, cross=True)
    statistics.add(compressed, original)
    return Data(torch.randn(out, width, generator=generator), original, compressed, statistics)


def normal_equations(d: Data, inputs: Tensor, spec: NarrowSpec) -> Tensor:
    """V minimising |W x' - V x~_S|^2 + ridge |V - W_S|^2 with x' = x~ + a (x - x~), in float64 from the data."""
    w, x, y = d.weight.double(), d.original.double(), d.compressed.double()
    wanted = (y + spec.corrected * (x - y)) @ w.T
    kept = y[:, inputs]
    diagonal = y.square().mean(0)
    mean = diagonal[diagonal > 0].mean()
    ridge = torch.where(diagonal > 0, spec.damp * mean, (1 + spec.damp) * mean)[inputs]
    system = kept.T @ kept / len(y) + torch.diag(ridge)
    right = kept.T @ wanted / len(y) + ridge[:, None] * w[:, inputs].T
    return torch.linalg.solve(system, right).T


@pytest.mark.parametrize("corrected", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("width", "keep", "unit"), [(37, 25, 1), (37, 1, 1), (37, 36, 1), (36, 2, 12), (35, 3, 7)])
def test_the_repair_solves_the_normal_equations(corrected: float, width: int, keep: int, unit: int) -> None:
    d, spec = data(width=width), NarrowSpec(keep, unit, corrected=corrected)
    found = narrow(d.weight, d.statistics, spec, torch.float32)
    inputs = inputs_of(found.units, unit)
    assert found.weight.shape == (24, keep * unit)
    torch.testing.assert_close(found.weight.double(), normal_equations(d, inputs, spec), rtol=2e-4, atol=2e-4)
    assert found.events == () and found.damping == spec.damp


def test_the_units_that_stay_are_those_whose_absence_costs_most() -> None:
    d = data(width=36)
    for unit in (1, 4, 9):
        damage = []
        for u in range(36 // unit):
            part = slice(u * unit, (u + 1) * unit)
            through = d.compressed[:, part].double() @ d.weight[:, part].double().T
            damage.append(float(through.square().sum(1).mean()))
        scores = importance(d.weight, d.statistics.hessian, unit)
        torch.testing.assert_close(scores.double(), torch.tensor(damage).double(), rtol=1e-4, atol=0)
        keep = 36 // unit - 2
        found = narrow(d.weight, d.statistics, NarrowSpec(keep, unit), torch.float32)
        assert found.units.tolist() == sorted(sorted(range(36 // unit), key=lambda u: -damage[u])[:keep])


def test_magnitude_knows_nothing_of_the_data() -> None:
    d = data()
    found = narrow(d.weight, d.statistics, NarrowSpec(20, importance="magnitude", repair=False), torch.float32)
    norms = d.weight.double().norm(dim=0)
    assert found.units.tolist() == sorted(norms.argsort(descending=True)[:20].tolist())
    assert torch.equal(found.weight, d.weight[:, found.units])


def test_of_equal_scores_the_earlier_stay() -> None:
    assert largest(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3).tolist() == [0, 1, 2]


def test_the_error_is_the_outputs_and_the_repair_makes_it_smaller() -> None:
    d = data()
    errors = {}
    for repair in (False, True):
        spec = NarrowSpec(25, repair=repair, corrected=0.0)
        found = narrow(d.weight, d.statistics, spec, torch.float32)
        before = d.compressed.double() @ d.weight.double().T
        after = d.compressed[:, found.units].double() @ found.weight.double().T
        errors[repair] = float((before - after).square().sum() / before.square().sum())
        assert found.error == pytest.approx(errors[repair], rel=1e-3)
    assert errors[True] < 0.7 * errors[False]


def test_the_corrected_target_comes_nearer_to_the_original() -> None:
    d = data()
    wanted = d.original.double() @ d.weight.double().T
    lost = {}
    for corrected in (0.0, 1.0):
        found = narrow(d.weight, d.statistics, NarrowSpec(30, corrected=corrected), torch.float32)
        lost[corrected] = float(
            (wanted - d.compressed[:, found.units].double() @ found.weight.double().T).square().sum()
        )
    assert lost[1.0] < 0.97 * lost[0.0]


def test_an_input_that_is_never_active_goes_first_and_keeps_its_weights_if_it_stays() -> None:
    d = data(dead=(3, 11, 30))
    found = narrow(d.weight, d.statistics, NarrowSpec(34), torch.float32)
    assert not {3, 11, 30} & set(found.units.tolist())
    found = narrow(d.weight, d.statistics, NarrowSpec(36), torch.float32)
    kept = found.units.tolist()
    assert {3, 11} <= set(kept) and 30 not in kept
    torch.testing.assert_close(found.weight[:, kept.index(11)], d.weight[:, 11], rtol=1e-5, atol=1e-5)


def test_the_result_is_measured_as_it_is_stored() -> None:
    d = data()
    exact = narrow(d.weight, d.statistics, NarrowSpec(25), torch.float32)
    stored = narrow(d.weight, d.statistics, NarrowSpec(25), torch.bfloat16)
    assert stored.weight.dtype == torch.bfloat16
    assert torch.equal(stored.weight, exact.weight.bfloat16())
    assert stored.error != exact.error


def test_too_few_tokens_are_solved_with_what_damping_it_takes() -> None:
    d = data(width=200, tokens=5)
    found = narrow(d.weight, d.statistics, NarrowSpec(150, damp=1e-9), torch.float32)
    assert torch.isfinite(found.weight).all()
    assert found.events and "float64" in found.events[0]


def test_nan_is_refused() -> None:
    d = data()
    with pytest.raises(SolveError, match="the weight holds NaN"):
        narrow(d.weight * torch.nan, d.statistics, NarrowSpec(25), torch.float32)
    bad = Statistics(37, cross=True)
    bad.add(d.compressed, d.original * torch.nan)
    with pytest.raises(SolveError, match="the cross term holds NaN"):
        narrow(d.weight, bad, NarrowSpec(25), torch.float32)
    assert narrow(d.weight, bad, replace(NarrowSpec(25), corrected=0.0), torch.float32).error < 1
