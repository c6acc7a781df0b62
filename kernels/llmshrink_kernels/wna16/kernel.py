"""Y^T = W X^T with packed W: words go from memory to the tensor cores' register operand without a shuffle.

A program owns BLOCK_N rows of W (the instruction's tall side, 64 a warp group on Hopper) and BLOCK_M rows of x, and
walks along K in steps of BLOCK_K, whole packets and whole groups (prepack.py draws both). In a step:

    words   one tile [BLOCK_N, SLAB] for each packet and plane: asynchronous copies, then straight into registers
    x       one tile [SLAB, BLOCK_M] for each slab: asynchronous copies into shared memory, where wgmma reads it
    slabs   a field of the words is the pair (k, k+1) in place; ptx.py makes numbers of it; one dot into `partial`
    groups  at a group's last slab: accumulated += scale * partial, so that weights are multiplied as integers,
            exactly, and a scale costs one multiply-add for each output instead of one for each weight

Scales are a register or two a thread, too small for an asynchronous copy: each is loaded a group ahead of its use.

Bytes: each word once, each scale once, x once for every BLOCK_N outputs (from the L2). Instructions: 4.3 TB/s leave
3.6 to 4.0 a thread and 4-bit weight (and in proportion for others); benchmarks/facts.py counts what the compiler made.

With SPLIT_K > 1 the steps are shared among programs along the grid's second axis; each writes its own slice of
`out` in float32 and `add_splits` adds them in a fixed order, so that a result doesn't depend on who came first.

ASM is False where there is no PTX (the interpreter, other vendors): the fields then become numbers by ordinary
arithmetic. WIDE makes that arithmetic, and the dots, float32: the interpreter computes bfloat16 wrongly, and doesn't
say so.
"""

from __future__ import annotations

import triton.language as tl

from llmshrink_kernels.device import jit
from llmshrink_kernels.wna16.ptx import assembly, bias, constraints, lowest


@jit
def weights(low, middle, high, zero, like, BITS: tl.constexpr, FIELD: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes less zero-points of one field, as numbers of the dtype of `like`.

    low, middle, high: int16 word tiles of the packet's planes (three bits have three planes; else all are the same).
    zero: int8 [rows], or None. ASM needs fp16 or bf16.
    """
    third: tl.constexpr = FIELD // 5 if BITS == 3 else 0
    gathered: tl.constexpr = BITS == 3 and FIELD == 15
    word = low if third == 0 else (middle if third == 1 else high)
    if ASM:
        half: tl.constexpr = like.dtype == tl.float16
        asymmetric: tl.constexpr = zero is not None
        text: tl.constexpr = assembly(BITS, FIELD, half, asymmetric)
        registers: tl.constexpr = constraints(BITS, FIELD, asymmetric)
        words: tl.tuple = (low, middle, high) if gathered else (word,)
        if asymmetric:
            words += ((bias(BITS, FIELD, half) - zero.to(tl.float32)).to(like.dtype)[:, None],)
        return tl.inline_asm_elementwise(text, registers, words, like.dtype, is_pure=True, pack=2)
    if gathered:
        code = ((low >> 15) & 1) | ((middle >> 14) & 2) | ((high >> 13) & 4)
    else:
        code = (word >> lowest(BITS, FIELD)) & ((1 << BITS) - 1)
    value = code.to(tl.float32) - (1 << (BITS - 1))
    if zero is not None:
        value -= zero.to(tl.float32)[:, None]
    return value.to(like.dtype)


@jit
def of_groups(small, at, stride, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scales or zero-points of COUNT groups that follow each other, as a tuple."""
    loaded: tl.tuple = ()
    for group in tl.static_range(COUNT):
        loaded += (tl.load(small + at + group * stride),)
    return loaded


@jit
def matmul(  # type: ignore[no-untyped-def]
    x,  # [rows, padded K]
    words,  # int16 [packets * planes, padded N, SLAB]
    scales,  # [groups, padded N]
    zeros,  # int8, as scales, or None
    out,  # [rows, N] in x's dtype, or float32 [SPLIT_K, rows, N]
    rows,
    columns,
    padded_out,
    padded_in,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # 0: one group a row
    SLAB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ASM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of Y, or of one split's share of it."""
    FIELDS: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    PACKETS: tl.constexpr = BLOCK_K // (FIELDS * SLAB)
    SPAN: tl.constexpr = BLOCK_K if GROUP == 0 else GROUP
    GROUPS: tl.constexpr = 0 if GROUP == 0 else BLOCK_K // GROUP
    # Neighbouring programs share a tile of W, which then comes from memory once.
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m
    tile_n = tl.program_id(0) // tiles_m
    split = tl.program_id(1)
    steps = padded_in // BLOCK_K
    share = tl.cdiv(steps, SPLIT_K)
    first = split * share
    last = tl.minimum(first + share, steps)

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, SLAB)
    inside = (m < rows)[None, :]
    x_tile = x + first.to(tl.int64) * BLOCK_K + m.to(tl.int64)[None, :] * padded_in + k[:, None]
    plane = padded_out * SLAB
    word_tile = words + first.to(tl.int64) * (PACKETS * PLANES * plane) + n[:, None] * SLAB + k[None, :]
    group_tile = n + first * GROUPS * padded_out
    if GROUP == 0:
        scale = of_groups(scales, n, padded_out, 1)
        zero: tl.tuple = None if zeros is None else of_groups(zeros, n, padded_out, 1)
    accumulated = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in tl.range(first, last):
        partial = accumulated if GROUP == 0 else tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if GROUP != 0:
            scale = of_groups(scales, group_tile, padded_out, GROUPS)
            zero = None if zeros is None else of_groups(zeros, group_tile, padded_out, GROUPS)
        for slab in tl.static_range(PACKETS * FIELDS):
            if slab % FIELDS == 0:
                low = tl.load(word_tile + slab // FIELDS * PLANES * plane)
                middle = tl.load(word_tile + (slab // FIELDS * PLANES + 1) * plane) if PLANES == 3 else low
                high = tl.load(word_tile + (slab // FIELDS * PLANES + 2) * plane) if PLANES == 3 else low
            values = tl.load(x_tile + slab * SLAB, mask=inside, other=0.0)
            if WIDE:
                values = values.to(tl.float32)
            offset = None if zeros is None else zero[slab * SLAB // SPAN]
            numbers = weights(low, middle, high, offset, values, BITS, slab % FIELDS, ASM)
            partial = tl.dot(numbers, values, partial, input_precision="ieee")
            if GROUP != 0 and (slab + 1) * SLAB % SPAN == 0:
                accumulated += partial * scale[slab * SLAB // SPAN].to(tl.float32)[:, None]
                partial = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if GROUP == 0:
            accumulated = partial
        x_tile += BLOCK_K
        word_tile += PACKETS * PLANES * plane
        group_tile += GROUPS * padded_out
    if GROUP == 0:
        accumulated *= scale[0].to(tl.float32)[:, None]
    place = (split.to(tl.int64) * rows + m.to(tl.int64))[None, :] * columns + n[:, None]
    tl.store(out + place, accumulated.to(out.dtype.element_ty), mask=inside & (n < columns)[:, None])


@jit
def add_splits(parts, out, size, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[i] = parts[0, i] + parts[1, i] + ..., in that order. parts: float32 [SPLIT_K, size]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.load(parts + i, mask=inside)
    for split in tl.static_range(1, SPLIT_K):
        total += tl.load(parts + split * tl.cast(size, tl.int64) + i, mask=inside)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=inside)


@jit
def dequantize(  # type: ignore[no-untyped-def]
    words,
    scales,
    zeros,
    out,  # [rows, columns]
    first_row,
    first_packet,
    rows,
    columns,
    padded_out,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # 0: one group a row
    SLAB: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASM: tl.constexpr,
):
    """W itself, rounded once: a block of it, from `first_row` and `first_packet` on."""
    FIELDS: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    n = first_row + row
    k = tl.arange(0, SLAB)
    packet = tl.program_id(1)
    plane = padded_out * SLAB
    tile = words + (first_packet + packet).to(tl.int64) * (PLANES * plane) + n[:, None] * SLAB + k[None, :]
    low = tl.load(tile, mask=inside[:, None], other=0)
    middle = tl.load(tile + plane, mask=inside[:, None], other=0) if PLANES == 3 else low
    high = tl.load(tile + 2 * plane, mask=inside[:, None], other=0) if PLANES == 3 else low
    line = out + row.to(tl.int64)[:, None] * columns
    like = tl.zeros((1,), out.dtype.element_ty)
    for field in tl.static_range(FIELDS):
        column = (packet * FIELDS + field) * SLAB + k
        group = 0 if GROUP == 0 else ((first_packet + packet) * FIELDS + field) * SLAB // GROUP
        scale = tl.load(scales + group * padded_out + n, mask=inside, other=0.0).to(tl.float32)
        offset = None if zeros is None else tl.load(zeros + group * padded_out + n, mask=inside, other=0)
        numbers = weights(low, middle, high, offset, like, BITS, field, ASM)
        value = (numbers.to(tl.float32) * scale[:, None]).to(out.dtype.element_ty)
        tl.store(line + column[None, :], value, mask=inside[:, None] & (column < columns)[None, :])
