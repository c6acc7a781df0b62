"""The weight as the kernel reads it: fields of int16 words that are K-slabs, so that nothing is shuffled on the GPU.

The tensor cores take their register operand as pairs of neighbouring 16-bit values, (k, k+1) in one register. A word
of two packed codes for k and k+1 would have to be taken apart into two registers; but where *field f of every word
belongs to the f-th slab of K*, masking field f out of a register of two words gives the pair (k, k+1) of slab f, in
place. With S = 64 (the slab) and b = 4, one packet is 4 slabs of 64 inputs, and row n of packet p is 64 words:

    word j of row n, packet p:   | 15..12   | 11..8    | 7..4     | 3..0     |
                                 | k0+192+j | k0+128+j | k0+64+j  | k0+j     |      k0 = 256 p,  0 <= j < 64

    words: int16 [packets * planes, N, S]; a tile of rows of one packet is one run of memory

Codes are stored unsigned (code + 2**(b-1)). b = 2 has 8 fields of a word, b = 8 two. Three bits don't divide 16: a
packet is three planes of words, of which each holds five fields in its low 15 bits, and the three top bits together
are the sixteenth:

    plane 0:  | field 15, bit 0 | field 4  | field 3  | field 2  | field 1  | field 0  |
    plane 1:  | field 15, bit 1 | field 9  | field 8  | field 7  | field 6  | field 5  |
    plane 2:  | field 15, bit 2 | field 14 | field 13 | field 12 | field 11 | field 10 |

That is exactly 3 bits a weight (the floor counts bytes; ten codes in 32 bits would be 3.2, and 5 slabs divide no group)
and, counted in instructions for a pair of weights: 40 for 16 fields, against 48 and more for a plane of two bits and
one of one bit, where every field needs both.

scales are [groups, N] in the checkpoint's dtype and zero-points int8 of the same shape: a tile's scales of one group
are neighbours. Everything is padded to whole tiles, codes, scales and zero-points with zeros: against inputs that are
zero they add nothing. N is padded to a multiple of 64, K to whole packets and groups: 256 inputs for 4 bits, 128 for 8,
512 for 3 and 2, or half of that where it makes a row shorter. K is one group when group_size is -1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 32, 64, 128, 256)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS = 64
"""Output features are padded to a multiple of this: the height of a Hopper tensor core instruction."""
NARROW = 16
"""The slab of 3 bits where 32 would pad too much: what one tensor core instruction takes."""


def fields(bits: int) -> int:
    """Slabs of a packet."""
    return 16 if bits == 3 else 16 // bits


def planes(bits: int) -> int:
    """Words in which the fields of a packet lie."""
    return 3 if bits == 3 else 1


def places(bits: int, field: int) -> list[tuple[int, int, int, int]]:
    """Where a field's parts are: (plane, lowest bit in the word, lowest bit in the code, number of bits) of each."""
    if bits != 3:
        return [(0, field * bits, 0, bits)]
    if field < 15:
        return [(field // 5, field % 5 * 3, 0, 3)]
    return [(plane, 15, plane, 1) for plane in range(3)]


def step(bits: int, group_size: int, slab: int) -> int:
    """The inputs after which packets and groups both begin anew: K is padded to a multiple of it."""
    return math.lcm(fields(bits) * slab, 1 if group_size == -1 else group_size)


def choose_slab(bits: int, group_size: int, in_features: int) -> int:
    """The slab for a weight: 64, or 32 where groups are that small or 64 would pad more; 3 bits 32, or 16.

    A wider slab is fewer address instructions a weight; with 3 bits a packet of 64-wide slabs is 1024 inputs, and its
    activations would fill the shared memory that is wanted for weights in flight. One of 32 is 512, which is a lot of
    padding for a row of 576; slabs of 16 cost a fifth more instructions on Hopper, and are taken where they save a
    sixteenth of the weight or more.
    """

    def padded(slab: int) -> int:
        span = step(bits, group_size, slab)
        return -(-in_features // span) * span

    if bits == 3:
        return NARROW if padded(NARROW) * 16 <= padded(32) * 15 else 32
    return 32 if group_size == 32 or padded(32) < padded(64) else 64


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in the kernel's layout (see the module's drawing).

    words: int16 [packets * planes, padded N, slab]. scales: [groups, padded N]. zero_points: int8, as scales, or None
    when symmetric. out_features, in_features: N and K before padding. group_size: -1 is one group a row.
    """

    words: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    group_size: int
    out_features: int
    in_features: int

    @property
    def slab(self) -> int:
        """Inputs of a slab."""
        return self.words.shape[2]

    @property
    def packet(self) -> int:
        """Inputs of a packet."""
        return fields(self.bits) * self.slab

    @property
    def step(self) -> int:
        """The inputs after which packets and groups both begin anew."""
        return step(self.bits, self.group_size, self.slab)

    @property
    def padded_out(self) -> int:
        """N, padded."""
        return self.words.shape[1]

    @property
    def padded_in(self) -> int:
        """K, padded."""
        return self.words.shape[0] // planes(self.bits) * self.packet

    @property
    def nbytes(self) -> int:
        """What it takes in memory, padding included."""
        return sum(tensor.nbytes for tensor in (self.words, self.scales, self.zero_points) if tensor is not None)

    def copy(self) -> PackedWeight:
        """The same in memory of its own."""
        zero_points = None if self.zero_points is None else self.zero_points.clone()
        return replace(self, words=self.words.clone(), scales=self.scales.clone(), zero_points=zero_points)


def empty(
    out_features: int,
    in_features: int,
    *,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
    zero_points: bool,
    device: torch.device | str,
) -> PackedWeight:
    """A packed weight of this shape and kind with nothing in it; on the "meta" device, its shapes alone."""
    slab = choose_slab(bits, group_size, in_features)
    span = step(bits, group_size, slab)
    padded_in, padded_out = -(-in_features // span) * span, -(-out_features // ROWS) * ROWS
    count = padded_in // (fields(bits) * slab) * planes(bits)
    groups = 1 if group_size == -1 else padded_in // group_size
    return PackedWeight(
        torch.empty(count, padded_out, slab, dtype=torch.int16, device=device),
        torch.empty(groups, padded_out, dtype=scale_dtype, device=device),
        torch.empty(groups, padded_out, dtype=torch.int8, device=device) if zero_points else None,
        bits,
        group_size,
        out_features,
        in_features,
    )


def prepack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int, group_size: int) -> PackedWeight:
    """Bring a weight of grouped integers into the kernel's layout; `unpack` is the exact inverse.

    codes: int8 [N, K], each in [-2**(bits-1), 2**(bits-1) - 1]. scale: [N, G], fp16, bf16 or fp32, may be negative;
    G = ceil(K / group_size), or 1 for group_size -1. zero_point: int8 [N, G] in the range of codes, or None.
    bits: 2, 3, 4 or 8. group_size: -1 or 32, 64, 128, 256; K itself is the same as -1. Raises ValueError naming the
    argument that is none of this. The result is on the device of `codes`.
    """
    group_size = _checked(codes, scale, zero_point, bits, group_size)
    rows, columns = codes.shape
    packed = empty(
        rows,
        columns,
        bits=bits,
        group_size=group_size,
        scale_dtype=scale.dtype,
        zero_points=zero_point is not None,
        device=codes.device,
    )
    padded = torch.zeros(packed.padded_out, packed.padded_in, dtype=torch.int8, device=codes.device)
    padded[:rows, :columns] = codes
    slabs = padded.view(packed.padded_out, -1, fields(bits), packed.slab)
    words = packed.words.zero_().view(-1, planes(bits), packed.padded_out, packed.slab)
    for field in range(fields(bits)):
        stored = slabs[:, :, field].transpose(0, 1).to(torch.int16) + (1 << (bits - 1))
        for plane, low, part, size in places(bits, field):
            words[:, plane] |= ((stored >> part) & ((1 << size) - 1)) << low
    for small, given in ((packed.scales, scale), (packed.zero_points, zero_point)):
        if small is not None and given is not None:
            small.zero_()[: given.shape[1], :rows] = given.t()
    return packed


def unpack(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale, zero_point) as `prepack` took them: int8 [N, K], [N, G], int8 [N, G] or None."""
    groups = 1 if packed.group_size == -1 else -(-packed.in_features // packed.group_size)
    small = [
        None if tensor is None else turned(tensor[:groups, : packed.out_features])
        for tensor in (packed.scales, packed.zero_points)
    ]
    assert small[0] is not None
    everything = range(packed.out_features), range(packed.padded_in // packed.packet)
    codes = unpack_block(packed, *everything)[:, : packed.in_features].clone(memory_format=torch.contiguous_format)
    return codes, small[0], small[1]


def turned(matrix: Tensor) -> Tensor:
    """The transpose, in memory of its own and in order (`contiguous` leaves a row that was a column as it is)."""
    return matrix.t().clone(memory_format=torch.contiguous_format)


def unpack_block(packed: PackedWeight, rows: range, packets: range) -> Tensor:
    """The codes of some output features and packets, padding along K included: int8 [rows, packets * packet]."""
    bits = packed.bits
    words = packed.words.view(-1, planes(bits), packed.padded_out, packed.slab)
    words = words[packets.start : packets.stop, :, rows.start : rows.stop]
    codes = torch.empty(len(rows), len(packets), fields(bits), packed.slab, dtype=torch.int8, device=words.device)
    for field in range(fields(bits)):
        stored = torch.zeros_like(words[:, 0])
        for plane, low, part, size in places(bits, field):
            stored |= ((words[:, plane] >> low) & ((1 << size) - 1)) << part
        codes[:, :, field] = (stored - (1 << (bits - 1))).to(torch.int8).transpose(0, 1)
    return codes.view(len(rows), -1)


def _checked(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> int:
    """The group size, -1 where it is one group a row; ValueError where an argument isn't what `prepack` asks for."""
    if bits not in BITS or not isinstance(bits, int):
        raise ValueError(f"bits is {bits}; one of {BITS} is supported")
    if codes.dtype != torch.int8 or codes.dim() != 2 or 0 in codes.shape:
        raise ValueError(f"codes is {codes.dtype} {list(codes.shape)}; a non-empty int8 [N, K] is expected")
    if group_size == codes.shape[1]:
        group_size = -1
    if group_size not in GROUP_SIZES or not isinstance(group_size, int):
        raise ValueError(
            f"group_size is {group_size}; one of {GROUP_SIZES}, or all {codes.shape[1]} inputs, is supported"
        )
    expected = (codes.shape[0], 1 if group_size == -1 else -(-codes.shape[1] // group_size))
    for name, tensor, dtypes in (("scale", scale, SCALE_DTYPES), ("zero_point", zero_point, (torch.int8,))):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes or tuple(tensor.shape) != expected:
            wanted = " or ".join(map(str, dtypes))
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; {wanted} {list(expected)} is expected")
        if tensor.device != codes.device:
            raise ValueError(f"{name} is on {tensor.device}, codes on {codes.device}")
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    for name, tensor in (("codes", codes), ("zero_point", zero_point)):
        if tensor is not None and bits < 8 and bool(((tensor < low) | (tensor > high)).any()):
            raise ValueError(f"{name} holds values beyond {low}..{high}, the range of {bits} bits")
    return group_size
