"""2:4 weights: stored and prepacked without loss, by every bit that their modules draw."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmshrink_kernels.sparse24 import (
    PackedSparse,
    compress,
    expand,
    pack_nibbles,
    pack_positions,
    prepack,
    unpack,
    unpack_nibbles,
    unpack_positions,
)
from llmshrink_kernels.sparse24.prepack import BITS, SCALE_DTYPES, empty
from torch import Tensor

PAIRS = torch.tensor(list(combinations(range(4), 2)), dtype=torch.uint8)
RAW = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@st.composite
def weights(draw: st.DrawFn) -> dict[str, Any]:
    """`prepack`'s arguments: any positions, any codes, and any bits for scales and 16-bit values, NaN too."""
    bits = draw(st.sampled_from(BITS))
    rows, inputs = draw(st.integers(1, 140)), draw(st.integers(1, 700))
    group = -1 if bits == 16 else draw(st.sampled_from([-1, 32, 64, 96, 128, 256, 384]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kept = -(-inputs // 4) * 2
    groups = 1 if group in (-1, inputs) else -(-inputs // group)
    positions = PAIRS[torch.randint(0, 6, (rows, kept // 2), generator=generator)].view(rows, kept)

    def noise(columns: int, dtype: torch.dtype) -> Tensor:
        raw = torch.randint(-128, 128, (rows, columns * dtype.itemsize), generator=generator)
        return raw.to(torch.int8).view(dtype)

    if bits == 16:
        values, scale = noise(kept, draw(st.sampled_from([torch.float16, torch.bfloat16]))), None
    else:
        values, scale = noise(kept, torch.int8) >> 8 - bits, noise(groups, draw(st.sampled_from(SCALE_DTYPES)))
    return {
        "values": values,
        "positions": positions,
        "scale": scale,
        "bits": bits,
        "group_size": group,
        "in_features": inputs,
    }


def same(found: Tensor | None, wanted: Tensor | None) -> bool:
    """To the bit, and in order in memory."""
    if found is None or wanted is None:
        return found is wanted
    raw = RAW[wanted.dtype.itemsize]
    return found.is_contiguous() and found.dtype == wanted.dtype and torch.equal(found.view(raw), wanted.view(raw))


@settings(max_examples=80, deadline=None)
@given(weights())
def test_unpack_is_the_exact_inverse(given: dict[str, Any]) -> None:
    packed = prepack(**given)
    assert all(map(same, unpack(packed), (given["values"], given["positions"].contiguous(), given["scale"])))
    assert packed.padded_out % 128 == 0 and 0 <= packed.padded_in - packed.in_features < packed.packet
    assert packed.words.is_contiguous() and (packed.scales is None or packed.scales.is_contiguous())


@st.composite
def two_of_four(draw: st.DrawFn) -> Tensor:
    """A 2:4 weight of codes, in which some groups keep one weight, or none."""
    rows, inputs = draw(st.integers(1, 9)), draw(st.integers(1, 90))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups = -(-inputs // 4)
    codes = torch.randint(-8, 8, (rows, groups, 4), generator=generator, dtype=torch.int8)
    keep = torch.rand(rows, groups, 4, generator=generator).argsort(-1) < 2
    return (codes * keep).view(rows, -1)[:, :inputs].contiguous()


@settings(max_examples=80, deadline=None)
@given(two_of_four())
def test_the_stored_form_holds_the_weight_and_is_packed_without_loss(dense: Tensor) -> None:
    rows, inputs = dense.shape
    values, positions = compress(dense)
    kept = -(-inputs // 4) * 2
    assert values.shape == positions.shape == (rows, kept)
    assert torch.equal(expand(values, positions, inputs), dense)
    assert all(map(same, compress(expand(values, positions, inputs)), (values, positions)))
    packed = pack_positions(positions), pack_nibbles(values)
    assert packed[0].shape == (rows, -(-kept // 4)) and packed[1].shape == (rows, kept // 2)
    assert torch.equal(unpack_positions(packed[0], kept), positions)
    assert torch.equal(unpack_nibbles(packed[1]), values)


def test_the_stored_form_bit_by_bit() -> None:
    values, positions = compress(torch.tensor([[0, 3, 0, -5, 0, 0, 7, 0, 0, 0, 0, 0]], dtype=torch.int8))
    assert values.tolist() == [[3, -5, 0, 7, 0, 0]]
    assert positions.tolist() == [[1, 3, 0, 2, 0, 1]]
    assert pack_positions(positions).tolist() == [[0b10_00_11_01, 0b00_00_01_00]]
    assert pack_nibbles(values).tolist() == [[0xB3, 0x70, 0x00]]


@pytest.mark.parametrize("bits", BITS)
def test_words_and_masks_lie_as_drawn(bits: int) -> None:
    """One group of one slab of the second packet, each pattern: two fields and three mask bits, nothing else."""
    table = {(0, 1): (1, 1, 0), (0, 2): (1, 0, 1), (0, 3): (1, 0, 0), (1, 2): (0, 1, 0), (1, 3): (0, 1, 1)}
    slab, group = 5, 3
    plane, field = slab // (16 // bits), slab % (16 // bits)
    kind = torch.float16 if bits == 16 else torch.int8
    width = 32 if bits == 16 else 64
    at = (8 + slab) * width // 2 + 2 * group
    for pattern in combinations(range(4), 2):
        values, positions = (
            torch.zeros(2, 8 * width, dtype=kind),
            torch.tensor([2, 3] * 4 * width, dtype=torch.uint8).repeat(2, 1),
        )
        values[1, at : at + 2] = torch.tensor([1, 2]).to(kind)
        positions[1, at : at + 2] = torch.tensor(pattern)
        scale = None if bits == 16 else torch.ones(2, 1).half()
        packed = prepack(values, positions, scale, bits=bits)
        stored = [0x3C00, 0x4000] if bits == 16 else [1, 2]
        words = packed.words.clone()
        lower, upper = (int(words[1, plane, 1, 2 * group + half]) & 0xFFFF for half in range(2))
        ordered = stored[::-1] if pattern[0] == 1 else stored
        assert [lower, upper] == [part << bits * field for part in ordered]
        first, second, clash = table.get(pattern, (0, 0, 0))
        masks = [int(words[1, bits // 2, 1, 2 * group + half]) & 0xFFFF for half in range(2)]
        assert masks == [(kept | clash << 1) << bits * field + 2 * plane for kept in (first, second)]
        for half in range(2):
            words[1, plane, 1, 2 * group + half] = words[1, bits // 2, 1, 2 * group + half] = 0
        assert not words.any()


@pytest.mark.parametrize(
    ("bits", "group", "inputs", "exact"),
    [
        (4, 128, 4096, 3.125),
        (4, 32, 4096, 3.5),
        (8, 128, 14336, 5.125),
        (8, -1, 4096, 5 + 16 / 4096),
        (16, -1, 4096, 9),
    ],
)
def test_bits_for_a_weight(bits: int, group: int, inputs: int, exact: float) -> None:
    packed = empty(128, inputs, bits=bits, group_size=group, dtype=torch.float16, device="meta")
    assert packed.nbytes * 8 / (128 * inputs) == exact


def test_what_is_not_2_4_is_refused() -> None:
    dense = torch.zeros(3, 9)
    dense[1, 4:7] = 1
    with pytest.raises(ValueError, match="weight is not 2:4: row 1 holds more than two weights at inputs 4 to 7"):
        compress(dense)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("bits", {"bits": 3}),
    ("bits", {"bits": 4.0}),
    ("values", {"values": torch.zeros(4, 32)}),
    ("values", {"values": torch.zeros(4, 33, dtype=torch.int8)}),
    ("values", {"values": torch.zeros(0, 32, dtype=torch.int8)}),
    ("values", {"values": torch.full((4, 32), 9, dtype=torch.int8)}),
    ("positions", {"positions": torch.zeros(4, 32, dtype=torch.int8)}),
    ("positions", {"positions": torch.zeros(4, 30, dtype=torch.uint8)}),
    ("positions", {"positions": torch.zeros(4, 32, dtype=torch.uint8)}),
    ("positions", {"positions": torch.tensor([2, 4] * 16, dtype=torch.uint8).expand(4, 32)}),
    ("positions", {"positions": torch.zeros(4, 32, dtype=torch.uint8, device="meta")}),
    ("group_size", {"group_size": 16}),
    ("group_size", {"group_size": 48}),
    ("group_size", {"bits": 16, "values": torch.zeros(4, 32, dtype=torch.float16), "scale": None}),
    ("in_features", {"in_features": 60}),
    ("in_features", {"in_features": 65}),
    ("scale", {"scale": None}),
    ("scale", {"scale": torch.ones(4, 3, dtype=torch.float16)}),
    ("scale", {"scale": torch.ones(4, 2, dtype=torch.float64)}),
    ("scale", {"scale": torch.ones(4, 2, device="meta")}),
    ("scale", {"bits": 16, "values": torch.zeros(4, 32, dtype=torch.float16)}),
]


@pytest.mark.parametrize(("named", "changes"), WRONG)
def test_bad_input_is_named(named: str, changes: dict[str, Any]) -> None:
    values, positions = compress(torch.zeros(4, 64, dtype=torch.int8))
    good = {"values": values, "positions": positions, "scale": torch.ones(4, 2).half(), "bits": 4, "group_size": 32}
    assert isinstance(prepack(**good), PackedSparse)
    with pytest.raises(ValueError, match=f"^{named} "):
        prepack(**good | changes)
