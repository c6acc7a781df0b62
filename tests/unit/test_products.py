"""float32 products by oneDNN: right, and out of the way of whatever needs a gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from llmshrink_kernels import products
from llmshrink_kernels.products import accumulate_, columns_of, multiply_fast, times_transposed
from torch import Tensor, nn


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["oneDNN", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    operator = products.one_dnn() if request.param == "oneDNN" else None
    if request.param == "oneDNN" and operator is None:
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "_operator", lambda: operator)
    return str(request.param)


@pytest.mark.parametrize(
    ("capability", "expected"), [("AVX2", "torch"), ("AVX512", "oneDNN"), ("DEFAULT", "torch"), ("NO AVX", "torch")]
)
def test_the_faster_one_multiplies(capability: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if products.one_dnn() is None:
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.product() == expected


@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 33), (1, 33)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_float64(way: str, shape: tuple[int, ...], bias: bool) -> None:
    left, right = noise(*shape), noise(19, 33, seed=1)
    added = noise(19, seed=2) if bias else None
    with torch.no_grad():
        found = times_transposed(left, right, added)
    expected = left.double() @ right.double().T + (0.0 if added is None else added.double())
    assert found.shape == (*shape[:-1], 19)
    torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=2e-5)


def test_strides_and_nothing_at_all_are_taken(way: str) -> None:
    left, right = noise(33, 7).T, noise(33, 19, seed=1).T
    with torch.no_grad():
        torch.testing.assert_close(times_transposed(left, right), left @ right.T, rtol=0.0, atol=2e-5)
        assert times_transposed(noise(0, 33), right).shape == (0, 19)


def test_a_running_mean_of_products(way: str) -> None:
    rows, total = noise(50, 6), noise(6, 6, seed=1)
    expected = 0.25 * total.double() + 0.5 * rows.double().T @ rows.double()
    with torch.no_grad():
        columns = columns_of(rows)
        accumulate_(total, columns, columns, keep=0.25, new=0.5)
    torch.testing.assert_close(total.double(), expected, rtol=0.0, atol=2e-5)


def test_a_gradient_goes_through_as_before() -> None:
    linear = nn.Linear(8, 3)
    multiply_fast(linear)
    linear(noise(4, 8)).sum().backward()
    assert linear.weight.grad is not None
    torch.testing.assert_close(linear.weight.grad, noise(4, 8).sum(0).expand(3, 8))


def test_a_copy_multiplies_by_its_own_weight() -> None:
    block = nn.Sequential(nn.Linear(8, 3, bias=False))
    multiply_fast(block)
    twin = copy.deepcopy(block)
    twin[0].weight = nn.Parameter(torch.zeros(3, 8), requires_grad=False)
    with torch.no_grad():
        assert not bool(twin(noise(4, 8)).any())
        assert bool(block(noise(4, 8)).any())
