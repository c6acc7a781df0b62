"""Y^T = W X^T with W 2:4 apart, stored compressed: decompressed in registers, multiplied densely.

A program owns BLOCK_N rows of W and BLOCK_M rows of x and walks along K a packet at a time (prepack.py draws it):

    words   planes of [BLOCK_N, SLAB / 2]: asynchronous copies, then straight into registers, as the dense kernel's are
    planes  one register of values and one of masks -> two registers of dense words (ptx.py), four slabs of 4 bits
    slabs   a field of each is the tensor cores' pair: inputs (0, 1) of a slab's groups against those rows of x, and
            inputs (2, 3) against theirs
    groups  at the end of one: accumulated += scale * partial

Half of what is multiplied is zero. At the few rows of x that this kernel is for the tensor cores have nothing better to
do: the bytes are what counts, 3.125 bits a weight against 4.125.

Three ways were compiled for sm_90 and counted: thread-instructions of the main loop for each weight (zeros too) of 4
bits with scales for 128 inputs. Reading 3.125 bits a weight at 4.3 TB/s leaves 2.7 to 3.0 (3.9 to 4.3 at 3.0 TB/s).
NOT YET TIMED ON A GPU.

                                        16 rows of x                  64 rows of x
    `where` on every weight             7.6
    this one                            2.7 (fp16), 3.0 (bf16)        3.7, 4.0
    mma.sp m16n8k32, by Gluon           1.4 (bf16)                    3.2, with 255 registers and spills
    this one, scales for 64 inputs      3.4 (bf16): more than 4.3 TB/s leave

So mma.sp issues half as much for a few rows. This kernel is kept all the same: it is inside of what the bandwidth
leaves, where fewer instructions buy no time; its tensor core instructions are those of the target (wgmma, tcgen05)
for up to 511 rows, while mma.sp is an mma.sync whose x operand every warp fetches for itself; and every step of it
runs without a GPU, in the interpreter or the assembly's emulator, while Gluon has no interpreter and the fragments
of mma.sp would be right on paper only. A device that shows this one bound by its instructions is the reason to change.

ASM is False where there is no PTX (the interpreter, other vendors); WIDE makes arithmetic and dots float32, since the
interpreter computes bfloat16 wrongly without saying so. With SPLIT_K > 1 packets are shared among programs, and each
writes its own slice of `out` in float32, which the dense kernel's `add_splits` adds in a fixed order.
"""

from __future__ import annotations

import triton.language as tl

from llmshrink_kernels.device import jit
from llmshrink_kernels.sparse24.ptx import decompress, every, number
from llmshrink_kernels.wna16.kernel import of_groups


@jit
def spread(mask, BIT: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A mask over whole fields from bit BIT of each; int32, 16 bits used."""
    return ((mask >> BIT) & (every(BITS) & 0xFFFF)) * ((1 << BITS) - 1)


@jit
def decompressed(word, mask, BITS: tl.constexpr, PLANE: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Dense words of inputs (0, 1) and (2, 3). word, mask: int16 [rows, SLAB / 2]; so are both results."""
    if ASM:
        text: tl.constexpr = decompress(BITS, PLANE)
        return tl.inline_asm_elementwise(text, "=r,=r,r,r", (word, mask), (tl.int16, tl.int16), is_pure=True, pack=2)
    low, high = tl.split(word.to(tl.int32).reshape(word.shape[0], word.shape[1] // 2, 2))
    mask0, mask1 = tl.split(mask.to(tl.int32).reshape(word.shape[0], word.shape[1] // 2, 2))
    kept0 = spread(mask0, 2 * PLANE, BITS)
    kept1 = spread(mask1, 2 * PLANE, BITS)
    swap0 = spread(mask0, 2 * PLANE + 1, BITS)
    swap1 = spread(mask1, 2 * PLANE + 1, BITS)
    first = tl.join(low & kept0, high & kept1)
    second = tl.join(
        ((swap0 & high) | (~swap0 & low)) & ~(kept0 ^ swap0), ((swap1 & low) | (~swap1 & high)) & ~(kept1 ^ swap1)
    )
    return first.reshape(word.shape).to(tl.int16), second.reshape(word.shape).to(tl.int16)


@jit
def numbers(word, BITS: tl.constexpr, FIELD: tl.constexpr, BFLOAT: tl.constexpr, ASM: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Field FIELD of dense words as numbers: bf16 if BFLOAT, else fp16; or float32 if WIDE."""
    like = tl.zeros((1,), tl.bfloat16 if BFLOAT else tl.float16)
    if BITS == 16:
        if WIDE and BFLOAT:
            return (word.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        elif WIDE:
            return word.to(tl.float16, bitcast=True).to(tl.float32)
        else:
            return word.to(like.dtype, bitcast=True)
    elif ASM:
        text: tl.constexpr = number(BITS, FIELD, not BFLOAT)
        return tl.inline_asm_elementwise(text, "=r,r", (word,), like.dtype, is_pure=True, pack=2)
    else:
        code = (((word.to(tl.int32) >> (FIELD * BITS)) & ((1 << BITS) - 1)) ^ (1 << (BITS - 1))) - (1 << (BITS - 1))
        return code.to(tl.float32) if WIDE else code.to(tl.float32).to(like.dtype)


@jit
def matmul(  # type: ignore[no-untyped-def]
    x,  # [rows, padded K]
    words,  # int16 [packets, planes + 1, padded N, SLAB / 2]
    scales,  # [groups, padded N], or None
    out,  # [rows, N] in x's dtype, or float32 [SPLIT_K, rows, N]
    rows,
    columns,
    padded_out,
    padded_in,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # 0: one group a row, or none
    SLAB: tl.constexpr,
    BFLOAT: tl.constexpr,  # whether x is bf16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ASM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of Y, or of one split's share of it."""
    PLANES: tl.constexpr = BITS // 2
    FIELDS: tl.constexpr = 16 // BITS
    PACKET: tl.constexpr = 8 * SLAB
    SPAN: tl.constexpr = PACKET if GROUP == 0 else GROUP
    # Neighbouring programs share a tile of W, which then comes from memory once.
    tiles_m = tl.cdiv(rows, BLOCK_M)
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    packets = padded_in // PACKET
    share = tl.cdiv(packets, SPLIT_K)
    start = split * share
    stop = tl.minimum(start + share, packets)

    inside = (m < rows)[None, :]
    word = tl.arange(0, SLAB // 2)
    # Words 2j, 2j + 1 are inputs 4j, 4j + 1 of a slab (then 4j + 2, 4j + 3).
    k = word // 2 * 4 + word % 2
    plane = padded_out * (SLAB // 2)
    word_tile = words + start.to(tl.int64) * (PLANES + 1) * plane + n[:, None] * (SLAB // 2) + word[None, :]
    x_tile = x + start.to(tl.int64) * PACKET + m.to(tl.int64)[None, :] * padded_in + k[:, None]
    group_tile = n + start * (PACKET // SPAN) * padded_out
    accumulated = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in tl.range(start, stop):
        partial = accumulated if GROUP == 0 else tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if GROUP != 0:
            scale = of_groups(scales, group_tile, padded_out, PACKET // SPAN)
        mask = tl.load(word_tile + PLANES * plane)
        for slab in tl.static_range(8):
            if slab % FIELDS == 0:
                word_plane = tl.load(word_tile + slab // FIELDS * plane)
                first, second = decompressed(word_plane, mask, BITS, slab // FIELDS, ASM)
            x01 = tl.load(x_tile + slab * SLAB, mask=inside, other=0.0)
            x23 = tl.load(x_tile + slab * SLAB + 2, mask=inside, other=0.0)
            w01 = numbers(first, BITS, slab % FIELDS, BFLOAT, ASM, WIDE)
            w23 = numbers(second, BITS, slab % FIELDS, BFLOAT, ASM, WIDE)
            if WIDE:
                x01 = x01.to(tl.float32)
                x23 = x23.to(tl.float32)
            partial = tl.dot(w01, x01, partial, input_precision="ieee")
            partial = tl.dot(w23, x23, partial, input_precision="ieee")
            if GROUP != 0 and (slab + 1) * SLAB % SPAN == 0:
                accumulated += partial * scale[slab * SLAB // SPAN].to(tl.float32)[:, None]
                partial = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if GROUP == 0:
            accumulated = partial
        x_tile += PACKET
        word_tile += (PLANES + 1) * plane
        group_tile += PACKET // SPAN * padded_out
    if GROUP == 0 and scales is not None:
        accumulated *= tl.load(scales + n).to(tl.float32)[:, None]
    place = (split.to(tl.int64) * rows + m.to(tl.int64))[None, :] * columns + n[:, None]
    tl.store(out + place, accumulated.to(out.dtype.element_ty), mask=inside & (n < columns)[:, None])


@jit
def dequantize(  # type: ignore[no-untyped-def]
    words,
    scales,
    out,  # [rows, columns]
    first_row,
    rows,
    columns,
    padded_out,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # 0: one group a row, or none
    SLAB: tl.constexpr,
    BFLOAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """W itself, rounded once: rows from `first_row` on, a packet of inputs for each program along the second axis."""
    PLANES: tl.constexpr = BITS // 2
    FIELDS: tl.constexpr = 16 // BITS
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None]
    n = first_row + row
    packet = tl.program_id(1)
    word = tl.arange(0, SLAB // 2)
    k = word // 2 * 4 + word % 2
    plane = padded_out * (SLAB // 2)
    tile = words + packet.to(tl.int64) * ((PLANES + 1) * plane) + n[:, None] * (SLAB // 2) + word[None, :]
    line = out + row.to(tl.int64)[:, None] * columns
    mask = tl.load(tile + PLANES * plane, mask=inside, other=0)
    for p in tl.static_range(PLANES):
        first, second = decompressed(tl.load(tile + p * plane, mask=inside, other=0), mask, BITS, p, ASM)
        for field in tl.static_range(FIELDS):
            column = packet * (8 * SLAB) + (p * FIELDS + field) * SLAB + k
            w01 = numbers(first, BITS, field, BFLOAT, ASM, WIDE)
            w23 = numbers(second, BITS, field, BFLOAT, ASM, WIDE)
            if scales is not None:
                group = 0 if GROUP == 0 else (packet * 8 + p * FIELDS + field) * SLAB // GROUP
                scale = tl.load(scales + group * padded_out + n, mask=row < rows, other=0.0).to(tl.float32)[:, None]
                w01 = (w01.to(tl.float32) * scale).to(out.dtype.element_ty)
                w23 = (w23.to(tl.float32) * scale).to(out.dtype.element_ty)
            tl.store(line + column[None, :], w01, mask=inside & (column < columns)[None, :])
            tl.store(line + column[None, :] + 2, w23, mask=inside & (column + 2 < columns)[None, :])
