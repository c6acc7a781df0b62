"""Pruners against naive loops in float64, and what they do where data is degenerate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from torch import Tensor

from llmshrink.calibration.statistics import Statistics
from llmshrink.methods import SolveError
from llmshrink.methods.factor import damped, factorise
from llmshrink.methods.pruning import Pattern, Pruned, PruneSpec, allocate, alps, names, prune
from llmshrink.methods.pruning import repair as repairing
from llmshrink.methods.pruning.contract import Problem
from llmshrink.methods.pruning.pattern import largest_of_blocks, largest_share
from llmshrink.methods.pruning.repair import TOLERANCE, least_squares

SPEC = PruneSpec(corrected=0.0, damp=0.01)
PATTERNS = [Pattern.n_of_m(2, 4), Pattern.n_of_m(4, 8), Pattern.n_of_m(1, 3), Pattern.unstructured(0.6)]


def site(rows: int, width: int, *, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Statistics]:
    """A weight, and inputs that are correlated, of very different loudness, and drifted from the original's."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * (0.2 + torch.rand(width, generator=generator) * 2)
    original = torch.randn(tokens, width, generator=generator) @ mix / width**0.5
    compressed = original + 0.1 * torch.randn(tokens, width, generator=generator)
    statistics = Statistics(width, cross=True)
    statistics.add(compressed, original)
    return torch.randn(rows, width, generator=generator), statistics


def kept_by(scores: Tensor, pattern: Pattern) -> Tensor:
    """The pattern's choice for one row, by sorting its blocks (a share is taken of all that is given)."""
    size = pattern.block or scores.numel()
    keep = pattern.keep or size - round(pattern.ratio * size)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    for start in range(0, scores.numel(), size):
        block = scores.flatten()[start : start + size].tolist()
        best = sorted(range(size), key=lambda i: (-block[i], i))[:keep]
        mask[[start + i for i in best]] = True
    return mask.view_as(scores)


def lost(found: Pruned, weight: Tensor, statistics: Statistics) -> float:
    return oracle.output_error(weight, found.weight, statistics.hessian)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "wanda", "alps"])
@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_pattern_is_exact_and_the_weight_stays_as_it_was(pattern: Pattern, repair: bool, method: str) -> None:
    weight, statistics = site(20, 48)
    before = weight.clone()
    found = prune(weight, statistics, replace(SPEC, method=method, pattern=pattern, repair=repair))
    assert torch.equal(weight, before)
    assert bool((found.weight[~found.mask] == 0).all())
    if pattern.block:
        assert bool((found.mask.view(20, -1, pattern.block).sum(-1) == pattern.keep).all())
    else:
        assert found.mask.sum().item() == pytest.approx(0.4 * 20 * 48, abs=20)
    assert 0 < lost(found, weight, statistics) < 1


def test_all_methods_are_known() -> None:
    assert names() == ("alps", "magnitude", "sparsegpt", "wanda")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_magnitude_and_wanda_sort_scores(pattern: Pattern) -> None:
    weight, statistics = site(9, 24)
    hessian = oracle.damped(statistics.hessian, SPEC.damp)
    plain = prune(weight, statistics, replace(SPEC, method="magnitude", pattern=pattern, repair=False))
    rows = weight.abs() if pattern.block else weight.abs().view(1, -1)
    expected = torch.stack([kept_by(row, pattern) for row in rows]).view_as(weight)
    assert torch.equal(plain.mask, expected) and torch.equal(plain.weight, weight * expected)
    loud = prune(weight, statistics, replace(SPEC, method="wanda", pattern=pattern, repair=False))
    scores = weight.double().abs() * hessian.diagonal().sqrt()
    assert torch.equal(loud.mask, torch.stack([kept_by(row, pattern) for row in scores]))


@pytest.mark.parametrize("pattern", PATTERNS[:3], ids=str)
@pytest.mark.parametrize("corrected", [0.0, 1.0])
def test_sparsegpt_is_the_naive_loop(corrected: float, pattern: Pattern) -> None:
    # 240 inputs: the second block of 128 columns is not whole, and blocks of 3 do not fill the first.
    weight, statistics = site(6, 240, tokens=700)
    spec = replace(SPEC, method="sparsegpt", pattern=pattern, corrected=corrected, repair=False)
    found = prune(weight, statistics, spec)
    hessian = oracle.damped(statistics.hessian, spec.damp)
    factor = oracle.inverse_factor(hessian)
    loud = torch.linalg.inv(oracle.damped(statistics.hessian, spec.corrected_damp))
    left = weight.double() + corrected * weight.double() @ statistics.cross.double() @ loud  # type: ignore[union-attr]
    mask = torch.zeros_like(left, dtype=torch.bool)
    for row, kept in zip(left, mask, strict=True):
        for start in range(0, 240, pattern.block):
            part = slice(start, start + pattern.block)
            kept[part] = kept_by(row[part].square() / factor.diagonal()[part].square(), pattern)
            for i in range(start, start + pattern.block):
                if not kept[i]:
                    row[i:] -= row[i].clone() / factor[i, i] * factor[i, i:]
    assert (mask == found.mask).double().mean() > 0.995
    same = (mask == found.mask).all(1)
    assert same.sum() >= 3
    assert torch.allclose(found.weight[same].double(), (left * mask)[same], atol=1e-4)


def test_an_unstructured_sweep_chooses_in_blocks_over_all_rows() -> None:
    weight, statistics = site(16, 256, tokens=700)
    found = prune(weight, statistics, replace(SPEC, method="sparsegpt", pattern=Pattern.unstructured(0.5)))
    for start in (0, 128):
        assert found.mask[:, start : start + 128].sum() == 16 * 64


def problem_of(statistics: Statistics, damp: float) -> Problem:
    factor = factorise(statistics.hessian, torch.arange(len(statistics.hessian)), damp)
    return Problem(damped(statistics.hessian, factor.damping), factor)


def off(found: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """(v - w) H (v - w)^T of each row, in float64."""
    moved = found.double() - weight.double()
    return ((moved @ hessian.double()) * moved).sum(1)


def some_masks(rows: int, width: int) -> Tensor:
    """Of all densities, one that keeps nothing and one that keeps everything."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(rows, width, generator=generator) < torch.rand(rows, 1, generator=generator)
    mask[3], mask[5] = False, True
    return mask


@pytest.mark.parametrize("width", [3, 48, 200, 320])
@pytest.mark.parametrize("damp", [0.001, 0.05])
def test_the_repair_is_the_least_squares_solution(damp: float, width: int) -> None:
    weight, statistics = site(11, width, tokens=3 * width)
    problem = problem_of(statistics, damp)
    mask = some_masks(11, width)
    best = oracle.least_squares(weight, mask, problem.hessian)
    least = off(best, weight, problem.hessian)
    exact, events = least_squares(weight, mask, problem, tolerance=1e-9)
    assert not events and not exact[~mask].any()
    rounding = 1e-5 * off(weight * mask, weight, problem.hessian)
    assert bool((off(exact, weight, problem.hessian) <= least * (1 + 1e-4) + rounding).all())
    found, events = least_squares(weight, mask, problem)
    assert not events and not found[~mask].any() and not found[3].any()
    error = off(found, weight, problem.hessian)
    # The tolerance is of an estimate; here, as on real sites, what is left is never more than a few times that.
    assert float(error.sum()) <= float(least.sum()) * (1 + 2 * TOLERANCE)
    assert bool((error <= least * (1 + 10 * TOLERANCE) + rounding).all())


def test_the_repair_of_one_row_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = site(40, 128)
    problem, mask = problem_of(statistics, 0.01), some_masks(40, 128)
    whole, _ = least_squares(weight, mask, problem)
    monkeypatch.setattr(repairing, "PIECE", 7 * 128)
    pieces, _ = least_squares(weight, mask, problem)
    least = off(oracle.least_squares(weight, mask, problem.hessian), weight, problem.hessian)
    for found in (whole, pieces):
        assert float(off(found, weight, problem.hessian).sum()) <= float(least.sum()) * (1 + 2 * TOLERANCE)


def test_a_better_start_is_kept_and_a_row_that_is_not_done_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = site(16, 256, tokens=300)
    problem = problem_of(statistics, 1e-5)
    mask = largest_of_blocks(weight.abs(), 2, 4)
    best = oracle.least_squares(weight, mask, problem.hessian)
    found, events = least_squares(weight, mask, problem, best.float())
    assert not events
    assert float((found.double() - best).abs().max()) < 1e-3
    monkeypatch.setattr(repairing, "MOST", 3)
    started = weight * mask
    short, events = least_squares(weight, mask, problem, started)
    assert events == ("repair: 16 of 16 rows not within 0.5% of their least error after 3 steps",)
    before, after = (off(each, weight, problem.hessian) for each in (started, short))
    assert bool((after < before).all())
    told = prune(weight, statistics, replace(SPEC, method="magnitude", damp=1e-5))
    assert told.events == events


def test_what_typical_is() -> None:
    _, statistics = site(4, 96)
    problem = problem_of(statistics, 0.01)
    loud = problem.hessian.double().diagonal().sqrt()
    values = torch.linalg.eigvalsh(problem.hessian.double() / loud / loud.unsqueeze(1))
    assert problem.typical == pytest.approx(float(values.log().mean().exp()), rel=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_alps_is_admm_in_float64(pattern: Pattern) -> None:
    weight, statistics = site(12, 48)
    spec = replace(SPEC, pattern=pattern)
    found = prune(weight, statistics, replace(spec, repair=False))
    hessian = oracle.damped(statistics.hessian, SPEC.damp)
    loud = hessian.diagonal().sqrt()
    unit = hessian / loud / loud.unsqueeze(1)
    typical = float(torch.linalg.eigvalsh(unit).log().mean().exp())
    goal = weight.double() * loud

    def chosen(scores: Tensor) -> Tensor:
        return torch.stack([kept_by(row, pattern) for row in scores]) if pattern.block else kept_by(scores, pattern)

    mask = chosen(goal.abs())
    dense, multiplier = goal * mask, torch.zeros_like(goal)
    for penalty in alps.penalties(48, typical):
        inverse = torch.linalg.inv(unit + penalty * torch.eye(48, dtype=torch.float64))
        for _ in range(alps.EACH):
            free = (goal @ unit - multiplier + penalty * dense) @ inverse
            mask = chosen((free + multiplier / penalty).abs())
            dense = (free + multiplier / penalty) * mask
            multiplier += penalty * (free - dense)
    assert (mask == found.mask).double().mean() > 0.97
    naive = oracle.least_squares(weight, mask, hessian)
    repaired = prune(weight, statistics, spec)
    assert lost(repaired, weight, statistics) == pytest.approx(
        oracle.output_error(weight, naive, statistics.hessian), rel=0.02
    )


def test_alps_goes_from_where_the_pattern_pulls_at_a_rate_that_layers_can_afford() -> None:
    for typical in (1.0, 0.7, 0.3, 0.1):
        narrow, wide = (alps.penalties(inputs, typical) for inputs in (alps.NARROW, alps.WIDE))
        assert [narrow[0], wide[0]] == pytest.approx([first * typical**2 for first, _ in (alps.SLOW, alps.FAST)])
        assert narrow[-1] == wide[-1] == pytest.approx(alps.LAST)
        assert 2 <= len(wide) < len(narrow) <= alps.MOST // alps.EACH
        between = alps.penalties((alps.NARROW + alps.WIDE) // 2, typical)
        assert len(wide) <= len(between) <= len(narrow) and alps.penalties(8 * alps.WIDE, typical) == wide
        grows = (narrow[1] / narrow[0]) ** (1 / alps.EACH)
        assert grows == pytest.approx(alps.SLOW[1], rel=0.01) or len(narrow) == alps.MOST // alps.EACH
    assert alps.penalties(100, 1e-9)[0] == alps.LEAST and len(alps.penalties(100, 1e-9)) == alps.MOST // alps.EACH


def test_alps_of_inputs_that_are_nearly_all_dependent() -> None:
    """40 tokens of 128 inputs, hardly any damping: its own factorisations hold, and half of the weights say it all."""
    weight, statistics = site(16, 128, tokens=40)
    found = prune(weight, statistics, replace(SPEC, damp=1e-6))
    assert bool(found.weight.isfinite().all()) and bool((found.mask.view(16, 32, 4).sum(2) == 2).all())
    assert abs(lost(found, weight, statistics)) < 1e-6


def test_what_each_step_is_worth() -> None:
    """On average over sites: repair helps; the sweep beats scores; ADMM's mask is the best one."""
    errors: dict[tuple[str, bool], float] = {}
    for seed in range(6):
        weight, statistics = site(32, 64, seed=seed)
        for method in names():
            for repair in (False, True):
                found = prune(weight, statistics, replace(SPEC, method=method, repair=repair))
                errors[method, repair] = errors.get((method, repair), 0.0) + lost(found, weight, statistics)
    for method in ("magnitude", "sparsegpt", "wanda"):
        assert errors[method, True] < errors[method, False]
    # Where ADMM settles, nothing is left to repair.
    assert errors["alps", True] <= errors["alps", False]
    assert errors["sparsegpt", False] < min(errors["wanda", False], errors["magnitude", False])
    assert errors["alps", True] < errors["sparsegpt", True] < errors["magnitude", True]


def test_the_corrected_target_comes_nearer_to_the_original_output() -> None:
    weight, statistics = site(24, 64)
    assert statistics.cross is not None
    hessian, cross = statistics.hessian.double(), statistics.cross.double()

    def distance(found: Pruned) -> float:
        # ||W X - V X~||^2 but for what no V can change: with d = V - W, d H d' - 2 d D' W'.
        moved = found.weight.double() - weight.double()
        return float(((moved @ hessian) * moved).sum() - 2 * ((weight.double() @ cross) * moved).sum())

    plain, corrected = (prune(weight, statistics, replace(SPEC, corrected=share)) for share in (0.0, 1.0))
    assert distance(corrected) < distance(plain)


@pytest.mark.parametrize(("keep", "block"), [(2, 4), (1, 4), (4, 8), (3, 8), (1, 3), (5, 16)])
def test_the_largest_of_blocks_are_those_that_sorting_finds(keep: int, block: int) -> None:
    scores = torch.randint(0, 7, (30, 5 * block), generator=torch.Generator().manual_seed(4)).float()
    expected = torch.stack([kept_by(row, Pattern.n_of_m(keep, block)) for row in scores])
    assert torch.equal(largest_of_blocks(scores, keep, block), expected)


def test_ties_go_to_the_earlier_input() -> None:
    assert largest_of_blocks(torch.ones(1, 8), 2, 4).tolist() == [[True, True, False, False] * 2]
    assert largest_share(torch.ones(1, 4), 0.5).tolist() == [[False, False, True, True]]


def test_a_pattern_that_does_not_fit_is_refused() -> None:
    weight, statistics = site(4, 30)
    with pytest.raises(SolveError, match="2:4 needs a multiple of 4 inputs, and there are 30"):
        prune(weight, statistics, SPEC)


def test_without_data_or_with_nan_it_is_refused() -> None:
    weight, statistics = site(4, 32)
    with pytest.raises(SolveError, match="alps needs calibration data"):
        prune(weight, None, SPEC)
    weight[1, 2] = torch.nan
    with pytest.raises(SolveError, match="the weight holds NaN"):
        prune(weight, statistics, SPEC)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "wanda", "alps"])
def test_a_dead_input_keeps_what_the_pattern_leaves_it(method: str) -> None:
    weight, _ = site(8, 32)
    dead = Statistics(32)
    inputs = torch.randn(200, 32, generator=torch.Generator().manual_seed(3))
    inputs[:, 5] = 0
    dead.add(inputs)
    found = prune(weight, dead, replace(SPEC, method=method))
    assert any("never active" in event for event in found.events)
    kept = found.mask[:, 5]
    assert torch.allclose(found.weight[kept, 5], weight[kept, 5], atol=1e-5)
    assert bool(torch.isfinite(found.weight).all())


def test_an_all_zero_weight_stays_zero() -> None:
    _, statistics = site(4, 32)
    found = prune(torch.zeros(4, 32), statistics, SPEC)
    assert not found.weight.any() and not found.events


def test_ratios_meet_the_share_and_no_exchange_of_steps_is_better() -> None:
    generator = torch.Generator().manual_seed(2)
    rates = {f"w{i}": (float(a), float(r)) for i, (a, r) in enumerate(torch.rand(9, 2, generator=generator))}
    sizes = {name: 1000 * (1 + i % 3) for i, name in enumerate(rates)}
    ratios = [0.35, 0.5, 0.65]

    def cost(name: str, ratio: float) -> float:
        scale, rate = rates[name]
        return (0.1 + scale) * 2.718281828 ** ((4 + 8 * rate) * ratio)

    found = allocate({n: [cost(n, r) for r in ratios] for n in rates}, ratios, sizes, 0.5)
    assert list(found) == list(rates)
    assert all(0.35 <= ratio <= 0.65 for ratio in found.values())
    assert sum(found[n] * sizes[n] for n in found) == pytest.approx(0.5 * sum(sizes.values()), rel=1e-9)
    assert len({round(ratio, 3) for ratio in found.values()}) > 3
    total = sum(cost(n, found[n]) for n in found)
    for more in found:
        for less in found:
            moved = dict(found)
            moved[more] += 10 / sizes[more]
            moved[less] -= 10 / sizes[less]
            if more != less and moved[more] <= 0.65 and moved[less] >= 0.35:
                # A step of .005 is the grain of the answer.
                assert sum(cost(n, moved[n]) for n in found) > total * (1 - 1e-3)


def test_equal_costs_have_equal_ratios_and_costs_of_nothing_are_no_fault() -> None:
    same = allocate({"a": [1.0, 2.0], "b": [1.0, 2.0]}, [0.4, 0.6], {"a": 512, "b": 512}, 0.5)
    assert same == pytest.approx({"a": 0.5, "b": 0.5}, abs=1e-9)
    free = allocate({"a": [0.0, 0.0], "b": [1.0, 2.0]}, [0.4, 0.6], {"a": 512, "b": 512}, 0.5)
    assert free == pytest.approx({"a": 0.6, "b": 0.4}, abs=1e-9)


def test_the_order_of_the_methods_on_held_out_text(wiki7m: Path, calibration_text: Path, wikitext2_test: Path) -> None:
    """On sites of a real model, by the error of their outputs on other text than the one they were pruned on."""
    from safetensors.torch import load_file

    weights = load_file(wiki7m / "model.safetensors")
    taps = [f"model.layers.{block}.{name}" for block in (1, 4) for name in ("self_attn.q_proj", "self_attn.o_proj")]
    seen, held = (inputs_of(wiki7m, text, taps) for text in (calibration_text, wikitext2_test))
    errors: dict[tuple[str, bool], float] = {}
    for tap in taps:
        weight = weights[f"{tap}.weight"].float()
        for method in names():
            for repair in (False, True):
                found = prune(weight, seen[tap], replace(SPEC, method=method, repair=repair, damp=0.001))
                lost = oracle.output_error(weight, found.weight, held[tap].hessian)
                errors[method, repair] = errors.get((method, repair), 0.0) + lost
    assert errors["sparsegpt", False] < min(errors["wanda", False], errors["magnitude", False])
    assert errors["alps", True] <= errors["sparsegpt", True] < errors["sparsegpt", False]


def inputs_of(model: Path, text: Path, taps: list[str]) -> dict[str, Statistics]:
    """Of the original model's linears, on 64 windows of 256 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmshrink.calibration.text import load_documents
    from llmshrink.calibration.tokens import build_windows

    tokenizer = AutoTokenizer.from_pretrained(model)
    windows, _ = build_windows(load_documents(str(text)), tokenizer, samples=64, seq_len=256, held_out=1, seed=0)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = {tap: Statistics(loaded.get_submodule(tap).in_features) for tap in taps}
    for tap in taps:
        loaded.get_submodule(tap).register_forward_pre_hook(
            lambda _, given, tap=tap: found[tap].add(given[0].flatten(0, 1))
        )
    with torch.no_grad():
        for batch in windows.input_ids.split(8):
            loaded.model(batch, use_cache=False)
    return found
