"""The inline assembly of 2:4 decompression, written by plain Python while a kernel is compiled.

Two steps, of a register (two words) each; prepack.py draws what the words hold.

    decompress    (lo, hi) and a mask register -> the register of inputs (0, 1) and that of inputs (2, 3), every field
                  at once: 8 instructions, and a shift for each mask that isn't at bit 0, whatever the width; with 4
                  bits those are 16 weights. M, C are masks over fields, M of input 0 (low half) and input 1 (high):
                      M, C = ((mask >> u) & 0x1111_1111) * 15
                      first  = (lo, hi) & M
                      second = (C ? (hi, lo) : (lo, hi)) & ~(M ^ C)
    number        a field of such a register, a pair of two's complement codes, as a pair of fp16 or bf16: its top bit
                  is flipped by the same `lop3` that sets magic's exponent, and the multiply-add takes both away again.
                  So what was not kept, all zero bits, comes out as zero.
"""

from __future__ import annotations

from llmshrink_kernels.device import constexpr_function
from llmshrink_kernels.wna16.ptx import AND_OR, both, encoded, magic, scaled

SELECT = 0xCA
"""`lop3`'s table for a ? b : c."""
AND_SAME = 0x90
"""`lop3`'s table for a & ~(b ^ c)."""
AND_XOR = 0x6A
"""`lop3`'s table for (a & b) ^ c."""


@constexpr_function
def every(bits: int) -> int:
    """The lowest bit of each field of a register."""
    return {4: 0x11111111, 8: 0x01010101, 16: 0x00010001}[bits]


@constexpr_function
def decompress(bits: int, plane: int) -> str:
    """$0, $1: inputs (0, 1) and (2, 3), from $2: values, and $3: masks."""
    body = ""
    for name, bit in (("m", 2 * plane), ("c", 2 * plane + 1)):
        source = "$3"
        if bit:
            body += f"shr.b32 {name}, $3, {bit};"
            source = name
        body += f"and.b32 {name}, {source}, {every(bits):#x}; mul.lo.u32 {name}, {name}, {(1 << bits) - 1};"
    body += f"prmt.b32 s, $2, $2, 0x1032; lop3.b32 s, c, s, $2, {SELECT:#x};"
    # A result may be given an input's register: none is written before the last input was read.
    body += f"lop3.b32 s, s, m, c, {AND_SAME:#x}; and.b32 $0, $2, m; mov.b32 $1, s;"
    return "{ .reg .b32 s, m, c; " + body + " }"


@constexpr_function
def number(bits: int, field: int, half: bool) -> str:
    """$0: a pair of fp16 (`half`) or bf16 numbers, from field `field` of $1."""
    low = field * bits
    if bits == 8 and not half:
        # Seven bits beside magic; what is subtracted is 128, or 256 where the eighth is set.
        body = f"shr.b32 t, $1, {low}; mov.b32 m, {both(encoded(1.0, False)):#x};"
        body += f"lop3.b32 a, t, {both(0x80):#x}, {both(0xC300):#x}, {AND_OR:#x};"
        body += f"lop3.b32 t, t, {both(0x7F):#x}, {both(0x4300):#x}, {AND_OR:#x}; fma.rn.bf16x2 $0, t, m, a;"
    else:
        window = (10 if half else 7) // bits * bits
        right = low // window * window
        position, top = low - right, 1 << (bits - 1)
        flip = magic(half) ^ both(top << position)
        body = (
            f"shr.b32 t, $1, {right}; lop3.b32 t, t, {both(((1 << bits) - 1) << position):#x}, {flip:#x}, {AND_XOR:#x};"
        )
        body += scaled(2.0**-position, -((1024 if half else 128) / 2**position + top), half, "")
    return "{ .reg .b32 t, m, a; " + body + " }"
