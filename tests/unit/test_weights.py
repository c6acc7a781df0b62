"""What a compressed weight is: one meaning, and slices of it that mean the same."""

from __future__ import annotations

import pytest
import torch

from llmshrink.weights import Dense, GroupedInt, code_range


def grouped_int(*, asymmetric: bool, dtype: torch.dtype = torch.bfloat16) -> GroupedInt:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (5, 12), generator=generator, dtype=torch.int8)
    scale = torch.randn(5, 3, generator=generator).to(dtype)
    zero_point = torch.randint(-8, 8, (5, 3), generator=generator, dtype=torch.int8) if asymmetric else None
    return GroupedInt(codes, scale, zero_point, 4, 4)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_every_weight_is_scale_times_code_less_zero_point(asymmetric: bool) -> None:
    weight = grouped_int(asymmetric=asymmetric)
    values = weight.dequantize(torch.float64)
    for o in range(5):
        for i in range(12):
            zero = 0 if weight.zero_point is None else int(weight.zero_point[o, i // 4])
            assert float(values[o, i]) == float(weight.scale[o, i // 4]) * (int(weight.codes[o, i]) - zero)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantizing_rounds_once_from_float32(dtype: torch.dtype) -> None:
    weight = grouped_int(asymmetric=True)
    assert torch.equal(weight.dequantize(dtype), weight.dequantize(torch.float32).to(dtype))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_rows_are_views_that_mean_the_same(asymmetric: bool) -> None:
    weight = grouped_int(asymmetric=asymmetric)
    part = weight.rows(1, 4)
    assert part.shape == (3, 12)
    assert torch.equal(part.dequantize(), weight.dequantize()[1:4])
    assert part.codes.data_ptr() == weight.codes[1:].data_ptr()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_signed_and_fill_their_bits(bits: int) -> None:
    low, high = code_range(bits)
    assert high - low + 1 == 2**bits
    assert low == -high - 1


def test_dense_is_the_weight_itself() -> None:
    weight = torch.randn(3, 4)
    assert Dense(weight).dequantize() is weight
    assert torch.equal(Dense(weight).rows(1, 3).dequantize(torch.bfloat16), weight[1:].bfloat16())
