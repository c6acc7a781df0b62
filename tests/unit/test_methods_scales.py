"""Scales by closed form, round to nearest, the factor, and the registry."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch

from llmshrink.methods import QuantizeSpec, SolveError, names, registry, site_solver, solver
from llmshrink.methods.factor import factorise, invert_lower_
from llmshrink.methods.scales import fit, fractions, minmax, stored
from llmshrink.weights import GroupedInt, code_range

SPEC = QuantizeSpec(method="rtn", bits=4, group_size=16, scale_search="mse")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_stored_scale_is_never_too_small_and_reads_back_the_same(dtype: torch.dtype) -> None:
    scale = torch.tensor([0.0, 1e-9, -1e-9, 1e-5, -1e-5, 0.3, -0.3])
    result = stored(scale, dtype)
    assert float(result.abs().min()) >= 1e-5
    assert torch.equal(result.to(dtype).float(), result)
    assert torch.equal(result < 0, scale < 0)


def naive_loss(column: torch.Tensor, scale: float, zero: float, weights: torch.Tensor, bits: int) -> float:
    total = 0.0
    for value, importance in zip(column.tolist(), weights.tolist(), strict=True):
        total += importance * (oracle.quantize(value, scale, zero, bits)[1] - value) ** 2
    return total


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_the_grid_is_searched_to_its_best(bits: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight, importance = torch.randn(16, 6, generator=generator), torch.rand(16, generator=generator)
    spec = replace(SPEC, bits=bits, signed=signed)
    grid = fit(weight, importance, spec, torch.float32)
    low, high = code_range(bits)
    for row in range(6):
        widest = float(weight[:, row].abs().max()) / ((high - low) / 2)
        losses = [
            naive_loss(weight[:, row].double(), sign * fraction * widest, 0, importance, bits)
            for fraction in fractions(bits)
            for sign in ((1, -1) if signed else (1,))
        ]
        found = naive_loss(weight[:, row].double(), float(grid.scale[row]), 0, importance, bits)
        assert found == pytest.approx(min(losses), rel=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_minmax_holds_the_whole_group(symmetric: bool) -> None:
    weight = torch.randn(3, 16, 20, generator=torch.Generator().manual_seed(0))
    spec = replace(SPEC, symmetric=symmetric)
    grid = minmax(weight, spec, torch.float32)
    zero = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
    low, high = code_range(4)
    ends = torch.stack([(low - zero) * grid.scale, (high - zero) * grid.scale])
    slack = grid.scale.abs() * (0.501 if not symmetric else 1.0)
    assert bool((ends.amin(0) - slack <= weight.amin(1)).all())
    assert bool((ends.amax(0) + slack >= weight.amax(1)).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_search_is_never_worse_than_minmax(symmetric: bool) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4, 8):
        spec = replace(SPEC, bits=bits, symmetric=symmetric)
        searched = solver("rtn").solve(weight, None, spec, torch.float32)
        plain = solver("rtn").solve(weight, None, replace(spec, scale_search="minmax"), torch.float32)
        assert searched.error <= plain.error


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["minmax", "mse", "hessian", "trial"])
def test_round_to_nearest_takes_the_nearest_code(search: str, symmetric: bool) -> None:
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    solved = solver("rtn").solve(weight, None, replace(SPEC, scale_search=search, symmetric=symmetric), torch.bfloat16)
    for o in range(5):
        for i in range(48):
            scale = float(solved.weight.scale[o, i // 16])
            zero = 0 if solved.weight.zero_point is None else int(solved.weight.zero_point[o, i // 16])
            nearest = oracle.quantize(float(weight[o, i]), scale, zero, 4)[0]
            assert abs(int(solved.weight.codes[o, i]) - nearest) <= (1 if is_tie(float(weight[o, i]) / scale) else 0)


def is_tie(value: float) -> bool:
    return abs(abs(value - int(value)) - 0.5) < 1e-4


def test_round_to_nearest_refuses_nan_and_a_group_that_does_not_divide() -> None:
    with pytest.raises(SolveError, match="NaN"):
        solver("rtn").solve(torch.full((2, 16), float("nan")), None, SPEC, torch.bfloat16)
    with pytest.raises(SolveError, match="group_size 16 doesn't divide 24 inputs"):
        solver("rtn").solve(torch.randn(2, 24), None, SPEC, torch.bfloat16)


def test_large_finite_weights_are_no_infinity() -> None:
    weight = torch.full((40, 16), 3e38)
    assert solver("rtn").solve(weight, None, replace(SPEC, scale_search="minmax"), torch.float32).weight.codes.any()


@pytest.mark.parametrize("width", [1, 5, 128, 129, 300])
def test_the_factor_is_the_textbook_chain(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    inputs = torch.randn(2 * width, width, generator=generator)
    hessian = inputs.T @ inputs / (2 * width)
    order = torch.randperm(width, generator=generator)
    factor = factorise(hessian, order, 0.01)
    expected = oracle.inverse_factor(oracle.damped(hessian, 0.01)[order][:, order])
    found = factor.unit.double() * factor.importance.double().rsqrt().unsqueeze(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert factor.events == ()


def test_triangular_inverse() -> None:
    lower = torch.randn(301, 301, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril() / 20
    lower.diagonal().add_(1)
    inverse = lower.clone()
    invert_lower_(inverse)
    torch.testing.assert_close(inverse @ lower, torch.eye(301, dtype=torch.float64))
    assert torch.equal(inverse, inverse.tril())


def test_a_method_is_one_function_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    assert {"gptq", "rtn"} <= set(names())
    assert solver("gptq").reads == {"hessian", "cross"}
    assert not solver("rtn").reads
    site_solver("toy", reads=frozenset())(solver("rtn").solve)
    solved = solver("toy").solve(torch.randn(2, 16), None, SPEC, torch.float32)
    assert isinstance(solved.weight, GroupedInt)
    with pytest.raises(AssertionError, match="toy"):
        site_solver("toy", reads=frozenset())(solver("rtn").solve)
