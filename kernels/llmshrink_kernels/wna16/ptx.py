"""How a field becomes a number: the inline assembly of one field for a pair of weights, written by plain Python.

A register holds two words, of weights k and k+1 in the same row. Both dtypes can do this without a conversion:

    1. shift right, where the field lies too high for the mantissa (the compiler shares equal shifts),
    2. one `lop3`: keep the field's bits and set the exponent's: (word & mask) | magic. With magic 0x6400 that is the
       fp16 number 1024 + c * 2**p for a field whose lowest bit is bit p; with 0x4300 the bf16 number 128 + c * 2**p;
    3. one fused multiply-add, exact: times 2**-p, plus -(1024 * 2**-p + 2**(b-1) + zero-point).

So a mantissa of 10 bits (fp16) reaches two 4-bit fields without a shift, one of 7 bits (bf16) only one. What varies
from row to row, the zero-point, is the multiply-add's third operand: asymmetric weights cost next to nothing. Two kinds
of field need more than one `lop3`:

    field 15 of 3 bits    one bit from the top of each of three registers
    8 bits as bf16        seven bits beside magic, and what is subtracted is 128 or 256 by the eighth: magic's own
                          exponent ends at that bit, so -(128 or 256) is 0xC300 | (not word & 0x80)

All of this runs while a kernel is compiled: `constexpr_function` makes Triton's cache watch the source of it too.
Shifting a register moves bits of the upper word into the top of the lower one; every mask keeps below them.
"""

from __future__ import annotations

import math

from llmshrink_kernels.device import constexpr_function

AND_OR = 0xEA
"""`lop3`'s table for (a & b) | c."""
NOT_AND_OR = 0xAE
"""`lop3`'s table for (~a & b) | c."""


@constexpr_function
def bias(bits: int, field: int, half: bool) -> float:
    """What is added to a field's number, after the multiplication, to make it the code: exact in both dtypes.

    The kernel subtracts the row's zero-point from it where there is one.
    """
    if bits == 8 and not half:
        return 0.0
    unit = 1024.0 if half else 128.0
    return -(unit / 2.0 ** (lowest(bits, field) - shift(bits, field, half)) + 2.0 ** (bits - 1))


@constexpr_function
def constraints(bits: int, field: int, asymmetric: bool) -> str:
    """The assembly's registers: the result, the words, and (asymmetric) the bias."""
    return "=r" + ",r" * ((3 if bits == 3 and field == 15 else 1) + asymmetric)


@constexpr_function
def assembly(bits: int, field: int, half: bool, asymmetric: bool) -> str:
    """$0: two numbers, fp16 (`half`) or bf16, from registers $1... of words; then the pair's bias, when asymmetric."""
    if bits == 8 and not half:
        body = eight_as_bf16(field, asymmetric)
    elif bits == 3 and field == 15:
        body = sixteenth(half, asymmetric)
    else:
        right = shift(bits, field, half)
        position = lowest(bits, field) - right
        mask = both(((1 << bits) - 1) << position)
        body = f"shr.b32 t, $1, {right}; lop3.b32 t, t, {mask:#x}, {magic(half):#x}, {AND_OR};"
        body += scaled(2.0**-position, bias(bits, field, half), half, "$2" if asymmetric else "")
    return "{ .reg .b32 t, m, a; " + body + " }"


@constexpr_function
def eight_as_bf16(field: int, asymmetric: bool) -> str:
    """128 + the low seven bits, less 128 or 256, less (asymmetric) the zero-point: the bias is only that here."""
    one = both(encoded(1.0, False))
    body = f"shr.b32 t, $1, {field * 8}; mov.b32 m, {one:#x};"
    body += f"lop3.b32 a, t, {both(0x80):#x}, {both(0xC300):#x}, {NOT_AND_OR};"
    body += f"lop3.b32 t, t, {both(0x7F):#x}, {both(0x4300):#x}, {AND_OR};"
    if asymmetric:
        return body + "fma.rn.bf16x2 t, t, m, a; fma.rn.bf16x2 $0, t, m, $2;"
    return body + "fma.rn.bf16x2 $0, t, m, a;"


@constexpr_function
def sixteenth(half: bool, asymmetric: bool) -> str:
    """Field 15 of three bits: the top bits of three words."""
    body = f"shr.b32 t, $1, 15; lop3.b32 t, t, {both(1):#x}, {magic(half):#x}, {AND_OR};"
    body += f"shr.b32 a, $2, 14; lop3.b32 t, a, {both(2):#x}, t, {AND_OR};"
    body += f"shr.b32 a, $3, 13; lop3.b32 t, a, {both(4):#x}, t, {AND_OR};"
    return body + scaled(1.0, bias(3, 15, half), half, "$4" if asymmetric else "")


@constexpr_function
def scaled(factor: float, added: float, half: bool, given: str) -> str:
    """$0 = t * factor + added, or + the register `given`."""
    body = f"mov.b32 m, {both(encoded(factor, half)):#x};"
    if not given:
        body += f"mov.b32 a, {both(encoded(added, half)):#x};"
    return body + f"fma.rn.{'f16x2' if half else 'bf16x2'} $0, t, m, {given if given else 'a'};"


@constexpr_function
def lowest(bits: int, field: int) -> int:
    """The field's lowest bit in its word (prepack.py draws it); 0 for the one that is gathered from three words."""
    if bits == 3:
        return field % 5 * 3 if field < 15 else 0
    return field * bits


@constexpr_function
def shift(bits: int, field: int, half: bool) -> int:
    """How far right a field has to go to lie under the mantissa; fields of one window share it."""
    window = (10 if half else 7) // bits * bits
    return lowest(bits, field) // window * window


@constexpr_function
def magic(half: bool) -> int:
    """1024 in fp16 or 128 in bf16, whose last mantissa bit is worth one, in both halves of a register."""
    return both(0x6400 if half else 0x4300)


@constexpr_function
def both(value: int) -> int:
    """The same 16 bits in both halves of a register."""
    return value << 16 | value


@constexpr_function
def encoded(value: float, half: bool) -> int:
    """The 16 bits of a number that fp16 or bf16 holds exactly (normal, not zero)."""
    mantissa, exponent = math.frexp(abs(value))
    width, offset = (10, 15) if half else (7, 127)
    return (value < 0) << 15 | (exponent - 1 + offset) << width | int((2 * mantissa - 1) * 2**width)
