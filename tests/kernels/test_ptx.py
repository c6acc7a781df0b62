"""The assembly of every field, executed by a small emulator on every word there is: what a GPU would compute."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
import torch
from llmshrink_kernels.sparse24 import ptx as sparse
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


def prmt(a: Tensor, b: Tensor, selector: int) -> Tensor:
    """PTX: byte i of the result is the one of b:a that nibble i of the selector counts to."""
    both = a | b << 32
    return torch.stack([(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4)]).sum(0)


def execute(assembly: str, inputs: list[Tensor], results: int = 1) -> list[Tensor]:
    """$0, ... from the inputs, which are numbered after them; every instruction that isn't known is an error.

    A result takes over the register of an input (the compiler may do that): reading it afterwards would show.
    """
    registers = {f"${results + number}": value for number, value in enumerate(inputs)}

    def value(operand: str) -> Tensor:
        if operand in registers:
            return registers[operand]
        return torch.full_like(inputs[0], int(operand, 0))

    def write(to: str, result: Tensor) -> None:
        registers[to] = result
        if to in names:
            registers.update(dict.fromkeys((f"${results + number}" for number in range(len(inputs))), result))

    names = [f"${number}" for number in range(results)]
    for line in re.split(r"[;{}]", assembly):
        match line.replace(",", " ").split():
            case [] | [".reg", *_]:
                pass
            case ["mov.b32", to, source]:
                write(to, value(source))
            case ["shr.b32", to, source, count]:
                write(to, value(source) >> int(count))
            case ["and.b32", to, a, b]:
                write(to, value(a) & value(b))
            case ["mul.lo.u32", to, a, b]:
                write(to, value(a) * value(b) & 0xFFFFFFFF)
            case ["prmt.b32", to, a, b, selector]:
                write(to, prmt(value(a), value(b), int(selector, 0)))
            case ["lop3.b32", to, a, b, c, table]:
                write(to, lop3(value(a), value(b), value(c), int(table, 0)))
            case ["fma.rn.f16x2", to, a, b, c]:
                write(to, fma(value(a), value(b), value(c), torch.float16))
            case ["fma.rn.bf16x2", to, a, b, c]:
                write(to, fma(value(a), value(b), value(c), torch.bfloat16))
            case unknown:
                raise AssertionError(unknown)
    return [registers[name] for name in names]


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
            found = numbers(execute(text, inputs + given)[0], dtype)
            for planes, computed in zip((low_planes, high_planes), found, strict=True):
                code = sum((planes[plane] >> at & (1 << size) - 1) << part for plane, at, part, size in parts)
                assert torch.equal(computed, (code - (1 << (bits - 1)) - (zero or 0)).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_field_of_a_decompressed_word_becomes_its_code(bits: int, dtype: torch.dtype) -> None:
    words = torch.arange(1 << 16)
    others = words.flip(0) ^ 0x5A5A
    for field in range(16 // bits):
        text = sparse.number(bits, field, dtype == torch.float16)
        found = numbers(execute(text, [words | others << 16])[0], dtype)
        for word, computed in zip((words, others), found, strict=True):
            code = word >> bits * field & (1 << bits) - 1
            assert torch.equal(computed, (code - (code >> bits - 1 << bits)).double())


def masks_of(positions: tuple[int, int]) -> tuple[int, int, int]:
    """(M of the lower word, M of the upper, C): prepack.py's table."""
    first, second = positions
    return int(first == 0), int(1 in positions), int(second - first == 2)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_pattern_is_decompressed_in_every_field_of_every_plane(bits: int) -> None:
    """All pairs of values of a field (of 16 bits, some), while the other fields hold another pattern and value."""
    values = torch.arange(1 << 8) if bits == 4 else torch.randint(0, 1 << 2 * bits, (5000,))
    a, b = values & (1 << bits) - 1, values >> bits
    fields = 16 // bits
    for plane in range(bits // 2):
        text = sparse.decompress(bits, plane)
        for start, positions in enumerate(combinations(range(4), 2)):
            # Field f has the pattern that is f steps further on, and the values f further on.
            patterns = [list(combinations(range(4), 2))[(start + field) % 6] for field in range(fields)]
            low = high = torch.zeros_like(a)
            mask = [0, 0]
            for field, pattern in enumerate(patterns):
                pair = a.roll(field), b.roll(field)
                pair = pair[::-1] if pattern[0] == 1 else pair
                low, high = low | pair[0] << bits * field, high | pair[1] << bits * field
                *kept, clash = masks_of(pattern)
                for half in range(2):
                    mask[half] |= (kept[half] | clash << 1) << bits * field + 2 * plane
            # The mask's other bits belong to other planes: any.
            free = 0xFFFF ^ sum(3 << bits * field + 2 * plane for field in range(fields))
            noise = torch.randint(0, 1 << 16, a.shape) & free
            register = low | high << 16
            first, second = execute(text, [register, mask[0] | noise | (mask[1] | noise.flip(0)) << 16], 2)
            for field, pattern in enumerate(patterns):
                found = [
                    part >> shift + bits * field & (1 << bits) - 1 for part in (first, second) for shift in (0, 16)
                ]
                wanted = [torch.zeros_like(a) for _ in range(4)]
                wanted[pattern[0]], wanted[pattern[1]] = a.roll(field), b.roll(field)
                assert all(map(torch.equal, found, wanted)), positions
