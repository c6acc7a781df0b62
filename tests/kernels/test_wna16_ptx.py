"""The assembly of every field, executed by a small emulator on every word there is: what a GPU would compute."""

from __future__ import annotations

import re

import pytest
import torch
from llmshrink_kernels.wna16 import ptx
from llmshrink_kernels.wna16.prepack import fields, places
from torch import Tensor

BOTH = 0x10001


def lop3(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
    """PTX: bit by bit, the table's entry 4a + 2b + c."""
    result = torch.zeros_like(a)
    for entry in range(8):
        if table >> entry & 1:
            picked = [value if entry & bit else ~value for value, bit in ((a, 4), (b, 2), (c, 1))]
            result |= picked[0] & picked[1] & picked[2]
    return result & 0xFFFFFFFF


def fma(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """Both halves of the registers: float64 holds the exact product and sum, which are rounded once."""

    def half(value: Tensor, low: int) -> Tensor:
        bits = (value >> low & 0xFFFF).to(torch.int32)
        return (bits - ((bits >> 15) << 16)).to(torch.int16).view(dtype).double()

    sums = [(half(a, low) * half(b, low) + half(c, low)).to(dtype).view(torch.int16).long() & 0xFFFF for low in (0, 16)]
    return sums[0] | sums[1] << 16


def execute(assembly: str, inputs: list[Tensor]) -> Tensor:
    """$0, from $1, ...; every instruction that isn't known is an error."""
    registers = {f"${number + 1}": value for number, value in enumerate(inputs)}

    def value(operand: str) -> Tensor:
        if operand in registers:
            return registers[operand]
        return torch.full_like(inputs[0], int(operand, 0))

    for line in re.split(r"[;{}]", assembly):
        match line.replace(",", " ").split():
            case [] | [".reg", *_]:
                pass
            case ["mov.b32", to, source]:
                registers[to] = value(source)
            case ["shr.b32", to, source, count]:
                registers[to] = value(source) >> int(count)
            case ["lop3.b32", to, a, b, c, table]:
                registers[to] = lop3(value(a), value(b), value(c), int(table, 0))
            case ["fma.rn.f16x2", to, a, b, c]:
                registers[to] = fma(value(a), value(b), value(c), torch.float16)
            case ["fma.rn.bf16x2", to, a, b, c]:
                registers[to] = fma(value(a), value(b), value(c), torch.bfloat16)
            case unknown:
                raise AssertionError(unknown)
    return registers["$0"]


def numbers(register: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    parts = [(register >> low & 0xFFFF).to(torch.int32) for low in (0, 16)]
    low, high = ((part - ((part >> 15) << 16)).to(torch.int16).view(dtype).double() for part in parts)
    return low, high


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_field_of_every_word_becomes_its_number(bits: int, dtype: torch.dtype) -> None:
    half = dtype == torch.float16
    words = torch.arange(1 << 16)
    # The upper word of a register is another one, which must not leak into the lower, nor the lower into the upper.
    others = words.flip(0) ^ 0x5A5A
    low_planes, high_planes = [words, others, words ^ 0x3C3C], [others, words, others ^ 0x0F0F]
    registers = [low | high << 16 for low, high in zip(low_planes, high_planes, strict=True)]
    for field in range(fields(bits)):
        parts = places(bits, field)
        inputs = registers if len(parts) == 3 else [registers[parts[0][0]]]
        for zero in (None, -(1 << (bits - 1)), -1, 0, (1 << (bits - 1)) - 1):
            given = []
            if zero is not None:
                added = torch.tensor([ptx.bias(bits, field, half) - zero]).to(dtype)
                assert added.double().item() == ptx.bias(bits, field, half) - zero
                given = [torch.full_like(words, (added.view(torch.int16).item() & 0xFFFF) * BOTH)]
            text = ptx.assembly(bits, field, half, zero is not None)
            assert ptx.constraints(bits, field, zero is not None).count("r") == 1 + len(inputs) + len(given)
            found = numbers(execute(text, inputs + given), dtype)
            for planes, computed in zip((low_planes, high_planes), found, strict=True):
                code = sum((planes[plane] >> at & (1 << size) - 1) << part for plane, at, part, size in parts)
                assert torch.equal(computed, (code - (1 << (bits - 1)) - (zero or 0)).double())
