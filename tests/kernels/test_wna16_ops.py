"""`wna16_matmul` as callers use it: by plain torch on a CPU, by the kernels on a CUDA device."""

from __future__ import annotations

import logging

import pytest
import torch
from llmshrink_kernels import device as where
from llmshrink_kernels.wna16 import PackedWeight, dequantize, naive, ops, prepack, wna16_matmul
from torch import Tensor, nn

HALF, BRAIN = torch.float16, torch.bfloat16


def weight_of(
    device: torch.device,
    bits: int = 4,
    group_size: int = 64,
    zero_points: bool = True,
    shape: tuple[int, int] = (70, 301),
) -> tuple[PackedWeight, Tensor]:
    """(packed, W in float64)."""
    torch.manual_seed(bits)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    groups = 1 if group_size == -1 else -(-shape[1] // group_size)
    codes = torch.randint(low, high, shape, dtype=torch.int8, device=device)
    scale = (torch.randn(shape[0], groups, device=device) * 0.05).half()
    zero = torch.randint(low, high, scale.shape, dtype=torch.int8, device=device) if zero_points else None
    packed = prepack(codes, scale, zero, bits=bits, group_size=group_size)
    return packed, naive.dequantize(codes, scale, zero, group_size)


def assert_close(y: Tensor, x: Tensor, weight: Tensor) -> None:
    error = (y.double() - x.double() @ weight.T).abs()
    assert not y.isnan().any() and bool((error <= naive.allowed_error(x, weight, y.dtype)).all())


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 130, 600])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize(
    ("bits", "group_size", "zero_points"), [(2, 32, False), (3, -1, True), (4, 128, False), (8, 256, True)]
)
def test_every_regime(
    bits: int, group_size: int, zero_points: bool, dtype: torch.dtype, rows: int, device: torch.device
) -> None:
    packed, weight = weight_of(device, bits, group_size, zero_points)
    x = torch.randn(rows, 301, device=device).to(dtype)
    assert_close(wna16_matmul(x, packed), x, weight)


def test_leading_dimensions_strides_and_no_rows(device: torch.device) -> None:
    packed, weight = weight_of(device)
    x = torch.randn(301, 3, 2, device=device).half().permute(2, 1, 0)
    y = wna16_matmul(x, packed)
    assert not x.is_contiguous() and y.shape == (2, 3, 70)
    assert_close(y.reshape(6, 70), x.reshape(6, 301), weight)
    assert wna16_matmul(x[0, 0], packed).shape == (70,)
    assert wna16_matmul(x[:0], packed).shape == (0, 3, 70)
    assert wna16_matmul(x[:, :0], packed).dtype == HALF


@pytest.mark.parametrize("rows", [0, 5])
def test_the_gradient_is_dy_times_the_weight_and_so_on(rows: int, device: torch.device) -> None:
    packed, weight = weight_of(device, 3, 32)
    x = torch.randn(rows, 301, device=device).half().requires_grad_()
    grad = torch.randn(rows, 70, device=device).half().requires_grad_()
    (dx,) = torch.autograd.grad(wna16_matmul(x, packed), x, grad, create_graph=True)
    assert_close(dx, grad, weight.T)
    (again,) = torch.autograd.grad(dx, grad, x.detach())
    assert torch.equal(again, wna16_matmul(x, packed))


def test_blocks_do_not_change_the_result(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, weight = weight_of(device, 4, 32, shape=(200, 1100))
    x, y = torch.randn(4, 1100, device=device).half(), torch.randn(4, 200, device=device).half()
    whole = dequantize.matmul(x, packed), dequantize.matmul_transposed(y, packed)
    monkeypatch.setattr(dequantize, "BLOCK_BYTES", {"cpu": 1, "cuda": 1})
    assert_close(dequantize.matmul(x, packed), x, weight)
    assert_close(dequantize.matmul_transposed(y, packed), y, weight.T)
    for one, many in zip(whole, (dequantize.matmul(x, packed), dequantize.matmul_transposed(y, packed)), strict=True):
        torch.testing.assert_close(one, many, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero-points"])
@pytest.mark.parametrize("name", ["wna16_matmul", "wna16_matmul_transposed"])
def test_the_operators_are_good_citizens(name: str, zero_points: bool, device: torch.device) -> None:
    """Schema, fake, gradient, aot_autograd with dynamic shapes."""
    packed, _ = weight_of(device, zero_points=zero_points)
    columns = 301 if name == "wna16_matmul" else 70
    x = torch.randn(5, columns, device=device).half().requires_grad_()
    torch.library.opcheck(getattr(torch.ops.llmshrink, name).default, (x, *ops._plain(packed)))


class Linear(nn.Module):
    """What a runtime makes of it: buffers, and the weight put together when it is used."""

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.register_buffer("words", packed.words)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("zero_points", packed.zero_points)
        self.numbers = (packed.bits, packed.group_size, packed.out_features, packed.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return wna16_matmul(x * 2, PackedWeight(self.words, self.scales, self.zero_points, *self.numbers)) + 1


def test_torch_compile_sees_one_graph(device: torch.device) -> None:
    packed, _ = weight_of(device)
    module = torch.compile(Linear(packed), backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 9):
        x = torch.randn(rows, 301, device=device).half().requires_grad_()
        y = module(x)
        assert torch.equal(y, Linear(packed)(x))
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape and bool(x.grad.abs().sum() > 0)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 1), (1, 1, 64), (1, 70, 301), (3, 1, 64)])
def test_torch_compile_takes_sizes_of_one(
    rows: int, outputs: int, inputs: int, dynamic: bool, device: torch.device
) -> None:
    """One row, one output, one group: sizes that torch.compile takes for constants, or for broadcasts."""
    packed, weight = weight_of(device, 4, -1, shape=(outputs, inputs))
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
    packed, weight = weight_of(device, shape=(256, 1024))
    x = torch.randn(4, 1024, device=device).half()
    wna16_matmul(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = wna16_matmul(x, packed)
    x.copy_(torch.randn(4, 1024, device=device))
    graph.replay()
    assert_close(y, x, weight)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 301),
        torch.zeros(2, 300, dtype=HALF),
        torch.zeros((), dtype=HALF),
        torch.zeros(2, 301, dtype=HALF, device="meta"),
    ],
    ids=["dtype", "inputs", "scalar", "device"],
)
def test_bad_input_is_named_before_anything_runs(
    x: Tensor, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = weight_of(device)
    monkeypatch.setattr(dequantize, "matmul", None)
    with pytest.raises(ValueError, match=r"^x is "):
        wna16_matmul(x if x.is_meta else x.to(device), packed)


def test_one_notice_where_kernels_cannot_run(caplog: pytest.LogCaptureFixture) -> None:
    packed, _ = weight_of(torch.device("cpu"))
    where.notice.cache_clear()
    with caplog.at_level(logging.WARNING, logger="llmshrink_kernels"):
        for _ in range(3):
            wna16_matmul(torch.zeros(1, 301, dtype=HALF), packed)
    assert [record.message for record in caplog.records] == [
        "llmshrink kernels: cpu has no Triton kernels; computing by plain torch"
    ]


def test_one_notice_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    where.notice.cache_clear()
    monkeypatch.setattr(where, "has_triton", lambda: False)
    assert not any(where.runs_triton(torch.device("cuda")) for _ in range(3))
    assert [record.message for record in caplog.records] == [
        "llmshrink kernels: Triton is not installed; computing by plain torch (pip install triton)"
    ]


def test_everything_computes_without_triton() -> None:
    """Each operator and its gradient, in a process that can't import Triton."""
    import subprocess
    import sys

    code = """
import sys
sys.modules["triton"] = None
import torch
from llmshrink_kernels import gptq_block, sparse24, wna16
from llmshrink_kernels.device import has_triton
assert not has_triton()
x = torch.ones(2, 64).half().requires_grad_()
dense = wna16.prepack(torch.full((3, 64), 2, dtype=torch.int8), torch.ones(3, 1), None, bits=4, group_size=-1)
values, positions = sparse24.compress(torch.tensor([[2, 0, 2, 0] * 16] * 3, dtype=torch.int8))
sparse = sparse24.prepack(values, positions, torch.ones(3, 1), bits=4)
for y, sum in ((wna16.wna16_matmul(x, dense), 128), (sparse24.sparse24_matmul(x, sparse), 64)):
    assert (y == sum).all()
    y.sum().backward()
assert x.grad.sum() == 2 * 3 * (128 + 64)
weight, eye = torch.ones(4, 5), torch.eye(4)
codes, _ = gptq_block.sweep_block(weight, eye, torch.ones(1, 5), None, torch.zeros(4, dtype=torch.int64), bits=4)
assert (codes == 1).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("computing by plain torch") == 1, done.stderr


def test_nothing_imports_triton_where_kernels_cannot_run() -> None:
    import subprocess
    import sys

    code = """
import sys, torch
from llmshrink_kernels.wna16 import prepack, wna16_matmul
packed = prepack(torch.zeros(3, 64, dtype=torch.int8), torch.ones(3, 1), None, bits=4, group_size=-1)
wna16_matmul(torch.ones(2, 64).half(), packed)
sys.exit("triton" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
