"""`sparse24_matmul` against float64: its kernels, interpreted on the CPU or compiled on a CUDA device; its operator.

Interpreted, the asm-free twin computes in float32; the assembly itself is executed by tests/kernels/test_ptx.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations

import pytest
import torch
from llmshrink_kernels import tune
from llmshrink_kernels.sparse24 import (
    PackedSparse,
    backward,
    compress,
    dequantize,
    dispatch,
    launch,
    naive,
    ops,
    prepack,
    sparse24_matmul,
)
from llmshrink_kernels.sparse24.prepack import empty
from llmshrink_kernels.sparse24.search import search
from llmshrink_kernels.tune import Config
from llmshrink_kernels.wna16.dispatch import Limits
from llmshrink_kernels.wna16.naive import allowed_error
from torch import Tensor, nn

HALF, BRAIN = torch.float16, torch.bfloat16
H100 = Limits("NVIDIA H100 80GB HBM3", 232448, 132)
B200 = Limits("NVIDIA B200", 232448, 148, 100)
SMALL = Limits("a small device", 101376, 28, 86)


@dataclass(frozen=True)
class Case:
    bits: int
    group: int
    rows: int
    out_features: int
    in_features: int
    dtype: torch.dtype = HALF
    split: int = 1
    block_m: int = 16
    block_n: int = 128

    def __str__(self) -> str:
        shape = f"{self.rows}x{self.in_features}x{self.out_features}-split{self.split}"
        return f"w{self.bits}-g{self.group}-{shape}-{self.dtype}"


# Every width of values with each dtype; every kind of group, cut ones and a last one that is short too; both slabs;
# odd N and K; splits, also more of them than there are packets.
CASES = [
    Case(4, 128, 1, 128, 512),
    Case(4, 128, 7, 130, 1024, BRAIN, split=2),
    Case(4, -1, 33, 65, 301, HALF, block_m=32),
    Case(4, 32, 2, 67, 320, BRAIN, split=4),
    Case(4, 384, 16, 37, 768, HALF),
    Case(4, 96, 130, 128, 350, BRAIN, block_m=64),
    Case(8, 128, 2, 40, 512, HALF),
    Case(8, -1, 7, 129, 203, BRAIN, split=3, block_n=64),
    Case(8, 64, 33, 16, 512, HALF, split=2),
    Case(16, -1, 1, 64, 532, BRAIN),
    Case(16, -1, 17, 37, 99, HALF, block_m=32, split=2),
]
MORE = [
    Case(bits, group, rows, 65, 450, dtype, split=2)
    for bits, group in ((4, -1), (4, 32), (4, 64), (4, 128), (4, 256), (8, -1), (8, 32), (8, 128), (16, -1))
    for rows, dtype in ((1, HALF), (16, BRAIN), (130, BRAIN))
]


def sparse(case: Case, device: torch.device) -> Tensor:
    """A 2:4 weight of codes, or of 16-bit numbers, in which one group of nine keeps fewer than two."""
    torch.manual_seed(case.bits * 1000 + case.in_features)
    rows, groups = case.out_features, -(-case.in_features // 4)
    keep = torch.rand(rows, groups, 4).argsort(-1) < 2
    keep &= torch.rand(rows, groups, 1) > 1 / 9
    if case.bits == 16:
        dense = torch.randn(rows, groups, 4).to(case.dtype)
    else:
        dense = torch.randint(-(1 << case.bits - 1), 1 << case.bits - 1, (rows, groups, 4), dtype=torch.int8)
    return (dense * keep).view(rows, -1)[:, : case.in_features].to(device)


def weight_of(case: Case, device: torch.device) -> tuple[PackedSparse, Tensor]:
    """(packed, W in float64); half of the scales are negative."""
    values, positions = compress(sparse(case, device))
    groups = 1 if case.group == -1 else -(-case.in_features // case.group)
    scale = (torch.randn(case.out_features, groups) * 0.05).to(case.dtype).to(device) if case.bits < 16 else None
    packed = prepack(values, positions, scale, bits=case.bits, group_size=case.group, in_features=case.in_features)
    return packed, naive.dequantize(values, positions, scale, packed.group_size, case.in_features)


def config_of(case: Case, packed: PackedSparse) -> Config:
    return Config(case.block_m, case.block_n, packed.packet, 8 if case.block_m > 16 else 4, 2, case.split)


def assert_close(y: Tensor, x: Tensor, weight: Tensor) -> None:
    error = (y.double() - x.double() @ weight.T).abs()
    assert not y.isnan().any() and bool((error <= allowed_error(x, weight, y.dtype)).all())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN: what a kernel doesn't write shows."""
    plain = torch.empty

    def filled(*shape: object, **options: object) -> Tensor:
        made: Tensor = plain(*shape, **options)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", filled)


def run(case: Case, device: torch.device) -> None:
    packed, weight = weight_of(case, device)
    x = torch.randn(case.rows, case.in_features).to(case.dtype).to(device)
    y = launch.matmul(x, packed, config_of(case, packed))
    assert y.dtype == case.dtype and y.shape == (case.rows, case.out_features)
    assert_close(y, x, weight)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_product_is_the_float64_one_within_the_tolerance(case: Case, device: torch.device) -> None:
    run(case, device)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", MORE, ids=str)
def test_every_width_with_every_group(case: Case, device: torch.device) -> None:
    run(case, device)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_pattern_and_code_is_exact(bits: int, dtype: torch.dtype, device: torch.device) -> None:
    """x is the identity: the result is W, in which a single wrong bit would show."""
    dense = torch.zeros(6, 512, dtype=torch.int8)
    for row in range(6):
        for group in range(128):
            first, second = list(combinations(range(4), 2))[(row + group) % 6]
            low, count = -(1 << min(bits, 8) - 1), 1 << min(bits, 8)
            dense[row, 4 * group + first] = low + (group + 7 * row) % count
            dense[row, 4 * group + second] = low + (5 * group + row + 1) % count
    values, positions = compress(dense.to(device) if bits < 16 else dense.to(device, dtype))
    scale = torch.full((6, 1), 0.5, dtype=dtype, device=device) if bits < 16 else None
    packed = prepack(values, positions, scale, bits=bits)
    config = Config(64 if device.type == "cuda" else 512, 128, packed.packet, 8, 2, 1)
    y = launch.matmul(torch.eye(512, dtype=dtype, device=device), packed, config)
    assert torch.equal(y.T.double().cpu(), dense * (0.5 if bits < 16 else 1.0))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[7], CASES[10]], ids=str)
def test_the_dequantize_kernel_rounds_once(case: Case, device: torch.device) -> None:
    packed, weight = weight_of(case, device)
    block = launch.dequantize_rows(packed, range(3, 36), case.dtype)
    # A code of 8 bits times a scale of 11 or 8 is a float32: float64's rounding is the same one.
    assert torch.equal(block, weight[3:36].to(case.dtype))


def test_a_configuration_that_does_not_fit_is_refused(device: torch.device) -> None:
    packed, _ = weight_of(CASES[0], device)
    good, x = config_of(CASES[0], packed), torch.zeros(1, 512, dtype=HALF, device=device)
    for changes in ({"block_n": 256}, {"block_k": 256}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            launch.matmul(x, packed, replace(good, **changes))


@pytest.mark.parametrize("rows", [1, 16, 33, 600])
@pytest.mark.parametrize("case", [CASES[1], CASES[7], CASES[9]], ids=str)
def test_every_regime(case: Case, rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantize, "BLOCK_BYTES", 1)
    packed, weight = weight_of(case, device)
    x = torch.randn(rows, case.in_features, device=device).to(case.dtype)
    assert_close(sparse24_matmul(x, packed), x, weight)


def test_leading_dimensions_strides_and_no_rows(device: torch.device) -> None:
    packed, weight = weight_of(CASES[2], device)
    x = torch.randn(301, 3, 2, device=device).half().permute(2, 1, 0)
    y = sparse24_matmul(x, packed)
    assert not x.is_contiguous() and y.shape == (2, 3, 65)
    assert_close(y.reshape(6, 65), x.reshape(6, 301), weight)
    assert sparse24_matmul(x[0, 0], packed).shape == (65,)
    assert sparse24_matmul(x[:0], packed).shape == (0, 3, 65)


@pytest.mark.parametrize("blocks", [1, dequantize.BLOCK_BYTES], ids=["narrow blocks", "one block"])
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4], CASES[5], CASES[7], CASES[10]], ids=str)
def test_the_gradient_is_dy_times_the_weight_and_so_on(
    case: Case, blocks: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantize, "BLOCK_BYTES", blocks)
    packed, weight = weight_of(case, device)
    for rows in (0, 5):
        x = torch.randn(rows, case.in_features, device=device).to(case.dtype).requires_grad_()
        grad = torch.randn(rows, case.out_features, device=device).to(case.dtype).requires_grad_()
        (dx,) = torch.autograd.grad(sparse24_matmul(x, packed), x, grad, create_graph=True)
        assert dx.dtype == case.dtype
        assert_close(dx, grad, weight.T)
        (again,) = torch.autograd.grad(dx, grad, x.detach())
        assert torch.equal(again, sparse24_matmul(x, packed))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[9]], ids=str)
def test_columns_of_a_weight_are_a_weight(case: Case, device: torch.device) -> None:
    """By the kernel, and by torch: the same numbers."""
    packed, weight = weight_of(case, device)
    span = packed.packet if packed.group_size == -1 else math.lcm(packed.packet, packed.group_size)
    for start in range(0, case.in_features, span):
        stop = min(start + span, case.in_features)
        block, exact = backward.columns(packed, start, stop), weight[:, start:stop].to(case.dtype)
        every = range(case.out_features)
        assert torch.equal(launch.dequantize_rows(block, every, case.dtype), exact)
        assert torch.equal(dequantize.dequantize(block, every, case.dtype), exact)


@pytest.mark.parametrize("name", ["sparse24_matmul", "sparse24_matmul_transposed"])
@pytest.mark.parametrize("case", [CASES[3], CASES[9]], ids=str)
def test_the_operators_are_good_citizens(name: str, case: Case, device: torch.device) -> None:
    """Schema, fake, gradient, aot_autograd with dynamic shapes."""
    packed, _ = weight_of(case, device)
    columns = case.in_features if name == "sparse24_matmul" else case.out_features
    x = torch.randn(5, columns, device=device).to(case.dtype).requires_grad_()
    torch.library.opcheck(getattr(torch.ops.llmshrink, name).default, (x, *ops.plain(packed)))


class Linear(nn.Module):
    """What a runtime makes of it: buffers, and the weight put together when it is used."""

    def __init__(self, packed: PackedSparse) -> None:
        super().__init__()
        self.register_buffer("words", packed.words)
        self.register_buffer("scales", packed.scales)
        self.rest = (packed.bits, packed.group_size, packed.bfloat, packed.out_features, packed.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return sparse24_matmul(x * 2, PackedSparse(self.words, self.scales, *self.rest)) + 1


def test_torch_compile_sees_one_graph(device: torch.device) -> None:
    packed, _ = weight_of(CASES[2], device)
    module = torch.compile(Linear(packed), backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 9):
        x = torch.randn(rows, 301, device=device).half().requires_grad_()
        y = module(x)
        assert torch.equal(y, Linear(packed)(x))
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape and bool(x.grad.abs().sum() > 0)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 4), (1, 1, 512), (1, 65, 300), (3, 1, 32)])
def test_torch_compile_takes_sizes_of_one(
    rows: int, outputs: int, inputs: int, dynamic: bool, device: torch.device
) -> None:
    """One row, one output, one group: sizes that torch.compile takes for constants, or for broadcasts."""
    packed, weight = weight_of(Case(4, -1, rows, outputs, inputs), device)
    torch.compiler.reset()
    module = torch.compile(Linear(packed), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for count in (rows, 4, 1):
        x = torch.randn(count, inputs, device=device).half().requires_grad_()
        y = module(x)
        assert torch.equal(y, Linear(packed)(x))
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.shape == x.shape
        assert_close(dx / 2, torch.ones_like(y), weight.T)


def test_cuda_graphs_replay_it(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a CUDA device")
    packed, weight = weight_of(CASES[0], device)
    x = torch.randn(4, 512, device=device).half()
    sparse24_matmul(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse24_matmul(x, packed)
    x.copy_(torch.randn(4, 512, device=device))
    graph.replay()
    assert_close(y, x, weight)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 301), "x is torch.float32; torch.float16 or torch.bfloat16"),
        (torch.zeros(2, 300, dtype=HALF), r"x is \[2, 300\]; the weight has 301 inputs"),
        (torch.zeros((), dtype=HALF), r"x is \[\]"),
        (torch.zeros(2, 301, dtype=HALF, device="meta"), "x is on meta"),
    ],
)
def test_bad_input_is_named_before_anything_runs(
    x: Tensor, message: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = weight_of(CASES[2], device)
    monkeypatch.setattr(dequantize, "matmul", None)
    with pytest.raises(ValueError, match=message):
        sparse24_matmul(x if x.is_meta else x.to(device), packed)


def test_values_of_16_bits_need_x_of_their_dtype(device: torch.device) -> None:
    packed, _ = weight_of(CASES[9], device)
    with pytest.raises(ValueError, match=r"x is torch\.float16; torch\.bfloat16 is expected"):
        sparse24_matmul(torch.zeros(2, 532, dtype=HALF, device=device), packed)


@pytest.mark.parametrize("here", [H100, B200, SMALL], ids=["H100", "B200", "small"])
@pytest.mark.parametrize(("bits", "group"), [(4, -1), (4, 32), (4, 64), (4, 128), (8, 128), (8, 32), (16, -1)])
def test_the_default_fits_everywhere(bits: int, group: int, here: Limits) -> None:
    for shape in ((4096, 4096), (65, 300), (28672, 8192)):
        packed = empty(*shape, bits=bits, group_size=group, dtype=HALF, device="meta")
        for rows in (1, 16, 17, 64, 65, 511):
            found = dispatch.default(packed, rows, here)
            assert isinstance(found, Config) and dispatch.fits(packed, found, here)
            launch.check(found, packed)
        assert dispatch.default(packed, 512, here) == "dequantize"
        every = dispatch.candidates(packed, 20, here)
        assert every[0] == dispatch.default(packed, 20, here) and len(every) == len(set(every))


def test_the_kernel_runs_as_it_is_planned_and_a_search_files_the_fastest_right_plan(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    packed, weight = weight_of(CASES[0], device)
    best = Config(16, 64, 512, 4, 3, 1)
    trials = search(
        packed,
        3,
        HALF,
        here=H100,
        clock=lambda calls: 1.0 if calls[0].args[0] == best else 2.0,  # type: ignore[attr-defined]
    )
    assert trials[0].plan == best and all(trial.seconds is not None for trial in trials)
    assert tune.lookup(dispatch.key(packed, 3, HALF, H100.name)) == best
    launched: list[Config] = []
    real = launch.matmul

    def spy(x: Tensor, packed: PackedSparse, config: Config) -> Tensor:
        launched.append(config)
        return real(x, packed, config)

    monkeypatch.setattr(launch, "matmul", spy)
    monkeypatch.setattr(ops, "runs_triton", lambda device: True)
    monkeypatch.setattr(dispatch, "limits", lambda device: H100)
    x = torch.randn(3, 512, device=device).half()
    assert_close(sparse24_matmul(x, packed), x, weight)
    x = torch.randn(17, 512, device=device).half()
    assert_close(sparse24_matmul(x, packed), x, weight)
    assert launched == [best, dispatch.default(packed, 17, H100)]
