"""From compressed-tensors' `pack-quantized` tensors to the kernel's layout, and exactly back.

There, each row of codes is one dense little-endian stream of bits in int32 words, lowest first, codes unsigned with an
offset of 2**(b-1):

    weight_packed      int32 [N, ceil(K*b/32)]       along the inputs
    weight_scale       [N, K/g]
    weight_zero_point  int32 [ceil(N*b/32), K/g]     along the outputs; only when asymmetric
    weight_shape       (N, K)

The stream repeats after lcm(b, 8) bits (8 codes of 3 bits are 3 bytes); as one integer, its codes are a shift apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmshrink_kernels.wna16.prepack import BITS, PackedWeight, prepack, turned, unpack

ROWS_AT_ONCE = 1024
"""Rows that are unpacked together: the integers take up to eight times what the codes will."""


def prepack_compressed_tensors(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    shape: Sequence[int],
    *,
    bits: int,
    group_size: int,
) -> PackedWeight:
    """Bring a linear of a `pack-quantized` checkpoint into the kernel's layout.

    The tensors are as in the module's list, `shape` is (N, K) (`weight_shape.tolist()`), group_size -1 is one group a
    row. Raises ValueError naming the argument that isn't what the others say. The result is on their device.
    """
    if bits not in BITS or not isinstance(bits, int):
        raise ValueError(f"bits is {bits}; one of {BITS} is supported")
    if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"shape is {list(shape)}; two positive whole numbers [N, K] are expected")
    if weight_scale.dim() != 2:
        raise ValueError(f"weight_scale is {weight_scale.dtype} {list(weight_scale.shape)}; [N, K/g] is expected")
    out_features, in_features = shape
    _expect("weight_packed", weight_packed, (out_features, words_for(in_features, bits)))
    zero_point = None
    if weight_zero_point is not None:
        groups = weight_scale.shape[-1]
        _expect("weight_zero_point", weight_zero_point, (words_for(out_features, bits), groups))
        zero_point = turned(from_stream(turned(weight_zero_point), bits, out_features))
    codes = from_stream(weight_packed, bits, in_features)
    return prepack(codes, weight_scale, zero_point, bits=bits, group_size=group_size)


def to_compressed_tensors(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, int]]:
    """(weight_packed, weight_scale, weight_zero_point or None, shape): the inverse of `prepack_compressed_tensors`."""
    codes, scale, zero_point = unpack(packed)
    stored = None if zero_point is None else turned(to_stream(turned(zero_point), packed.bits))
    return to_stream(codes, packed.bits), scale, stored, (packed.out_features, packed.in_features)


def words_for(count: int, bits: int) -> int:
    """How many int32 words `count` codes take."""
    return -(-count * bits // 32)


def from_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, words_for(count)] -> int8 [rows, count]."""
    period, octets = _period(bits)
    codes = torch.empty(words.shape[0], count, dtype=torch.int8, device=words.device)
    for start in range(0, words.shape[0], ROWS_AT_ONCE):
        part = words[start : start + ROWS_AT_ONCE]
        stream = part.reshape(-1).view(torch.uint8).view(part.shape[0], -1)
        stream = pad(stream, (0, -stream.shape[1] % octets)).view(stream.shape[0], -1, octets).int()
        whole = sum(stream[:, :, octet] << 8 * octet for octet in range(octets))
        assert isinstance(whole, Tensor)
        fields = [((whole >> bits * code) & ((1 << bits) - 1)) - (1 << (bits - 1)) for code in range(period)]
        codes[start : start + ROWS_AT_ONCE] = torch.stack(fields, -1).flatten(1)[:, :count]
    return codes


def to_stream(codes: Tensor, bits: int) -> Tensor:
    """int8 [rows, count] -> int32 [rows, words_for(count)]; what is left of the last word is zero."""
    period, octets = _period(bits)
    rows, count = codes.shape
    size = 4 * words_for(count, bits)
    stream = torch.zeros(rows, size, dtype=torch.uint8, device=codes.device)
    for start in range(0, rows, ROWS_AT_ONCE):
        stored = codes[start : start + ROWS_AT_ONCE].int() + (1 << (bits - 1))
        stored = pad(stored, (0, -count % period)).view(stored.shape[0], -1, period)
        whole = sum(stored[:, :, code] << bits * code for code in range(period))
        assert isinstance(whole, Tensor)
        parts = torch.stack([(whole >> 8 * octet) & 0xFF for octet in range(octets)], -1).to(torch.uint8).flatten(1)
        width = min(size, parts.shape[1])
        stream[start : start + ROWS_AT_ONCE, :width] = parts[:, :width]
    return stream.view(-1).view(torch.int32).view(rows, -1)


def _period(bits: int) -> tuple[int, int]:
    """(codes, bytes) after which the stream is aligned to a byte again."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; torch.int32 {list(shape)} is expected")
