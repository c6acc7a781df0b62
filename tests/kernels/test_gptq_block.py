"""GPTQ's inner loop as a kernel: the same codes as the solver's torch, at ties only another; run by the interpreter
where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmshrink_kernels.gptq_block import dispatch, naive, ops, sweep_block, trial_block
from torch import Tensor

from llmshrink.calibration.statistics import Statistics
from llmshrink.methods import QuantizeSpec, Solved, fused, solver

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TIE = 1e-4  # How near to a half a value must lie for its code to be allowed another way, in steps of the grid.


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels run even on the CPU, their outputs full of NaN beforehand. Returns what was launched."""
    launched: list[str] = []

    def spied(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            launched.append(name)
            return launch(*args)

        return run

    def poisoned(weight: Tensor) -> tuple[Tensor, Tensor]:
        codes = torch.full(weight.shape, 99, dtype=torch.int8, device=weight.device)
        return codes, torch.full(weight.shape, torch.nan, device=weight.device)

    monkeypatch.setattr(ops, "runs_triton", lambda device: True)
    monkeypatch.setattr(dispatch, "outputs", poisoned)
    monkeypatch.setattr(dispatch, "launch_sweep", spied("sweep", dispatch.launch_sweep))
    monkeypatch.setattr(dispatch, "launch_trial", spied("trial", dispatch.launch_trial))
    return launched


def block(size: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A block's weight, its piece of the factor (unit diagonal), and the columns' importance."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * size, size, generator=generator) * (0.2 + torch.rand(size, generator=generator))
    hessian = (inputs.T @ inputs / (4 * size)).double() + 0.01 * torch.eye(size)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    diagonal = upper.diagonal()
    weight = torch.randn(size, rows, generator=generator)
    return weight.to(DEVICE), (upper / diagonal.unsqueeze(1)).to(DEVICE), diagonal.pow(-2).to(DEVICE)


def grid(weight: Tensor, count: int, zeros: bool, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """`count` scales for each row, of both signs without zero-points."""
    generator = torch.Generator().manual_seed(seed)
    scale = weight.abs().amax(0) / 7.5 * torch.linspace(0.7, 1.2, count, device=DEVICE).unsqueeze(1)
    if zeros:
        return scale, torch.randint(-3, 4, scale.shape, generator=generator).float().to(DEVICE)
    scale[1::2] *= -1
    return scale, None


def first_differences_are_ties(
    codes: Tensor, other: Tensor, weight: Tensor, unit: Tensor, scale: Tensor, zero: Tensor | None, bits: int
) -> None:
    """Where two solutions part in a row, the value that was rounded lies on a half, by float64. scale: [n, rows]."""
    for row in (codes != other).any(0).nonzero().flatten().tolist():
        at = int((codes[:, row] != other[:, row]).nonzero()[0])
        left = weight[:, row].double().clone()
        offset = torch.zeros_like(left) if zero is None else zero[:, row].double()
        for i in range(at):
            error = left[i] - (codes[i, row].double() - offset[i]) * scale[i, row].double()
            left[i + 1 :] -= unit[i, i + 1 :].double() * error
        value = float(left[at] / scale[at, row])
        assert abs(value - (int(value // 1) + 0.5)) < TIE, (row, at, value)
    assert int((codes != other).sum()) <= 1e-5 * codes.numel()


SHAPES = [(1, 1), (7, 1), (8, 33), (20, 5), (32, 40), (48, 70), (64, 17)]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("size", "rows"), SHAPES)
def test_a_sweep_with_known_scales_is_the_naive_loop(size: int, rows: int, zeros: bool, kernels: list[str]) -> None:
    weight, unit, _ = block(size, rows)
    scale, zero = grid(weight, 3, zeros)
    group = torch.arange(size, device=DEVICE) * 7 % 3
    codes, errors = sweep_block(weight, unit, scale, zero, group, bits=4)
    assert kernels == ["sweep"]
    other, left = naive.sweep_block(weight, unit, scale, zero, group, 4)
    each = scale[group], None if zero is None else zero[group]
    first_differences_are_ties(codes, other, weight, unit, *each, 4)
    torch.testing.assert_close(errors, left, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("size", "rows"), SHAPES)
def test_a_trial_keeps_what_the_naive_loop_keeps(
    size: int, rows: int, zeros: bool, bits: int, kernels: list[str]
) -> None:
    weight, unit, importance = block(size, rows)
    scale, zero = grid(weight, 5, zeros)
    codes, best, best_zero, errors = trial_block(weight, unit, importance, scale, zero, bits=bits)
    assert kernels == ["trial"]
    other, choice, left = naive.trial_block(weight, unit, importance, scale, zero, bits)
    assert torch.equal(best, scale.gather(0, choice.unsqueeze(0))[0])
    assert best_zero is None if zero is None else torch.equal(best_zero, zero.gather(0, choice.unsqueeze(0))[0])
    each = best.expand(size, rows), None if best_zero is None else best_zero.expand(size, rows)
    first_differences_are_ties(codes, other, weight, unit, *each, bits)
    torch.testing.assert_close(errors, left, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 11, 22])
def test_any_number_of_candidates(count: int, kernels: list[str]) -> None:
    weight, unit, importance = block(20, 37)
    scale, _ = grid(weight, count, False)
    codes, best, _, _ = trial_block(weight, unit, importance, scale, None, bits=3)
    other, choice, _ = naive.trial_block(weight, unit, importance, scale, None, 3)
    assert torch.equal(codes, other)
    assert torch.equal(best, scale.gather(0, choice.unsqueeze(0))[0])
    assert len(kernels) == 1


def test_of_equal_candidates_the_first_wins(kernels: list[str]) -> None:
    """A scale and its negative are the same weight as long as no code is clipped: luck must not choose."""
    weight, unit, importance = block(16, 40)
    scale = weight.abs().amax(0) * torch.tensor([[0.5], [-0.5], [0.5]], device=DEVICE)
    _, best, _, _ = trial_block(weight, unit, importance, scale, None, bits=8)
    assert torch.equal(best, scale[0])
    _, best, _, _ = trial_block(weight, unit, importance, -scale, None, bits=8)
    assert torch.equal(best, -scale[0])
    assert len(kernels) == 2


def test_a_program_takes_several_tiles(kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With 22 candidates a tile is 16 rows: 70 rows are five tiles, for two programs."""
    monkeypatch.setattr(dispatch, "SCRATCH", 2 * 4 * 20 * 512)
    assert dispatch.trial_tiles(70, 20, 22, DEVICE).programs == 2
    weight, unit, importance = block(20, 70)
    scale, _ = grid(weight, 22, False)
    codes, _, _, errors = trial_block(weight, unit, importance, scale, None, bits=4)
    other, _, left = naive.trial_block(weight, unit, importance, scale, None, 4)
    assert torch.equal(codes, other)
    torch.testing.assert_close(errors, left, rtol=1e-4, atol=1e-5)
    assert len(kernels) == 1


def test_views_are_read_where_they_are_and_left_as_they_are(kernels: list[str]) -> None:
    weight, unit, importance = block(32, 24)
    scale, _ = grid(weight, 3, False)
    before = [tensor.clone() for tensor in (weight, unit, importance, scale)]
    part = weight[8:24, 3:20], unit[8:24, 8:24], importance[8:24], scale[:, 3:20], None
    codes, _, _, _ = trial_block(*part, bits=4)
    group = torch.zeros(32, dtype=torch.int64, device=DEVICE)[::2]
    swept, _ = sweep_block(*part[:2], part[3], None, group, bits=4)
    assert torch.equal(codes, naive.trial_block(*part, 4)[0])
    assert torch.equal(swept, naive.sweep_block(*part[:2], part[3], None, group, 4)[0])
    assert all(map(torch.equal, before, (weight, unit, importance, scale)))
    assert kernels == ["trial", "sweep"]


def test_no_row_is_an_empty_result(kernels: list[str]) -> None:
    weight, unit, importance = block(8, 0)
    scale = torch.ones(3, 0, device=DEVICE)
    group = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    assert sweep_block(weight, unit, scale, scale, group, bits=4)[0].shape == (8, 0)
    codes, best, zero, _ = trial_block(weight, unit, importance, scale, scale, bits=4)
    assert codes.shape == (8, 0)
    assert best.shape == (0,) and zero is not None and zero.shape == (0,)
    assert kernels == []


def site(rows: int, width: int, dead: tuple[int, ...] = ()) -> tuple[Tensor, Statistics]:
    generator = torch.Generator().manual_seed(rows * width)
    mix = torch.randn(width, width, generator=generator) * (0.2 + torch.rand(width, generator=generator) * 2)
    inputs = torch.randn(4 * width, width, generator=generator) @ mix / width**0.5
    inputs[:, list(dead)] = 0
    statistics = Statistics(width, cross=True, device=DEVICE)
    drift = 0.1 * torch.randn(4 * width, width, generator=generator)
    statistics.add(inputs.to(DEVICE), (inputs + drift).to(DEVICE))
    return torch.randn(rows, width, generator=generator).to(DEVICE), statistics


def both(
    weight: Tensor, statistics: Statistics, spec: QuantizeSpec, monkeypatch: pytest.MonkeyPatch
) -> tuple[Solved, Solved]:
    """The method with kernels and without."""
    solutions = []
    for with_kernels in (True, False):
        monkeypatch.setattr(fused, "has_kernels", lambda device, answer=with_kernels: answer)
        solutions.append(solver("gptq").solve(weight, statistics, spec, torch.bfloat16))
    return solutions[0], solutions[1]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("search", "size"), [("mse", 16), ("trial", 16), ("trial", -1), ("hessian", -1)])
def test_the_method_finds_the_same_weight_either_way(
    search: Any, size: int, symmetric: bool, act_order: bool, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, statistics = site(19, 48, dead=(5, 30))
    spec = QuantizeSpec(
        group_size=size, scale_search=search, symmetric=symmetric, act_order=act_order, block_size=20, corrected=0.5
    )
    ours, torchs = both(weight, statistics, spec, monkeypatch)
    runs = {("mse", 16): ["sweep"] * 3, ("hessian", -1): ["sweep"] * 3, ("trial", 16): ["trial"] * 3}
    assert kernels == runs.get((search, size), ["trial"])
    # Two scales of nearly the same error may change places by the last bit of a BLAS: one row at most, of 19.
    other = (ours.weight.codes != torchs.weight.codes).any(1) | (ours.weight.scale != torchs.weight.scale).any(1)
    assert int(other.sum()) <= 1
    assert ours.events == torchs.events == ("2 of 48 inputs are never active: rounded to nearest",)
    assert ours.error <= torchs.error * (1 + (1e-2 if other.any() else 1e-5))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "bits"), [(32, 3), (128, 4)])
def test_the_groups_of_the_recipes(size: int, bits: int, kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = site(21, 128)
    for search in ("trial", "mse"):
        spec = QuantizeSpec(group_size=size, bits=bits, scale_search=search)  # type: ignore[arg-type]
        ours, torchs = both(weight, statistics, spec, monkeypatch)
        assert int((ours.weight.codes != torchs.weight.codes).sum()) == 0
        assert ours.error <= torchs.error * (1 + 1e-5)
    assert "trial" in kernels and "sweep" in kernels


def test_without_kernels_the_operators_are_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine without CUDA gets from the operators, and what the method gets from them there."""
    monkeypatch.setattr(ops, "runs_triton", lambda device: False)
    weight, statistics = site(11, 32)
    ours, torchs = both(weight, statistics, QuantizeSpec(group_size=16), monkeypatch)
    assert torch.equal(ours.weight.codes, torchs.weight.codes)


def test_the_method_asks_for_no_kernel_on_the_cpu() -> None:
    assert not fused.has_kernels(torch.device("cpu"))
    assert not fused.has_kernels(torch.device("meta"))


@pytest.mark.parametrize("op", ["sweep", "trial"])
def test_operators_hold_what_torch_asks_of_them(op: str) -> None:
    """Schema, fake implementation and tracing: torch.compile may meet them."""
    weight, unit, importance = block(8, 6)
    scale, zero = grid(weight, 3, True)
    if op == "sweep":
        group = torch.zeros(8, dtype=torch.int64, device=DEVICE)
        torch.library.opcheck(ops._sweep_block, (weight, unit, scale, zero, group, 4))
    else:
        torch.library.opcheck(ops._trial_block, (weight, unit, importance, scale, zero, 4))


def test_cuda_graphs_replay_the_sweep() -> None:
    if DEVICE.type != "cuda":
        pytest.skip("CUDA graphs need a CUDA device")
    weight, unit, _ = block(32, 40)
    scale, _ = grid(weight, 1, False)
    group = torch.zeros(32, dtype=torch.int64, device=DEVICE)
    sweep_block(weight, unit, scale, None, group, bits=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, _ = sweep_block(weight, unit, scale, None, group, bits=4)
    weight.neg_()
    graph.replay()
    assert torch.equal(codes, sweep_block(weight, unit, scale, None, group, bits=4)[0])


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("sweep", {"bits": 9}, "bits must be 2 to 8, not 9"),
    ("sweep", {"bits": 4.0}, "bits must be 2 to 8, not 4.0"),
    ("sweep", {"weight": torch.zeros(8, 6, dtype=torch.float16)}, r"weight must be float32 .*float16 \[8, 6\]"),
    ("sweep", {"weight": torch.zeros(8)}, "weight must be"),
    ("sweep", {"weight": torch.zeros(0, 6)}, "weight holds no column"),
    ("sweep", {"unit": torch.zeros(8, 7)}, r"unit must be float32 \[8, 8\], not float32 \[8, 7\]"),
    ("sweep", {"scale": torch.ones(3, 5)}, "scale must be"),
    ("sweep", {"scale": torch.ones(0, 6)}, "scale must be"),
    ("sweep", {"zero": torch.ones(2, 6)}, "zero must be"),
    ("sweep", {"zero": torch.ones(3, 6, device="meta")}, "zero is on meta, weight on"),
    ("sweep", {"group": torch.zeros(8, dtype=torch.int32)}, "group must be int64"),
    ("sweep", {"group": torch.zeros(8, dtype=torch.int64, device="meta")}, "group is on meta"),
    ("trial", {"importance": torch.zeros(9)}, r"importance must be float32 \[8\]"),
    ("trial", {"importance": torch.zeros(8, device="meta")}, "importance is on meta"),
    ("trial", {"scale": torch.ones(513, 6), "zero": None}, "scale holds 513 candidates, at most 512"),
]


@pytest.mark.parametrize(("op", "changed", "message"), WRONG)
def test_what_is_wrong_is_named(op: str, changed: dict[str, Any], message: str) -> None:
    weight, unit, importance = block(8, 6)
    scale, zero = grid(weight, 3, True)
    given: dict[str, Any] = {"weight": weight, "unit": unit, "scale": scale, "zero": zero, "bits": 4}
    given |= {"group": torch.zeros(8, dtype=torch.int64)} if op == "sweep" else {"importance": importance}
    moved = {name: value.to(DEVICE) if getattr(value, "is_cpu", False) else value for name, value in changed.items()}
    given["group"] = given["group"].to(DEVICE) if op == "sweep" else None
    given = {name: value for name, value in (given | moved).items() if value is not None or name == "zero"}
    with pytest.raises(ValueError, match=message):
        (sweep_block if op == "sweep" else trial_block)(**given)
