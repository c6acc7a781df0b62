"""Means of what was seen at a tap, whatever the batches it came in."""

from __future__ import annotations

import pytest
import torch

from llmshrink.calibration.statistics import Statistics, merge


def streams(tokens: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens * width)
    original = torch.randn(tokens, width, generator=generator)
    return (original + 0.1 * torch.randn(tokens, width, generator=generator)).to(dtype), original.to(dtype)


@pytest.mark.parametrize("width", [1, 7, 256, 300, 1030])
def test_hessian_and_cross_are_the_means_of_their_definition(width: int) -> None:
    compressed, original = streams(50, width)
    statistics = Statistics(width, cross=True)
    for start, stop in ((0, 20), (20, 21), (21, 21), (21, 50)):
        statistics.add(compressed[start:stop], original[start:stop])
    inputs, drift = compressed.double(), (original - compressed).double()
    assert statistics.tokens == 50
    assert statistics.cross is not None
    torch.testing.assert_close(statistics.hessian.double(), inputs.T @ inputs / 50, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.cross.double(), drift.T @ inputs / 50, rtol=1e-5, atol=1e-5)


def test_hessian_is_symmetric_to_the_last_bit_and_can_be_read_between_batches() -> None:
    compressed, _ = streams(64, 300)
    statistics = Statistics(300)
    statistics.add(compressed[:32])
    assert torch.equal(statistics.hessian, statistics.hessian.T)
    statistics.add(compressed[32:])
    assert torch.equal(statistics.hessian, statistics.hessian.T)
    torch.testing.assert_close(statistics.hessian, compressed.T @ compressed / 64, rtol=1e-5, atol=1e-5)


def test_reading_costs_no_copy() -> None:
    statistics = Statistics(8, cross=True)
    statistics.add(*streams(4, 8))
    assert statistics.cross is not None
    assert statistics.hessian.data_ptr() == statistics.hessian.data_ptr()
    assert statistics.cross.data_ptr() == statistics.cross.data_ptr()


def test_bfloat16_streams_give_an_exact_hessian_and_a_close_cross_term() -> None:
    compressed, original = streams(4096, 64, torch.bfloat16)
    statistics = Statistics(64, cross=True)
    for start in range(0, 4096, 512):
        statistics.add(compressed[start : start + 512], original[start : start + 512])
    inputs = compressed.double()
    cross = (original - compressed).double().T @ inputs / 4096
    assert statistics.cross is not None
    torch.testing.assert_close(statistics.hessian.double(), inputs.T @ inputs / 4096, rtol=1e-5, atol=1e-6)
    assert float((statistics.cross - cross).norm() / cross.norm()) < 2e-3


def test_merging_is_seeing_both() -> None:
    compressed, original = streams(60, 9)
    a, b, both = (Statistics(9, cross=True) for _ in range(3))
    a.add(compressed[:13], original[:13])
    b.add(compressed[13:], original[13:])
    both.add(compressed, original)
    merged = merge(a, b)
    assert merged.tokens == 60
    assert a.tokens == 13
    assert merged.cross is not None
    assert both.cross is not None
    torch.testing.assert_close(merged.hessian, both.hessian)
    torch.testing.assert_close(merged.cross, both.cross)
    torch.testing.assert_close(merge(b, a).hessian, merged.hessian)


def test_merging_with_nothing_changes_nothing() -> None:
    some, nothing = Statistics(5), Statistics(5)
    some.add(streams(7, 5)[0])
    assert torch.equal(merge(some, nothing).hessian, some.hessian)
    assert torch.equal(merge(nothing, some).hessian, some.hessian)
    assert merge(nothing, nothing).tokens == 0


def test_float64_on_request() -> None:
    compressed, original = streams(30, 6, torch.float64)
    statistics = Statistics(6, cross=True, dtype=torch.float64)
    statistics.add(compressed, original)
    assert statistics.hessian.dtype == torch.float64
    torch.testing.assert_close(statistics.hessian, compressed.T @ compressed / 30, rtol=1e-12, atol=1e-12)


def test_inputs_are_left_as_they_are() -> None:
    compressed, original = streams(10, 4)
    before = compressed.clone(), original.clone()
    Statistics(4, cross=True).add(compressed, original)
    assert torch.equal(compressed, before[0])
    assert torch.equal(original, before[1])
