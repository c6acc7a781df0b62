"""Packing: the stream is what its docstring draws, every version of the library agrees, and nothing is lost."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from llmshrink.formats.bitpack import BITS, pack, unpack, words_for


def random_codes(bits: int, rows: int, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, count), dtype=torch.int8, generator=generator)


@settings(deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 5),
    count=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_what_is_packed_comes_back(bits: int, rows: int, count: int, seed: int) -> None:
    codes = random_codes(bits, rows, count, seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, words_for(count, bits))
    assert torch.equal(unpack(words, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 7, 9, 10, 11, 31, 32, 33, 64, 172])
def test_a_row_is_one_little_endian_stream_of_bits(bits: int, count: int) -> None:
    codes = random_codes(bits, 3, count, seed=count)
    for row, words in zip(codes.tolist(), pack(codes, bits), strict=True):
        stream = sum((code + 2 ** (bits - 1)) << (index * bits) for index, code in enumerate(row))
        assert int.from_bytes(words.numpy().tobytes(), "little") == stream


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 5, 8, 31, 64, 172])
def test_the_library_packs_and_reads_the_same_words(bits: int, count: int) -> None:
    codes = random_codes(bits, 6, count, seed=count)
    words = pack(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)


def test_codes_need_not_be_contiguous() -> None:
    codes = random_codes(3, 12, 9, seed=0)
    assert torch.equal(pack(codes.t(), 3), pack(codes.t().contiguous(), 3))
    words = pack(codes, 3)
    assert torch.equal(unpack(words.t().contiguous().t(), 3, 9), codes)
