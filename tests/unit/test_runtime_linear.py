"""QuantLinear: the numbers, on the CPU's two paths, against float64; and what a module must survive."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from llmshrink_kernels import device as where
from llmshrink_kernels.wna16 import PackedWeight, cpu, naive, prepack, unpack
from torch import Tensor, nn

from llmshrink.runtime.linear import QuantLinear

SHAPES = [(64, 128), (172, 256), (80, 96), (8, 172), (200, 768)]


def make(
    bits: int, group: int, shape: tuple[int, int], *, symmetric: bool = True, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[PackedWeight, Tensor]:
    """A packed weight, scales of both signs, and what it means in float64."""
    rows, columns = shape
    torch.manual_seed(bits * 1000 + columns)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    groups = 1 if group == -1 else columns // group
    codes = torch.randint(low, high + 1, shape, dtype=torch.int8)
    scale = (torch.randn(rows, groups) * 0.05).to(scale_dtype)
    zero = None if symmetric else torch.randint(low, high + 1, (rows, groups), dtype=torch.int8)
    return prepack(codes, scale, zero, bits=bits, group_size=group), naive.dequantize(codes, scale, zero, group)


def check(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """The one tolerance: the kernels', and what sums in float32 may add to it."""
    allowed = naive.allowed_error(x, weight, x.dtype) + 2**-21 * (x.double().abs() @ weight.abs().T)
    over = (y.double() - x.double() @ weight.T).abs() / allowed
    assert y.dtype == x.dtype and over.max() <= 1, (y.shape, x.dtype, float(over.max()))


def fitting(bits: int, group: int) -> list[tuple[int, int]]:
    return [shape for shape in SHAPES if group == -1 or shape[1] % group == 0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "group"), [(4, -1), (4, 32), (4, 64), (4, 128), (2, 64), (3, 32), (8, -1), (8, 128)])
def test_every_path_stays_within_the_tolerance(bits: int, group: int, dtype: torch.dtype, symmetric: bool) -> None:
    for shape in fitting(bits, group):
        for scale_dtype in (torch.bfloat16, torch.float32):
            packed, weight = make(bits, group, shape, symmetric=symmetric, scale_dtype=scale_dtype)
            layer = QuantLinear(packed, dtype=dtype)
            for rows in (1, 3, 33, cpu.MANY_ROWS + 1):
                x = torch.randn(rows, shape[1]).to(dtype)
                check(layer(x), x, weight)


def test_an_asymmetric_group_of_zeros_is_zero() -> None:
    """Every code is its zero-point, which no bfloat16 product with the scale holds."""
    codes = torch.full((64, 128), -7, dtype=torch.int8)
    scale = torch.full((64, 1), 0.0429, dtype=torch.bfloat16)
    layer = QuantLinear(
        prepack(codes, scale, torch.full((64, 1), -7, dtype=torch.int8), bits=4, group_size=128), dtype=torch.bfloat16
    )
    assert layer.scale_and_zero is not None
    assert layer(torch.ones(2, 128, dtype=torch.bfloat16)).abs().max() < 128 * 0.0429 * 7 * 2**-16


@pytest.mark.parametrize("shape", [(172, 256), (64, 96), (1030, 64)])
@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_processors_layout_comes_back_exactly(bits: int, shape: tuple[int, int], group: int) -> None:
    packed, _ = make(bits, group, shape)
    words = cpu.pack(packed)
    assert words.numel() * 8 == packed.padded_out * shape[1] * bits
    assert torch.equal(cpu.unpack(words, *shape, group), packed.words)


def test_one_copy_of_the_weight() -> None:
    packed, _ = make(4, 128, (256, 1024))
    layer = QuantLinear(packed, dtype=torch.bfloat16)
    assert layer.words.nbytes == 256 * 1024 // 2
    assert layer.nbytes <= packed.nbytes + 256 * 1024 * 32 // 128 // 8


def test_a_change_of_dtype_leaves_scales_and_codes_alone() -> None:
    packed, weight = make(4, 64, (172, 256), symmetric=False)
    layer = QuantLinear(packed, nn.Parameter(torch.randn(172)), dtype=torch.bfloat16)
    assert layer.words.dtype == torch.uint8
    model = nn.Sequential(layer)
    for dtype in (torch.float32, torch.float16, torch.float32, torch.bfloat16):
        model.to(dtype)
        assert layer.dtype == layer.bias.dtype == dtype
        assert layer.scales.dtype == torch.bfloat16 and torch.equal(layer.scales, packed.scales)
        for now, before in zip(unpack(layer.packed()), unpack(packed), strict=True):
            assert now is not None and before is not None and torch.equal(now, before)
        x = torch.randn(5, 256).to(dtype)
        layer.bias.data.zero_()
        check(model(x), x, weight)
    assert layer.words.dtype == torch.uint8


def test_state_dict_is_in_one_layout_everywhere() -> None:
    packed, _ = make(4, 64, (172, 256), symmetric=False)
    layer = QuantLinear(packed, dtype=torch.bfloat16)
    wide = QuantLinear(packed, dtype=torch.float32)
    state = layer.state_dict()
    assert set(state) == {"words", "scales", "zero_points"}
    assert all(torch.equal(state[key], wide.state_dict()[key]) for key in state)
    blank = PackedWeight(*(t * 0 if isinstance(t, Tensor) else t for t in vars(packed).values()))
    again = QuantLinear(blank, dtype=torch.bfloat16)
    again.load_state_dict(state)
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    assert torch.equal(again(x), layer(x)) and layer(x).abs().max() > 0


def test_deepcopy_and_repr() -> None:
    layer = QuantLinear(make(3, 32, (80, 96))[0], dtype=torch.bfloat16)
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert "bits=3, group_size=32" in repr(layer)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "dtype"), [(4, torch.bfloat16), (8, torch.bfloat16), (4, torch.float32), (8, torch.float32)]
)
def test_gradients_reach_the_input(bits: int, dtype: torch.dtype, symmetric: bool) -> None:
    packed, weight = make(bits, 64, (172, 256), symmetric=symmetric)
    layer = QuantLinear(packed, dtype=dtype)
    x = torch.randn(2, 3, 256).to(dtype).requires_grad_()
    g = torch.randn(2, 3, 172).to(dtype)
    layer(x).backward(g)
    assert x.grad is not None
    check(x.grad.flatten(0, 1), g.flatten(0, 1), weight.T)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_leading_shape(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = QuantLinear(make(4, 64, (80, 128))[0], nn.Parameter(torch.ones(80, dtype=dtype)), dtype=dtype)
    assert layer(torch.ones(*leading, 128, dtype=dtype)).shape == (*leading, 80)


def test_strided_input() -> None:
    layer = QuantLinear(make(4, 64, (80, 128))[0], dtype=torch.bfloat16)
    x = torch.randn(128, 6, dtype=torch.bfloat16).t()
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize(
    "x", [torch.ones(2, 127, dtype=torch.bfloat16), torch.ones(2, 128), torch.ones(2, 128, dtype=torch.float64)]
)
def test_input_that_does_not_fit_is_refused(x: Tensor) -> None:
    layer = QuantLinear(make(4, 64, (80, 128))[0], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"x is torch\..*this layer takes torch.bfloat16 \[\.\.\., 128\]"):
        layer(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_input_on_another_device_is_refused(dtype: torch.dtype) -> None:
    layer = QuantLinear(make(4, 64, (80, 128))[0], dtype=dtype)
    with pytest.raises(ValueError, match="x is on meta, the weight on cpu"):
        layer(torch.ones(2, 128, dtype=dtype, device="meta"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_by_itself_says_that_it_has_no_kernel(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    where.notice.cache_clear()
    for _ in range(2):
        QuantLinear(make(4, 64, (80, 128))[0], dtype=dtype)(torch.ones(1, 128, dtype=dtype))
    assert [record.message for record in caplog.records] == [
        "llmshrink kernels: cpu has no Triton kernels; computing by plain torch"
    ]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 32), (1, 128), (8, 32)])
def test_compiles_with_sizes_of_one(shape: tuple[int, int], dtype: torch.dtype, dynamic: bool) -> None:
    """One row, one output, one group: sizes that torch.compile takes for constants, or for broadcasts."""
    layer: Any = QuantLinear(make(4, -1, shape, symmetric=False)[0], dtype=dtype)
    torch.compiler.reset()
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (1, 4, 1):
        x, again = (torch.ones(rows, shape[1], dtype=dtype, requires_grad=True) for _ in range(2))
        y, expected = compiled(x), layer(again)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        assert x.grad is not None and again.grad is not None and torch.equal(x.grad, again.grad)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.bfloat16), (4, torch.float32), (2, torch.bfloat16)])
def test_compiles_whole(backend: str, bits: int, dtype: torch.dtype) -> None:
    layer: Any = QuantLinear(make(bits, 64, (80, 128), symmetric=False)[0], dtype=dtype)
    torch.compiler.reset()
    compiled: Any = torch.compile(layer, backend=backend, fullgraph=True)
    for rows in (1, 5):
        x = torch.randn(rows, 128).to(dtype)
        assert torch.equal(compiled(x), layer(x))
