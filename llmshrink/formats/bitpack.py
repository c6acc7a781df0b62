"""Codes of 2 to 8 bits in 32-bit words: one dense little-endian stream of bits for each row.

Code i of a row takes bits [i*b, (i+1)*b) of the row's stream, lowest bit first, stored unsigned with an offset of
2**(b-1); word w of the row holds bits [32*w, 32*w + 32), and what is left of the last word is zero:

    b = 4   word 0 = |c7|c6|c5|c4|c3|c2|c1|c0|           (bit 31 ... bit 0)
    b = 3   word 0 = |c10 low 2|c9|c8| ... |c1|c0|,  word 1 = | ... |c11|c10 high 1|

For the bits that divide 32 (2, 4, 8) this is what every version of compressed-tensors calls `pack_to_int32`; for the
others it is the layout of compressed-tensors >= 0.18 and of vLLM >= 0.32. (Version 0.17 puts 32 // b whole codes in
each word instead and can't read those.)

The stream repeats every lcm(b, 8) bits: `codes` codes fill exactly `octets` bytes (8 codes of 3 bits fill 3 bytes).
So packing is a handful of strided byte operations over the whole matrix, with temporaries of one byte a code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_right

WORD = 32
BITS = range(2, 9)


def words_for(count: int, bits: int) -> int:
    """How many int32 words `count` codes of `bits` bits take."""
    return math.ceil(count * bits / WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of signed codes into words.

    codes: int8 [rows, count], each in [-2**(bits-1), 2**(bits-1) - 1]. Returns int32 [rows, ceil(count * bits / 32)].
    """
    assert codes.dtype == torch.int8 and codes.dim() == 2, (codes.dtype, codes.shape)
    period, octets = _period(bits)
    rows, count = codes.shape
    words = words_for(count, bits)
    periods = math.ceil(count / period)
    # Two's complement makes the offset a flip of the top bit; the mask drops the sign's copies above it.
    stored = (codes.view(torch.uint8) & ((1 << bits) - 1)) ^ (1 << (bits - 1))
    stored = pad_right(stored, (0, periods * period - count)).view(rows, periods, period)
    stream = torch.zeros(rows, periods, octets, dtype=torch.uint8, device=codes.device)
    for code, octet, shift in _overlaps(bits):
        stream[:, :, octet] |= stored[:, :, code] << shift if shift >= 0 else stored[:, :, code] >> -shift
    # A negative padding cuts: the last period may reach beyond the last word, where there is nothing but zeros.
    stream = pad_right(stream.view(rows, -1), (0, words * 4 - periods * octets))
    return stream.reshape(-1).view(torch.int32).view(rows, words)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: int32 [rows, ceil(count * bits / 32)] -> int8 [rows, count]."""
    assert words.dtype == torch.int32 and words.dim() == 2, (words.dtype, words.shape)
    assert words.shape[1] == words_for(count, bits), (words.shape, bits, count)
    period, octets = _period(bits)
    rows = words.shape[0]
    periods = math.ceil(count / period)
    stream = words.reshape(-1).view(torch.uint8).view(rows, -1)
    stream = pad_right(stream, (0, periods * octets - stream.shape[1])).view(rows, periods, octets)
    stored = torch.zeros(rows, periods, period, dtype=torch.uint8, device=words.device)
    for code, octet, shift in _overlaps(bits):
        stored[:, :, code] |= stream[:, :, octet] >> shift if shift >= 0 else stream[:, :, octet] << -shift
    # To the top of the byte, the offset undone by a flip, and back down with the sign: what lay above is gone too.
    spare = 8 - bits
    return (((stored.view(rows, -1)[:, :count] << spare) ^ 0x80).view(torch.int8)) >> spare


def _period(bits: int) -> tuple[int, int]:
    """(codes, bytes) after which the stream is aligned to a byte again."""
    assert bits in BITS, bits
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """(code, byte, left shift of the code in that byte) for all that meet within a period."""
    period, octets = _period(bits)
    return [
        (code, octet, code * bits - octet * 8)
        for code in range(period)
        for octet in range(octets)
        if code * bits < octet * 8 + 8 and octet * 8 < (code + 1) * bits
    ]
