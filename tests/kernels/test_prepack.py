"""The layout is what its module draws, and every way into it has an exact way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmshrink_kernels.wna16 import (
    PackedWeight,
    prepack,
    prepack_compressed_tensors,
    to_compressed_tensors,
    unpack,
)
from llmshrink_kernels.wna16.prepack import BITS, GROUP_SIZES, SCALE_DTYPES, places
from torch import Tensor

from llmshrink.formats import bitpack

Weight = tuple[Tensor, Tensor, Tensor | None]


@st.composite
def weights(draw: st.DrawFn) -> tuple[Weight, int, int]:
    """((codes, scale, zero_point), bits, group_size); scales are any bits, NaN and infinities too."""
    bits, group_size = draw(st.sampled_from(BITS)), draw(st.sampled_from(GROUP_SIZES))
    rows, columns = draw(st.integers(1, 150)), draw(st.integers(1, 700))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups = 1 if group_size in (-1, columns) else -(-columns // group_size)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (rows, columns), generator=generator).to(torch.int8)
    dtype = draw(st.sampled_from(SCALE_DTYPES))
    raw = torch.randint(-128, 128, (rows, groups * dtype.itemsize), generator=generator).to(torch.int8)
    zero_point = torch.randint(low, high, (rows, groups), generator=generator).to(torch.int8)
    return (codes, raw.view(dtype), zero_point if draw(st.booleans()) else None), bits, group_size


def same(found: Tensor | None, wanted: Tensor | None) -> bool:
    """To the bit, NaN included, and in order in memory."""
    if found is None or wanted is None:
        return found is wanted
    in_order = found.stride() == torch.empty(found.shape, device="meta").stride()
    return in_order and found.dtype == wanted.dtype and torch.equal(raw(found), raw(wanted))


def raw(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


@settings(max_examples=60, deadline=None)
@given(weights())
def test_unpack_is_the_exact_inverse(drawn: tuple[Weight, int, int]) -> None:
    weight, bits, group_size = drawn
    packed = prepack(*weight, bits=bits, group_size=group_size)
    assert all(map(same, unpack(packed), weight))
    assert packed.padded_out % 64 == 0 and packed.padded_in % packed.step == 0


@settings(max_examples=60, deadline=None)
@given(weights())
def test_compressed_tensors_come_back_to_the_byte(drawn: tuple[Weight, int, int]) -> None:
    (codes, scale, zero_point), bits, group_size = drawn
    stored = bitpack.pack(codes, bits)
    zeros = None if zero_point is None else bitpack.pack(zero_point.t().contiguous(), bits).t().contiguous()
    packed = prepack_compressed_tensors(stored, scale, zeros, list(codes.shape), bits=bits, group_size=group_size)
    assert all(map(same, unpack(packed), (codes, scale, zero_point)))
    *tensors, shape = to_compressed_tensors(packed)
    assert all(map(same, tensors, (stored, scale, zeros))) and shape == tuple(codes.shape)


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_of_a_packet_belongs_to_one_field(bits: int) -> None:
    width = 16 if bits == 3 else 16 // bits
    taken = [
        (plane, low + bit)
        for field in range(width)
        for plane, low, _, size in places(bits, field)
        for bit in range(size)
    ]
    assert sorted(taken) == [(plane, bit) for plane in range(bits * width // 16) for bit in range(16)]


def test_four_bits_lie_as_drawn() -> None:
    codes = torch.randint(-8, 8, (64, 512), dtype=torch.int8)
    packed = prepack(codes, torch.ones(64, 4), None, bits=4, group_size=128)
    word = int(packed.words[1, 5, 9]) & 0xFFFF
    assert [(word >> 4 * f & 15) - 8 for f in range(4)] == [int(codes[5, 256 + 64 * f + 9]) for f in range(4)]


@pytest.mark.parametrize(
    ("bits", "group_size", "inputs", "slab", "exact"),
    [(4, 128, 4096, 64, 4.125), (4, 32, 4096, 32, 4.5), (2, 128, 14336, 64, 2.125), (2, 128, 11008, 32, 2.125),
     (3, 128, 4096, 32, 3.125), (3, 128, 4864, 32, 3.289), (3, 128, 768, 16, 3.125),
     (3, 64, 576, 16, 4.333), (8, 128, 4096, 64, 8.125)],
)  # fmt: skip
def test_bits_a_weight(bits: int, group_size: int, inputs: int, slab: int, exact: float) -> None:
    codes = torch.zeros(64, inputs, dtype=torch.int8)
    packed = prepack(codes, torch.zeros(64, inputs // group_size).half(), None, bits=bits, group_size=group_size)
    assert packed.slab == slab
    assert packed.nbytes * 8 / codes.numel() == pytest.approx(exact, abs=5e-4)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("bits", {"bits": 5}),
    ("bits", {"bits": 4.0}),
    ("bits", {"bits": "4"}),
    ("codes", {"codes": torch.zeros(4, 64)}),
    ("codes", {"codes": torch.zeros(64, dtype=torch.int8)}),
    ("codes", {"codes": torch.full((4, 64), 8, dtype=torch.int8)}),
    ("group_size", {"group_size": 48}),
    ("group_size", {"group_size": 0}),
    ("group_size", {"group_size": 32.0}),
    ("scale", {"scale": torch.ones(4, 1)}),
    ("scale", {"scale": torch.ones(4, 2, dtype=torch.float64)}),
    ("scale", {"scale": torch.ones(4, 2, device="meta")}),
    ("zero_point", {"zero_point": torch.zeros(4, 2)}),
    ("zero_point", {"zero_point": torch.full((4, 2), -9, dtype=torch.int8)}),
]


@pytest.mark.parametrize(("named", "changes"), BAD)
def test_bad_input_is_named(named: str, changes: dict[str, Any]) -> None:
    good = {"codes": torch.zeros(4, 64, dtype=torch.int8), "scale": torch.ones(4, 2), "zero_point": None}
    with pytest.raises(ValueError, match=f"^{named} "):
        prepack(**good | {"bits": 4, "group_size": 32} | changes)


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("bits", {"bits": 6}),
        ("bits", {"bits": 4.0}),
        ("shape", {"shape": [4]}),
        ("shape", {"shape": [0, 64]}),
        ("shape", {"shape": [4.0, 64]}),
        ("weight_scale", {"weight_scale": torch.ones(())}),
        ("weight_packed", {"weight_packed": torch.zeros(4, 9, dtype=torch.int32)}),
        ("weight_packed", {"weight_packed": torch.zeros(4, 8, dtype=torch.int64)}),
        ("weight_zero_point", {"weight_zero_point": torch.zeros(2, 2, dtype=torch.int32)}),
    ],
)
def test_a_checkpoint_that_does_not_agree_is_named(named: str, changes: dict[str, Any]) -> None:
    good = {
        "weight_packed": torch.zeros(4, 8, dtype=torch.int32),
        "weight_scale": torch.ones(4, 2),
        "weight_zero_point": torch.zeros(1, 2, dtype=torch.int32),
        "shape": [4, 64],
    }
    assert isinstance(prepack_compressed_tensors(**good, bits=4, group_size=32), PackedWeight)
    with pytest.raises(ValueError, match=f"^{named} "):
        prepack_compressed_tensors(**good | {"bits": 4, "group_size": 32} | changes)
