"""EightBitLinear: the numbers against float64, in both ways of computing them; and what a module must survive."""

from __future__ import annotations

import copy
import logging
import os
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from llmshrink_kernels import device as where
from torch import Tensor, nn

from llmshrink.runtime.eight_bit import EightBitLinear
from llmshrink.weights import FP8, Activations, EightBit, coded, eight_bit_product
from llmshrink.weights.eight_bit_product import multiplies, tolerance

KINDS: list[Activations] = ["int8", "fp8"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(64, 128), (7, 13), (1, 1), (172, 256), (300, 37), (8, 1030)]


def make(kind: Activations, shape: tuple[int, int], scale_dtype: torch.dtype = torch.bfloat16) -> EightBit:
    """Codes take every value that there is, in order or at random; scales are of both signs."""
    torch.manual_seed(shape[1])
    bytes_ = torch.randint(0, 256, shape, dtype=torch.uint8)
    bytes_.flatten()[:256] = torch.arange(256, dtype=torch.uint8)[: bytes_.numel()]
    if kind == "fp8":
        bytes_ = torch.where((bytes_ & 127) == 127, torch.zeros_like(bytes_), bytes_)  # NaN
    codes = bytes_.view(torch.int8 if kind == "int8" else FP8)
    return EightBit(codes, (torch.randn(shape[0], 1) * 0.05).to(scale_dtype))


def inputs(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Tokens of every size, one of zeros."""
    x = torch.randn(rows, columns) * torch.tensor([1.0, 0.0, 1e-3, 30.0]).repeat(rows)[:rows, None]
    return x.to(dtype)


def check(y: Tensor, x: Tensor, weight: EightBit) -> None:
    """The one tolerance, against codes and scales multiplied in float64."""
    codes, scale = coded(x, "int8" if weight.codes.dtype == torch.int8 else "fp8")
    rounded, exact = codes.double() * scale.double(), weight.dequantize(torch.float64)
    over = (y.double() - rounded @ exact.T).abs() / tolerance(rounded, exact, x.dtype)
    assert y.dtype == x.dtype and bool((over <= 1).all()), (y.shape, x.dtype, float(over.max()))


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor whose int8 products saturate; blocks of few rows."""
    monkeypatch.setattr(eight_bit_product, "multiplies", lambda *_: False)
    monkeypatch.setattr(eight_bit_product, "BLOCK_BYTES", 1 << 12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_within_the_tolerance(kind: Activations, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for scale_dtype in (torch.bfloat16, torch.float32):
            weight = make(kind, shape, scale_dtype)
            layer = EightBitLinear(weight, dtype=dtype)
            assert layer.whole == (kind == "int8" and multiplies("int8", torch.device("cpu")))
            for rows in (1, 3, 17, 257):
                x = inputs(rows, shape[1], dtype)
                check(layer(x), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_in_float32_are_within_the_tolerance(kind: Activations, dtype: torch.dtype, by_blocks: None) -> None:
    for shape in SHAPES:
        weight = make(kind, shape)
        layer = EightBitLinear(weight, dtype=dtype)
        for rows in (1, 3, 40):
            x = inputs(rows, shape[1], dtype)
            assert not layer.whole
            check(layer(x), x, weight)


def test_an_fp8_number_is_moved_to_float32_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    finite = codes[~codes.float().isnan()].view(2, -1)
    values, unit = eight_bit_product._values(finite)
    assert torch.equal(values * unit, finite.float()) and finite.numel() == 254


def test_sums_that_do_not_fit_into_32_bits_are_taken_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 127 * 128 * eight_bit_product.MOST_INPUTS < 2**31
    weight = make("int8", (16, 96))
    monkeypatch.setattr(eight_bit_product, "MOST_INPUTS", 95)
    layer = EightBitLinear(weight, dtype=torch.float32)
    x = inputs(5, 96, torch.float32)
    assert not layer.whole
    check(layer(x), x, weight)


def saturating(x: Tensor, y: Tensor) -> Tensor:
    """What x86 does without VNNI: x is moved to unsigned numbers, and pairs of products are added in 16 bits."""
    pairs = ((x.int() + 128).unsqueeze(-1) * y.int()).view(x.shape[0], -1, 2, y.shape[1]).sum(2)
    return pairs.clamp(-(2**15), 2**15 - 1).sum(1, dtype=torch.int32) - 128 * y.sum(0, dtype=torch.int32)


def missing(x: Tensor, y: Tensor) -> Tensor:
    raise RuntimeError("not for this device")


@pytest.mark.parametrize("product", [saturating, missing])
def test_a_product_that_is_wrong_or_missing_is_not_used_and_said(
    product: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    where.notice.cache_clear()
    multiplies.cache_clear()
    weight, x = make("int8", (64, 128)), inputs(3, 128, torch.float32)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(torch, "_int_mm", product)
        patch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
        for _ in range(2):
            layer = EightBitLinear(weight, dtype=torch.float32)
            assert not layer.whole
            check(layer(x), x, weight)
    multiplies.cache_clear()
    assert [record.message for record in caplog.records] == [
        "llmshrink: cpu here has no fast, exact product of int8 numbers; computing it in float32"
    ]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 has processors with and without VNNI")
def test_a_processor_without_vnni_computes_right() -> None:
    """Where oneDNN is kept from newer instructions its products saturate; the layer's mustn't."""
    code = (
        "import torch; from llmshrink.runtime.eight_bit import EightBitLinear; from llmshrink.weights import EightBit\n"
        "layer = EightBitLinear(EightBit(torch.full((8, 64), 127, dtype=torch.int8), torch.ones(8, 1)),"
        " dtype=torch.float32)\n"
        "assert not layer.whole\n"
        "assert torch.allclose(layer(torch.ones(2, 64)), torch.tensor(64.0 * 127), rtol=1e-6)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_dtype_leaves_codes_and_scales_alone(kind: Activations) -> None:
    weight = make(kind, (172, 256))
    layer = EightBitLinear(weight, nn.Parameter(torch.zeros(172)), dtype=torch.bfloat16)
    assert layer.bias is not None
    model = nn.Sequential(layer)
    for dtype in (torch.float32, torch.float16, torch.float64, torch.bfloat16):
        model.to(dtype)
        assert layer.dtype == layer.bias.dtype == dtype
        assert torch.equal(layer.codes.view(torch.uint8), weight.codes.view(torch.uint8))
        assert layer.scale.dtype == torch.bfloat16 and torch.equal(layer.scale, weight.scale)
        x = inputs(5, 256, dtype)
        if dtype == torch.float64:
            with pytest.raises(ValueError, match="changes its dtype, to float32, bfloat16 or float16"):
                model(x)
        else:
            check(model(x), x, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_state_a_copy_and_memory(kind: Activations) -> None:
    weight = make(kind, (172, 256))
    layer = EightBitLinear(weight, dtype=torch.bfloat16)
    assert layer.nbytes == 172 * 256 + 172 * 2 and set(layer.state_dict()) == {"codes", "scale"}
    blank = EightBit(torch.zeros_like(weight.codes), torch.zeros_like(weight.scale))
    again = EightBitLinear(blank, dtype=torch.bfloat16)
    again.load_state_dict(layer.state_dict())
    x = inputs(3, 256, torch.bfloat16)
    for other in (again, copy.deepcopy(layer)):
        assert torch.equal(other(x), layer(x)) and bool(other(x).abs().max() > 0)
    assert f"activations={kind}" in repr(layer)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_leading_shape_and_a_bias(kind: Activations, leading: tuple[int, ...]) -> None:
    weight, bias = make(kind, (80, 33)), nn.Parameter(torch.arange(80.0))
    layer, plain = EightBitLinear(weight, bias, dtype=torch.float32), EightBitLinear(weight, dtype=torch.float32)
    x = torch.ones(*leading, 33)
    assert layer(x).shape == (*leading, 80)
    assert torch.equal(layer(x), plain(x) + bias)
    strided = torch.randn(33, 6).t()
    assert torch.equal(plain(strided), plain(strided.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_product(kind: Activations, dtype: torch.dtype) -> None:
    weight = make(kind, (172, 37))
    layer = EightBitLinear(weight, dtype=dtype)
    x = torch.randn(2, 3, 37).to(dtype).requires_grad_()
    g = torch.randn(2, 3, 172).to(dtype)
    layer(x).backward(g)
    assert x.grad is not None
    exact, rows = weight.dequantize(torch.float64), g.flatten(0, 1).double()
    error = (x.grad.flatten(0, 1).double() - rows @ exact).abs()
    assert bool((error <= tolerance(rows, exact.T, dtype)).all())


@pytest.mark.parametrize("x", [torch.ones(2, 127), torch.ones(2, 128, dtype=torch.bfloat16)])
def test_input_that_does_not_fit_is_refused(x: Tensor) -> None:
    layer = EightBitLinear(make("int8", (80, 128)), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x is torch\..*this layer takes torch.float32 \[\.\.\., 128\]"):
        layer(x)


def test_input_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="x is on meta, the weight on cpu"):
        EightBitLinear(make("int8", (80, 128)), dtype=torch.float32)(torch.ones(2, 128, device="meta"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_one(kind: Activations) -> None:
    layer = EightBitLinear(make(kind, (80, 128)), dtype=torch.bfloat16)
    x = inputs(3, 128, torch.bfloat16)
    x[1, 5] = torch.nan
    assert bool(layer(x)[1].isnan().all()) and bool(layer(x)[[0, 2]].isfinite().all())


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind: Activations, dynamic: bool) -> None:
    layer: Any = EightBitLinear(make(kind, (80, 33)), dtype=torch.bfloat16)
    torch.compiler.reset()
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (1, 5, 1):
        x, again = (inputs(rows, 33, torch.bfloat16).fill_(0.3).requires_grad_() for _ in range(2))
        y, expected = compiled(x), layer(again)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        assert x.grad is not None and again.grad is not None and torch.equal(x.grad, again.grad)
