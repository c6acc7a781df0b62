"""The kernels against float64, interpreted on the CPU or compiled on a CUDA device.

The interpreter computes bfloat16 wrongly: bfloat16 cases run through the kernel's float32 twin there, and through the
real bfloat16 path (assembly, tensor cores) on a device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from llmshrink_kernels.tune import Config
from llmshrink_kernels.wna16 import launch, naive
from llmshrink_kernels.wna16.prepack import PackedWeight, prepack
from torch import Tensor

HALF, BRAIN = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    bits: int
    group_size: int
    rows: int
    out_features: int
    in_features: int
    dtype: torch.dtype = HALF
    zero_points: bool = False
    split: int = 1
    steps: int = 1
    block_m: int = 16
    block_n: int = 64

    def __str__(self) -> str:
        shape = f"{self.rows}x{self.in_features}x{self.out_features}-split{self.split}"
        return f"w{self.bits}-g{self.group_size}-{shape}-{self.dtype}-{'zp' if self.zero_points else 'sym'}"


# Every bit width with each dtype, and with and without zero-points; every group size; every number of rows; odd N and
# K; splits, also more of them than there are steps; more than one step, packet and group in a step.
CASES = [
    Case(4, 128, 1, 64, 256),
    Case(4, 128, 7, 130, 512, BRAIN, zero_points=True, split=2),
    Case(4, -1, 33, 65, 301, HALF, zero_points=True, block_m=32),
    Case(4, 32, 2, 67, 320, BRAIN, split=4),
    Case(4, 256, 16, 64, 1024, HALF, steps=2),
    Case(4, 64, 130, 128, 512, BRAIN, block_m=64, block_n=128, steps=2),
    Case(2, 128, 2, 64, 512, HALF, zero_points=True),
    Case(2, -1, 7, 33, 777, BRAIN, split=3),
    Case(2, 32, 16, 96, 256, BRAIN, zero_points=True),
    Case(3, 128, 1, 65, 1024, HALF, split=2),
    Case(3, 64, 33, 64, 512, BRAIN, zero_points=True),
    Case(3, -1, 2, 31, 129, HALF, zero_points=True),
    Case(3, 128, 7, 65, 576, HALF, split=2),
    Case(3, 32, 17, 65, 700, BRAIN, zero_points=True, block_m=32),
    Case(8, 256, 7, 64, 512, HALF),
    Case(8, -1, 1, 100, 253, BRAIN, zero_points=True),
    Case(8, 32, 16, 64, 192, HALF, zero_points=True, steps=3, split=8),
    Case(8, 128, 130, 63, 128, BRAIN, block_m=32),
]
MORE = [
    Case(bits, group, rows, 65, 290, dtype, zero_points=zero_points, split=2)
    for bits in (2, 3, 4, 8)
    for group in (-1, 32, 64, 128, 256)
    for rows, dtype, zero_points in ((1, HALF, True), (17, BRAIN, False), (130, BRAIN, True))
]


def weight_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, PackedWeight]:
    """(codes, scale, zero_point, packed): every code occurs, half of the scales are negative."""
    torch.manual_seed(case.bits * 1000 + case.in_features)
    low, high = -(1 << (case.bits - 1)), 1 << (case.bits - 1)
    shape = case.out_features, case.in_features
    groups = 1 if case.group_size == -1 else -(-case.in_features // case.group_size)
    codes = torch.randint(low, high, shape, dtype=torch.int8)
    scale = (torch.randn(shape[0], groups) * 0.05).to(case.dtype)
    zero_point = torch.randint(low, high, (shape[0], groups), dtype=torch.int8) if case.zero_points else None
    tensors = [None if tensor is None else tensor.to(device) for tensor in (codes, scale, zero_point)]
    packed = prepack(*tensors, bits=case.bits, group_size=case.group_size)
    return *tensors, packed


def config_of(case: Case, packed: PackedWeight) -> Config:
    block_k = packed.step * (case.steps if packed.padded_in % (packed.step * case.steps) == 0 else 1)
    return Config(case.block_m, case.block_n, block_k, 8 if case.block_n == 128 else 4, 2, case.split)


def run(case: Case, device: torch.device) -> None:
    codes, scale, zero_point, packed = weight_of(case, device)
    x = torch.randn(case.rows, case.in_features, dtype=torch.float32).to(case.dtype).to(device)
    out = torch.full((case.rows, case.out_features), float("nan"), dtype=case.dtype, device=device)
    y = launch.matmul(x, packed, config_of(case, packed), out)
    weight = naive.dequantize(codes, scale, zero_point, packed.group_size)
    error = (y.double() - x.double() @ weight.T).abs()
    assert y.dtype == case.dtype and not y.isnan().any()
    assert bool((error <= naive.allowed_error(x, weight, case.dtype)).all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_product_is_the_float64_one_within_the_tolerance(case: Case, device: torch.device) -> None:
    run(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=str)
def test_every_bit_width_with_every_group(case: Case, device: torch.device) -> None:
    run(case, device)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero-points"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_numbers_that_can_be_exact_are_exact(
    bits: int, zero_points: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """x is the identity: the result is W, in which a single wrong bit would show."""
    case = Case(bits, 64, 512, 64, 512, dtype, zero_points, block_m=64 if device.type == "cuda" else 512)
    codes, scale, zero_point, _ = weight_of(case, device)
    scale = torch.where(scale > 0, 0.5, -0.25).to(dtype)
    packed = prepack(codes, scale, zero_point, bits=bits, group_size=64)
    y = launch.matmul(torch.eye(512, dtype=dtype, device=device), packed, config_of(case, packed))
    assert torch.equal(y.double(), naive.dequantize(codes, scale, zero_point, 64).T)


def test_a_split_gives_the_same_bytes_every_time(device: torch.device) -> None:
    case = Case(4, 128, 3, 64, 1024, split=4)
    *_, packed = weight_of(case, device)
    x = torch.randn(3, 1024, device=device).to(HALF)
    first = launch.matmul(x, packed, config_of(case, packed))
    assert all(torch.equal(first, launch.matmul(x, packed, config_of(case, packed))) for _ in range(3))


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize(
    ("bits", "group_size", "zero_points"), [(2, 32, True), (3, 128, False), (4, -1, True), (8, 64, True)]
)
def test_the_dequantize_kernel_rounds_once(
    bits: int, group_size: int, zero_points: bool, dtype: torch.dtype, device: torch.device
) -> None:
    case = Case(bits, group_size, 1, 70, 1100, dtype, zero_points)
    codes, scale, zero_point, packed = weight_of(case, device)
    start = packed.step // packed.packet
    packets = range(start, packed.padded_in // packed.packet)
    columns = 1100 - start * packed.packet
    block = launch.dequantize_block(packed, range(3, 68), packets, columns, dtype)
    # float32, as the product of a scale and a code isn't always one of float32's: this is what "rounded once" means.
    group = torch.arange(1100, device=device) // (1100 if group_size == -1 else group_size)
    values = codes.float() if zero_point is None else codes.float() - zero_point.float()[:, group]
    expected = (values * scale.float()[:, group]).to(dtype)
    assert torch.equal(block, expected[3:68, start * packed.packet :])


@pytest.mark.parametrize(
    ("changes", "named"), [({"block_n": 128}, "block_n"), ({"block_k": 32}, "block_k"), ({"block_k": 1024}, "block_k")]
)
def test_a_configuration_that_does_not_fit_is_refused(
    changes: dict[str, int], named: str, device: torch.device
) -> None:
    case = Case(4, 128, 1, 64, 256)
    *_, packed = weight_of(case, device)
    with pytest.raises(ValueError, match=named):
        launch.matmul(
            torch.zeros(1, 256, dtype=HALF, device=device), packed, replace(config_of(case, packed), **changes)
        )
