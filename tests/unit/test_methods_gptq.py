"""GPTQ against the naive loop in float64, and what it does where data is degenerate."""

from __future__ import annotations

from dataclasses import dataclass, replace

import oracle
import pytest
import torch
from torch import Tensor

from llmshrink.calibration.statistics import Statistics
from llmshrink.methods import QuantizeSpec, Solved, SolveError, solver
from llmshrink.methods.scales import Grid, fit
from llmshrink.methods.trial import candidates

SPEC = QuantizeSpec(bits=4, group_size=16, block_size=32)
SEARCHES = ["minmax", "mse", "hessian", "trial"]


def site(rows: int, width: int, *, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Statistics]:
    """A weight, and inputs that are correlated, of very different loudness, and drifted from the original's."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * (0.2 + torch.rand(width, generator=generator) * 2)
    original = torch.randn(tokens, width, generator=generator) @ mix / width**0.5
    compressed = original + 0.1 * torch.randn(tokens, width, generator=generator)
    statistics = Statistics(width, cross=True)
    statistics.add(compressed, original)
    return torch.randn(rows, width, generator=generator), statistics


def gptq(weight: Tensor, statistics: Statistics, spec: QuantizeSpec, dtype: torch.dtype = torch.bfloat16) -> Solved:
    return solver("gptq").solve(weight, statistics, spec, dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("search", ["minmax", "mse", "hessian"])
def test_the_blocked_sweep_is_the_naive_loop(search: str, act_order: bool, symmetric: bool) -> None:
    weight, statistics = site(24, 80)
    spec = replace(SPEC, scale_search=search, act_order=act_order, symmetric=symmetric)
    solved = gptq(weight, statistics, spec)
    target = oracle.target(weight, statistics, spec)
    columns = oracle.order(statistics, 16, spec)
    hessian = oracle.damped(statistics.hessian, spec.damp)[columns][:, columns]
    factor = oracle.inverse_factor(hessian)
    scale = solved.weight.scale.double()
    zero = torch.zeros_like(scale) if solved.weight.zero_point is None else solved.weight.zero_point.double()
    codes = torch.stack([oracle.sweep(target[o], factor, columns, scale[o], zero[o], 16, 4) for o in range(24)])
    assert same_rows(codes, solved.weight.codes) >= 0.9
    naive = replace(solved.weight, codes=codes).dequantize(torch.float64)
    assert solved.error == pytest.approx(oracle.output_error(weight, naive, statistics.hessian), rel=0.01)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_the_trial_sweep_is_the_naive_loop(act_order: bool, symmetric: bool, bits: int) -> None:
    weight, statistics = site(12, 48)
    spec = replace(SPEC, scale_search="trial", act_order=act_order, symmetric=symmetric, bits=bits)
    solved = gptq(weight, statistics, spec)
    target = oracle.target(weight, statistics, spec)
    columns = oracle.order(statistics, 16, spec)
    factor = oracle.inverse_factor(oracle.damped(statistics.hessian, spec.damp)[columns][:, columns])

    def candidates_of(left: Tensor) -> Grid:
        column = left.float().unsqueeze(1)
        grid = candidates(fit(column, None, spec, torch.bfloat16), spec, torch.bfloat16)
        return Grid(grid.scale[:, 0], None if grid.zero is None else grid.zero[:, 0])

    naive = [oracle.trial(target[o], factor, columns, candidates_of, 16, bits) for o in range(12)]
    codes, scale = torch.stack([codes for codes, _, _ in naive]), torch.stack([scale for _, scale, _ in naive])
    zero = None if symmetric else torch.stack([zero for _, _, zero in naive]).to(torch.int8)
    quantized = replace(solved.weight, codes=codes, scale=scale, zero_point=zero).dequantize(torch.float64)
    # Where no code is clipped, a scale and its negative are the same weight: weights are compared, not signs.
    assert same_rows(quantized, solved.weight.dequantize(torch.float64)) >= 0.75
    assert solved.error == pytest.approx(oracle.output_error(weight, quantized, statistics.hessian), rel=0.03)


def same_rows(a: Tensor, b: Tensor) -> float:
    """The share of rows that are equal: one tie that falls the other way changes all that follows in its row."""
    return float((a == b).all(1).double().mean())


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_reported_error_is_the_error_of_what_is_returned(search: str, symmetric: bool) -> None:
    weight, statistics = site(10, 32)
    solved = gptq(weight, statistics, replace(SPEC, scale_search=search, symmetric=symmetric))
    true = oracle.output_error(weight, solved.weight.dequantize(torch.float64), statistics.hessian)
    assert solved.error == pytest.approx(true, rel=1e-3)
    assert float(solved.row_error.sum() / solved.row_energy.sum()) == pytest.approx(solved.error, rel=1e-5)


def test_the_corrected_target_comes_nearer_to_the_original_output() -> None:
    weight, _ = site(64, 48)
    generator = torch.Generator().manual_seed(1)
    original = torch.randn(2000, 48, generator=generator)
    compressed = original @ (torch.eye(48) + 0.1 * torch.randn(48, 48, generator=generator))
    statistics = Statistics(48, cross=True)
    statistics.add(compressed, original)

    def lost(corrected: float) -> float:
        quantized = gptq(weight, statistics, replace(SPEC, corrected=corrected)).weight.dequantize()
        return float((original @ weight.T - compressed @ quantized.T).norm())

    assert lost(1.0) < lost(0.5) < lost(0.0)


@pytest.mark.parametrize("search", SEARCHES)
def test_one_group_a_row_and_groups_longer_than_a_block(search: str) -> None:
    weight, statistics = site(6, 80)
    for size in (-1, 80, 40):
        solved = gptq(weight, statistics, replace(SPEC, scale_search=search, group_size=size, block_size=16))
        assert solved.weight.group_size == (80 if size == -1 else size)
        assert solved.weight.scale.shape == (6, 80 // solved.weight.group_size)
        assert solved.error < 0.05


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(("rows", "width", "size"), [(1, 1, 1), (1, 35, 7), (3, 35, 35), (2, 17, 17)])
def test_odd_shapes(rows: int, width: int, size: int, search: str) -> None:
    weight, statistics = site(rows, width)
    for symmetric in (True, False):
        spec = replace(SPEC, group_size=size, scale_search=search, symmetric=symmetric)
        solved = gptq(weight, statistics, spec)
        assert solved.weight.shape == (rows, width)
        assert torch.isfinite(solved.weight.dequantize()).all()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros(search: str, symmetric: bool) -> None:
    weight, statistics = site(4, 32)
    weight[1] = 0
    spec = replace(SPEC, scale_search=search, symmetric=symmetric, corrected=1.0)
    assert not gptq(weight, statistics, spec).weight.dequantize()[1].any()
    nothing = gptq(torch.zeros_like(weight), statistics, spec)
    assert nothing.error == 0
    assert not nothing.weight.dequantize().any()
    assert float(nothing.weight.scale.abs().float().min()) >= 1e-5


@pytest.mark.parametrize("search", SEARCHES)
def test_an_input_that_is_never_active_is_rounded_to_nearest_and_said(search: str) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(200, 32, generator=generator)
    inputs[:, [4, 20]] = 0
    statistics = Statistics(32)
    statistics.add(inputs)
    weight = torch.randn(8, 32, generator=generator)
    solved = gptq(weight, statistics, replace(SPEC, scale_search=search))
    assert solved.events == ("2 of 32 inputs are never active: rounded to nearest",)
    scale = solved.weight.scale.float().repeat_interleave(16, 1)[:, [4, 20]]
    nearest = torch.where(
        scale.abs() > 0, (weight[:, [4, 20]] / scale).round().clamp(-8, 7) * scale, torch.zeros_like(scale)
    )
    assert torch.equal(solved.weight.dequantize()[:, [4, 20]], nearest)


def test_no_active_input_at_all_is_rounding_to_nearest() -> None:
    statistics = Statistics(32)
    statistics.add(torch.zeros(5, 32))
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    spec = replace(SPEC, scale_search="mse")
    plain = solver("rtn").solve(weight, None, spec, torch.bfloat16)
    assert torch.equal(gptq(weight, statistics, spec).weight.codes, plain.weight.codes)


def test_a_singular_hessian_is_damped_more_and_said() -> None:
    statistics = Statistics(32)
    statistics.add(torch.ones(3, 32))
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    solved = gptq(weight, statistics, replace(SPEC, damp=0.0))
    assert solved.damping == 0.01
    assert solved.events == ("Cholesky failed in float32: done in float64 with damping 0.01",)
    assert gptq(weight, statistics, SPEC).events == ()


@dataclass(frozen=True)
class Given:
    """Statistics that no data could have given."""

    hessian: Tensor
    cross: Tensor | None = None
    drift: Tensor | None = None
    tokens: int = 1


def test_what_float32_can_not_factorise_float64_does() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    hessian = (basis * torch.logspace(0, -9, 64, dtype=torch.float64)) @ basis.T
    given = Given((hessian + hessian.T) / 2)
    solved = solver("gptq").solve(
        torch.randn(4, 64, generator=generator), given, replace(SPEC, damp=0.0), torch.float32
    )
    assert solved.damping == 0
    assert solved.events == ("Cholesky failed in float32: done in float64 with damping 0",)


def test_a_hessian_that_no_damping_helps_is_refused() -> None:
    given = Given(torch.eye(32) - 3 * torch.ones(32, 32).triu(1) - 3 * torch.ones(32, 32).tril(-1))
    with pytest.raises(SolveError, match=r"can't be factorised.*more tokens, or use method rtn"):
        solver("gptq").solve(torch.randn(4, 32), given, SPEC, torch.float32)


@pytest.mark.parametrize("where", ["weight", "hessian", "cross"])
def test_nan_is_refused(where: str) -> None:
    weight, statistics = site(4, 32)
    assert statistics.cross is not None
    {"weight": weight, "hessian": statistics.hessian, "cross": statistics.cross}[where][2, 3] = float("nan")
    with pytest.raises(SolveError, match=f"(?i)the {where}.* holds NaN or infinity"):
        gptq(weight, statistics, SPEC)


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    weight, statistics = site(4, 32)
    with pytest.raises(SolveError, match="group_size 24 doesn't divide 32 inputs"):
        gptq(weight, statistics, replace(SPEC, group_size=24))


def test_no_data_is_refused() -> None:
    with pytest.raises(SolveError, match="needs calibration data"):
        solver("gptq").solve(torch.randn(4, 32), None, SPEC, torch.bfloat16)


@pytest.mark.parametrize("search", SEARCHES)
def test_arguments_are_left_as_they_are(search: str) -> None:
    weight, statistics = site(8, 48)
    assert statistics.cross is not None
    before = weight.clone(), statistics.hessian.clone(), statistics.cross.clone()
    gptq(weight, statistics, replace(SPEC, scale_search=search))
    assert torch.equal(weight, before[0])
    assert torch.equal(statistics.hessian, before[1])
    assert torch.equal(statistics.cross, before[2])


def test_the_weight_of_a_checkpoint_is_taken_as_it_is() -> None:
    weight, statistics = site(8, 32)
    half = weight.bfloat16()
    assert torch.equal(gptq(half, statistics, SPEC).weight.codes, gptq(half.float(), statistics, SPEC).weight.codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_stored_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    weight, statistics = site(8, 32)
    for search in SEARCHES:
        assert gptq(weight, statistics, replace(SPEC, scale_search=search), dtype).weight.scale.dtype == dtype
