"""From canonical 2:4 to words that a kernel takes apart in place, and back, exactly.

A packet is eight slabs of S = 64 inputs of a row (32 where that pads less, or for small groups of scales, or 16 bits),
each S / 4 groups of four. Words are 16 bits wide and stand in planes of S / 2 words a row: value planes, then one plane
of masks. Words 2j and 2j + 1 make a register, and hold what belongs to group j of every slab of their plane:

    bits 31                     16 15                      0
    4    | hi3 | hi2 | hi1 | hi0 | lo3 | lo2 | lo1 | lo0 |      plane p: slabs 4p to 4p + 3      2 planes
    8    |    hi1    |    hi0    |    lo1    |    lo0    |      plane p: slabs 2p, 2p + 1        4
    16   |          hi           |          lo           |      plane p: slab p                  8
    mask, the last plane: bit F s + u     + 16 h             F = bits; s: slab in its plane; h: upper half

Two dense registers are to come out: inputs (0, 1) of the group, and inputs (2, 3). The kept values a, b lie in the word
of the half they are for, so that most patterns need no move; where both are for the same half (C) the second register
takes its own from the other word. With M_h the mask's bit 2p, whether input h is kept, and C its bit 2p + 1:

    kept     hi  lo   M1 M0   C    inputs (1, 0)    inputs (3, 2)
    0, 1     b   a    1  1    0       b  a             .  .
    0, 2     b   a    0  1    1       .  a             .  b     first  = (hi, lo) & M
    0, 3     b   a    0  1    0       .  a             b  .     second = (C ? (lo, hi) : (hi, lo)) & ~(M ^ C)
    1, 2     a   b    1  0    0       a  .             .  b
    1, 3     a   b    1  0    1       a  .             b  .
    2, 3     b   a    0  0    0       .  .             b  a

`(mask >> 2p) & 0x1111_1111`, times 15, is M over the nibbles of the register for all four slabs at once, and so is C.
What comes out is a dense word, whose field s is a pair of weights for slab s; both go to the tensor cores as tiles of
their own, [rows, S / 2 inputs of a slab], against the same inputs of x. Rows are padded to a multiple of 128, inputs to
a packet, with zeros. Scales are [groups, padded N]; groups that no packet holds whole are cut (the scale repeated)
until one does.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmshrink_kernels.wna16.prepack import SCALE_DTYPES, turned

BITS = (4, 8, 16)
ROWS = 128
SLABS = 8
"""Slabs of a packet, whatever the bits."""
WIDTHS = (64, 32)
"""Inputs of a slab."""


def choose_slab(bits: int, group_size: int, in_features: int) -> int:
    """The slab for a weight: 64, which takes fewer instructions a weight, or 32.

    With more than four groups in a packet, 64 would take more registers than a thread has; with 16 bits more shared
    memory than an Ampere has for two packets.
    """
    padded = [-(-in_features // (SLABS * width)) * width for width in WIDTHS]
    small = bits == 16 or (group_size != -1 and group_size % 128 != 0)
    return 32 if small or padded[1] < padded[0] else 64


@dataclass(frozen=True, eq=False)
class PackedSparse:
    """A 2:4 weight, prepacked.

    words: int16 [packets, value planes + 1, padded N, slab / 2]. scales: [kernel's groups, padded N]; None for 16-bit
    values. bits: 4, 8 or 16. group_size: inputs that share a scale, or -1. bfloat: of 16-bit values, whether they are
    bf16 (else fp16). out_features, in_features: N and K before padding.
    """

    words: Tensor
    scales: Tensor | None
    bits: int
    group_size: int
    bfloat: bool
    out_features: int
    in_features: int

    @property
    def slab(self) -> int:
        """Inputs of a slab."""
        return 2 * self.words.shape[3]

    @property
    def packet(self) -> int:
        """Inputs of a packet."""
        return SLABS * self.slab

    @property
    def padded_out(self) -> int:
        """N, padded."""
        return self.words.shape[2]

    @property
    def padded_in(self) -> int:
        """K, padded."""
        return self.words.shape[0] * self.packet

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes on its device."""
        return self.words.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def kernel_group(self) -> int:
        """Inputs for each row of `scales`; 0 if there is one row, or none."""
        return 0 if self.group_size == -1 else math.gcd(self.group_size, self.packet)

    def copy(self) -> PackedSparse:
        """The same in memory of its own."""
        scales = None if self.scales is None else self.scales.clone()
        return replace(self, words=self.words.clone(), scales=scales)


def empty(
    out_features: int,
    in_features: int,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> PackedSparse:
    """A packed weight of this shape and kind with nothing in it; on the "meta" device, its shapes alone.

    dtype: of the scales, or of 16-bit values.
    """
    slab = choose_slab(bits, group_size, in_features)
    packets, padded_out = -(-in_features // (SLABS * slab)), -(-out_features // ROWS) * ROWS
    words = torch.empty(packets, bits // 2 + 1, padded_out, slab // 2, dtype=torch.int16, device=device)
    packed = PackedSparse(
        words, None, bits, group_size, bits == 16 and dtype == torch.bfloat16, out_features, in_features
    )
    if bits == 16:
        return packed
    groups = 1 if group_size == -1 else packed.padded_in // packed.kernel_group
    return replace(packed, scales=torch.empty(groups, padded_out, dtype=dtype, device=device))


def prepack(
    values: Tensor,
    positions: Tensor,
    scale: Tensor | None,
    *,
    bits: int,
    group_size: int = -1,
    in_features: int | None = None,
) -> PackedSparse:
    """Prepack a canonical weight (canonical.py says what that is); `unpack` is the exact inverse.

    values: int8 [N, Q] of 4 or 8 bits, or fp16 or bf16 of 16, with Q = 2 ceil(K / 4). positions: uint8 [N, Q]. scale:
    fp16, bf16 or fp32 [N, ceil(K / group_size)] ([N, 1] for -1); None with 16 bits. group_size: a multiple of 32, or
    -1; K itself is the same as -1. in_features: K, where it isn't 2 Q. Raises ValueError, naming the argument. The
    result is on the device of `values`.
    """
    inputs, group_size = _checked(values, positions, scale, bits, group_size, in_features)
    rows, kept = values.shape
    kind = values.dtype if scale is None else scale.dtype
    packed = empty(rows, inputs, bits=bits, group_size=group_size, dtype=kind, device=values.device)
    low, high = positions.view(rows, -1, 2).unbind(-1)
    pairs = values.view(rows, -1, 2)
    # What input 1 keeps goes into the upper word, whichever comes first.
    pairs = torch.where((low == 1).unsqueeze(-1), pairs.flip(-1), pairs)
    stored = pairs.view(torch.int16) if bits == 16 else pairs.to(torch.int16) & ((1 << bits) - 1)
    here = torch.stack([low == 0, (low == 1) | (high == 1)], -1).to(torch.int16)
    clash = (high - low == 2).to(torch.int16).unsqueeze(-1).expand(-1, -1, 2)
    more = (0, packed.padded_in // 2 - kept, 0, packed.padded_out - rows)
    fields = [_by_field(packed, pad(part.reshape(rows, kept), more)) for part in (stored, here, clash)]
    words = packed.words.zero_()
    planes = bits // 2
    for plane, field in itertools.product(range(planes), range(16 // bits)):
        value, inside, other = (part[:, plane, :, field] for part in fields)
        words[:, plane] |= value << bits * field
        words[:, planes] |= inside << bits * field + 2 * plane
        words[:, planes] |= other << bits * field + 2 * plane + 1
    if packed.scales is not None and scale is not None:
        # The last group may reach beyond K's padding: what is cut off there is no input's.
        spread = scale.T.repeat_interleave(_cuts(packed), 0)[: len(packed.scales)]
        packed.scales.zero_()[: len(spread), :rows] = spread
    return packed


def unpack(packed: PackedSparse) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `prepack`: values, positions and scale, as they were."""
    bits, rows, kept = packed.bits, packed.out_features, -(-packed.in_features // 4) * 2
    planes, fields = bits // 2, 16 // bits
    packets, _, padded_out, width = packed.words.shape
    stored, here, clash = (packed.words.new_empty(packets, planes, padded_out, fields, width) for _ in range(3))
    for plane, field in itertools.product(range(planes), range(fields)):
        mask = packed.words[:, planes] >> bits * field + 2 * plane
        stored[:, plane, :, field] = packed.words[:, plane] >> bits * field
        here[:, plane, :, field] = mask & 1
        clash[:, plane, :, field] = mask >> 1 & 1
    pairs, inside, other = (
        part.permute(2, 0, 1, 3, 4).reshape(padded_out, -1)[:rows, :kept].reshape(rows, -1, 2)
        for part in (stored, here, clash)
    )
    zeroth, first = (part == 1 for part in inside.unbind(-1))
    apart = other[..., 0]
    low = torch.where(zeroth, 0, torch.where(first, 1, 2))
    high = torch.where(zeroth & first, 1, torch.where(zeroth, 3 - apart, torch.where(first, 2 + apart, 3)))
    pairs = torch.where((low == 1).unsqueeze(-1), pairs.flip(-1), pairs).reshape(rows, kept)
    if bits == 16:
        values = pairs.view(torch.bfloat16 if packed.bfloat else torch.float16)
    else:
        half = 1 << (bits - 1)
        values = (((pairs & ((1 << bits) - 1)) ^ half) - half).to(torch.int8)
    positions = torch.stack([low, high], -1).view(rows, kept).to(torch.uint8)
    if packed.scales is None:
        return values, positions, None
    groups = 1 if packed.group_size == -1 else -(-packed.in_features // packed.group_size)
    return values, positions, turned(packed.scales[:: _cuts(packed)][:groups, :rows])


def _by_field(packed: PackedSparse, part: Tensor) -> Tensor:
    """[padded N, padded K / 2] -> [packets, planes, padded N, fields, words of a slab]."""
    planes = packed.bits // 2
    width = packed.words.shape[3]
    return part.view(packed.padded_out, -1, planes, 16 // packed.bits, width).permute(1, 2, 0, 3, 4)


def _cuts(packed: PackedSparse) -> int:
    """Rows of `scales` for each of the weight's groups."""
    return 1 if packed.group_size == -1 else packed.group_size // packed.kernel_group


def _checked(
    values: Tensor, positions: Tensor, scale: Tensor | None, bits: int, group_size: int, in_features: int | None
) -> tuple[int, int]:
    """(K, the group size, -1 where it is one group a row); ValueError where an argument isn't what `prepack` asks."""
    if bits not in BITS or not isinstance(bits, int):
        raise ValueError(f"bits is {bits}; one of {BITS} is supported")
    allowed = (torch.float16, torch.bfloat16) if bits == 16 else (torch.int8,)
    if values.dtype not in allowed or values.dim() != 2 or 0 in values.shape or values.shape[1] % 2:
        wanted = " or ".join(map(str, allowed))
        raise ValueError(
            f"values is {values.dtype} {list(values.shape)}; a non-empty {wanted} [N, Q], Q even, is expected"
        )
    rows, kept = values.shape
    inputs = 2 * kept if in_features is None else in_features
    if not 2 * kept - 4 < inputs <= 2 * kept:
        raise ValueError(f"in_features is {inputs}; {kept} values a row are for {2 * kept - 3} to {2 * kept} inputs")
    if bits == 4 and bool(((values < -8) | (values > 7)).any()):
        raise ValueError("values holds codes beyond -8..7, the range of 4 bits")
    if positions.dtype != torch.uint8 or positions.shape != values.shape:
        raise ValueError(
            f"positions is {positions.dtype} {list(positions.shape)}; torch.uint8 {list(values.shape)} is expected"
        )
    if positions.device != values.device:
        raise ValueError(f"positions is on {positions.device}, values on {values.device}")
    low, high = positions.view(rows, -1, 2).unbind(-1)
    if not bool(((low < high) & (high <= 3)).all()):
        raise ValueError("positions holds something else than two of 0..3 for each group of four, the lower first")
    if group_size == inputs:
        group_size = -1
    if not isinstance(group_size, int) or (group_size != -1 and (group_size < 32 or group_size % 32)):
        raise ValueError(f"group_size is {group_size}; a multiple of 32, -1, or all {inputs} inputs, is supported")
    _check_scale(scale, (rows, 1 if group_size == -1 else -(-inputs // group_size)), bits, values.device)
    if bits == 16 and group_size != -1:
        raise ValueError(f"group_size is {group_size}; values of 16 bits have no groups: -1")
    return inputs, group_size


def _check_scale(scale: Tensor | None, shape: tuple[int, int], bits: int, device: torch.device) -> None:
    if bits == 16:
        if scale is not None:
            raise ValueError("scale is given; values of 16 bits have none")
        return
    if scale is None or scale.dtype not in SCALE_DTYPES or scale.shape != shape:
        given = "None" if scale is None else f"{scale.dtype} {list(scale.shape)}"
        raise ValueError(f"scale is {given}; {' or '.join(map(str, SCALE_DTYPES))} {list(shape)} is expected")
    if scale.device != device:
        raise ValueError(f"scale is on {scale.device}, values on {device}")
