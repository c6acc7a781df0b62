"""2:4 sparse weights as they are stored: kept values and where they stood, bit by bit. No kernel's shuffle is in here.

Of every four consecutive inputs of a row two are kept; the others are zero. For group q of a row (inputs 4q to 4q + 3)

    values[2q], values[2q + 1]           what is kept, in the order of the inputs
    positions[2q] < positions[2q + 1]    where in the group, 0 to 3

A group with fewer than two weights that aren't zero keeps zeros at the lowest free positions, so that a weight has
exactly one form. Where K isn't a multiple of four, the last group is filled up with inputs that are zero: there are
Q = 2 ceil(K / 4) values and positions. Packed:

    positions   byte b of a row holds groups 2b and 2b + 1:   bit  7 6 | 5 4 | 3 2 | 1 0
                                                                   p3  | p2  | p1  | p0    (positions 4b to 4b + 3)
                With an odd number of groups the upper half of the last byte is zero. Read as little-endian words of 16
                or 32 bits this is the order of the hardware's `mma.sp` metadata.
    4 bits      byte b of a row: value 2b in bits 3..0, value 2b + 1 in bits 7..4, each in two's complement
    8 bits      int8. 16 bits: fp16 or bf16.

That is 4/2 + 1 = 3 bits a weight for 4-bit values (3.125 with fp16 scales for each 128 inputs), 5 for 8, 9 for 16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Take a weight that is 2:4 apart: [N, K] of any dtype -> values [N, Q], positions uint8 [N, Q].

    Raises ValueError where four inputs hold more than two weights that aren't zero.
    """
    rows, inputs = weight.shape
    groups = pad(weight, (0, -inputs % 4)).view(rows, -1, 4)
    full = groups != 0
    crowded = full.sum(-1) > 2
    if bool(crowded.any()):
        row, group = crowded.nonzero()[0].tolist()
        raise ValueError(
            f"weight is not 2:4: row {row} holds more than two weights at inputs {4 * group} to {4 * group + 3}"
        )
    # Weights that aren't zero first, then free positions, each in their order; then the two that are kept in order.
    first = torch.arange(4, device=weight.device) + torch.where(full, 0, 4)
    positions = first.argsort(-1)[..., :2].sort(-1).values
    values = groups.gather(-1, positions)
    return values.reshape(rows, -1), positions.reshape(rows, -1).to(torch.uint8)


def expand(values: Tensor, positions: Tensor, inputs: int) -> Tensor:
    """The inverse: [N, Q] twice -> [N, K], zeros where nothing was kept. inputs: K."""
    rows, kept = values.shape
    dense = values.new_zeros(rows, kept // 2, 4)
    dense.scatter_(-1, positions.reshape(rows, -1, 2).long(), values.reshape(rows, -1, 2))
    return dense.view(rows, 2 * kept)[:, :inputs]


def pack_positions(positions: Tensor) -> Tensor:
    """uint8 [N, Q], 0 to 3 -> uint8 [N, ceil(Q / 4)]."""
    quads = pad(positions, (0, -positions.shape[1] % 4)).view(positions.shape[0], -1, 4)
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def unpack_positions(packed: Tensor, kept: int) -> Tensor:
    """The inverse: uint8 [N, ceil(Q / 4)] -> uint8 [N, Q]. kept: Q."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 3).view(packed.shape[0], -1)[:, :kept]


def pack_nibbles(values: Tensor) -> Tensor:
    """int8 [N, Q], -8 to 7 -> uint8 [N, Q / 2]."""
    pairs = values.view(torch.uint8).view(values.shape[0], -1, 2) & 15
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse: uint8 [N, Q / 2] -> int8 [N, Q]."""
    pairs = torch.stack([packed << 4, packed & 0xF0], dim=-1).view(packed.shape[0], -1)
    return pairs.view(torch.int8) >> 4
