"""Four and eight bits on a CPU: torch's own int4 product, which reads the packed weight and never makes it whole.

`aten::_weight_int4pack_mm_for_cpu` multiplies bfloat16 rows by nibbles q (unsigned) that it scales on the way into the
vector registers, w = (q - 8) * scale + zero, sums in float32 and rounds once. It takes float32 and float16 rows too,
but through a loop without vector instructions, some forty times slower: those go by blocks (`wna16.dequantize`).

Its layout depends on the processor (rows in blocks of 64 with AVX-512, else 32), so it is for memory only: `pack` makes
it of the kernels' layout, `unpack` is the exact inverse and finds the order by packing a matrix of numbered nibbles.

The operator wants scale and zero in bfloat16, and zero = -scale * zero_point doesn't fit there: twelve bits, of which
eight are kept. What is left fits again, and is added as (sums of x over groups) times (remainders), 1/group_size of the
work, so that asymmetric weights are as exact as symmetric ones.

Eight bits are two nibbles, 16 * upper + lower: two weights under each other, one call, and a sum.

For prefills of many rows the weight is brought back a block at a time and multiplied densely: in bfloat16 where this
CPU has dense products in it, else in float32.

With AVX2 alone (2048 x 2048, group 64, one core, bfloat16) the operator takes .44 ms of CPU at one row and 1.8 at 16,
where a dense weight in float32 takes .66 and 2.3, one in bfloat16 .30 and 13; blocks are as fast from some 160 rows on.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmshrink_kernels.wna16.prepack import ROWS, PackedWeight, empty, prepack, unpack_block

GROUPS = (256, 128, 64, 32)
"""Inputs a group, as the operator takes them."""
BLOCK = 4 * ROWS
"""Rows of the weight that are packed or unpacked together."""
MANY_ROWS = 256
"""Rows of x from which blocks that are brought back are faster: the operator unpacks a weight anew for each few."""


def group_for(bits: int, group_size: int, in_features: int) -> int | None:
    """The group with which the operator can multiply such a weight, or None where it can't.

    One group a row (-1) is cut into the largest groups that divide it.
    """
    sizes = GROUPS if group_size == -1 else (group_size,)
    fitting = (size for size in sizes if size in GROUPS and in_features % size == 0)
    return next(fitting, None) if bits in (4, 8) else None


def pack(weight: PackedWeight) -> Tensor:
    """The operator's layout of a weight's codes: uint8 [padded N, K / 2], or of 8 bits [2 * padded N, K / 2]."""
    words = torch.empty(weight.padded_out * weight.bits // 4, weight.in_features // 2, dtype=torch.uint8)
    packets = range(weight.padded_in // weight.packet)
    for rows in _blocks(weight.padded_out):
        codes = unpack_block(weight, rows, packets)[:, : weight.in_features]
        for start, part in zip(range(0, words.shape[0], weight.padded_out), _halves(codes, weight.bits), strict=True):
            words[start + rows.start : start + rows.stop] = _packed(part.int())
    return words


def _halves(codes: Tensor, bits: int) -> list[Tensor]:
    """The nibbles of the codes, 0 to 15: one of 4 bits, of 8 bits the upper and the lower."""
    return [codes + 8] if bits == 4 else [(codes >> 4) + 8, codes & 15]


def unpack(words: Tensor, out_features: int, in_features: int, group_size: int) -> Tensor:
    """The inverse of `pack`: the words of the kernels' layout, int16."""
    padded = _padded(out_features)
    kind: dict[str, Any] = {"bits": 4 * words.shape[0] // padded, "group_size": group_size}
    whole = empty(out_features, in_features, scale_dtype=torch.float32, zero_points=False, device="cpu", **kind)
    groups = 1 if group_size == -1 else in_features // group_size
    for rows in _blocks(padded):
        codes = _codes(words, rows, in_features)
        if kind["bits"] == 8:
            lower = _codes(words, range(padded + rows.start, padded + rows.stop), in_features)
            codes = codes * 16 + (lower + 8)
        part = prepack(codes, torch.zeros(len(rows), groups), None, **kind)
        whole.words[:, rows.start : rows.stop] = part.words
    return whole.words


def _padded(out_features: int) -> int:
    return -(-out_features // ROWS) * ROWS


def _codes(words: Tensor, rows: range, in_features: int) -> Tensor:
    """Nibbles less 8, int8 [rows, in_features], of rows that begin and end with a block."""
    block, order = _order()
    octets = words[rows.start : rows.stop].view(-1, in_features, block // 2)
    nibbles = torch.cat([octets & 15, octets >> 4], -1)
    if order is not None:
        nibbles = nibbles[:, :, order]
    return nibbles.transpose(1, 2).reshape(len(rows), in_features).to(torch.int8) - 8


def pairs(scales: Tensor, zero_points: Tensor | None, group: int, weight: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """(scale and zero as the operator takes them, what is left of the zeros): bf16 [K/g, words' rows, 2] and [K/g, N].

    The second is None where nothing is left. A scale that bfloat16 doesn't hold is rounded to it, which is no further
    off than the weight rounded to bfloat16.
    """
    size = weight.in_features if weight.group_size == -1 else weight.group_size
    count = weight.in_features // size
    scale, zero, left = scales[:count].to(torch.bfloat16), torch.zeros_like(scales[:count], dtype=torch.bfloat16), None
    if zero_points is not None:
        exact = -scale.float() * zero_points[:count]
        zero = exact.to(torch.bfloat16)
        left = (exact - zero.float()).to(torch.bfloat16)[:, : weight.out_features]
    both = torch.stack([scale, zero], -1)
    if weight.bits == 8:
        both = torch.cat([torch.stack([16 * scale, zero], -1), torch.stack([scale, 8 * scale], -1)], 1)
    repeats = size // group
    kept = None if left is None or not left.any() else left.repeat_interleave(repeats, 0)
    return both.repeat_interleave(repeats, 0), kept


def _matmul(x: Tensor, words: Tensor, scale_and_zero: Tensor, left: Tensor | None, out_features: int) -> Tensor:
    """x: bf16 [M, K]; returns [M, out_features]."""
    if x.shape[0] == 0:
        return x.new_empty(0, out_features)
    x = x.contiguous()
    if x.shape[0] > MANY_ROWS:
        return _by_blocks(x, words, scale_and_zero, left, out_features)
    group = x.shape[1] // scale_and_zero.shape[0]
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, words, group, scale_and_zero)
    parts = y.view(x.shape[0], -1, _padded(out_features))[:, :, :out_features]
    y = parts[:, 0] if parts.shape[1] == 1 else parts[:, 0] + parts[:, 1]
    if left is not None:
        sums = x.view(x.shape[0], -1, group).sum(-1, dtype=torch.float32).to(x.dtype)
        return y + sums @ left
    return y.contiguous()


def _by_blocks(x: Tensor, words: Tensor, scale_and_zero: Tensor, left: Tensor | None, out_features: int) -> Tensor:
    """The same by dense products with blocks of the weight, in bfloat16 or float32."""
    y = x.new_empty(x.shape[0], out_features)
    work = x if _has_bfloat16() else x.float()
    for rows in _blocks(out_features):
        block = _values(words, scale_and_zero, left, rows, x.shape[1], _padded(out_features))
        y[:, rows.start : rows.stop] = work @ block.to(work.dtype).t()
    return y


def _matmul_transposed(
    y: Tensor, words: Tensor, scale_and_zero: Tensor, left: Tensor | None, in_features: int
) -> Tensor:
    """y: bf16 [M, N]; returns y W, [M, in_features]: block by block of W's rows, in float32."""
    result = torch.zeros(y.shape[0], in_features)
    for rows in _blocks(y.shape[1]):
        part = y[:, rows.start : rows.stop].float()
        result += part @ _values(words, scale_and_zero, left, rows, in_features, _padded(y.shape[1]))
    return result.to(y.dtype)


def _values(
    words: Tensor, scale_and_zero: Tensor, left: Tensor | None, rows: range, in_features: int, padded: int
) -> Tensor:
    """Rows of the weight, float32 [rows, in_features]. rows: from the beginning of a block on."""
    groups = scale_and_zero.shape[0]
    values = torch.zeros(len(rows), groups, in_features // groups)
    for start in range(0, words.shape[0], padded):
        whole = range(start + rows.start, start + _padded(rows.stop))
        codes = _codes(words, whole, in_features)[: len(rows)].float().view(values.shape)
        scale, zero = scale_and_zero[:, whole.start : start + rows.stop].float().unbind(-1)
        values += codes.mul_(scale.t().unsqueeze(-1)).add_(zero.t().unsqueeze(-1))
    if left is not None:
        values += left[:, rows.start : rows.stop].float().t().unsqueeze(-1)
    return values.view(len(rows), in_features)


@cache
def _has_bfloat16() -> bool:
    """Whether oneDNN has dense products in bfloat16 here, by instructions for them or, with AVX-512 alone, without
    (`run.arithmetic` asks for the instructions); else they go through plain loops."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _blocks(rows: int) -> list[range]:
    return [range(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK)]


def _packed(nibbles: Tensor) -> Tensor:
    """nibbles: int32 [rows, K], 0 to 15, rows a multiple of 64."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 2)
    return packed


@cache
def _order() -> tuple[int, Tensor | None]:
    """(rows of a block, where each of its rows is among its lower and then its upper nibbles; None: in order)."""
    row = torch.arange(ROWS, dtype=torch.int32).unsqueeze(1).expand(ROWS, 2).contiguous()
    column = torch.tensor([[0, 1]], dtype=torch.int32).expand(ROWS, 2).contiguous()
    low, high, columns = (_packed(numbers).flatten() for numbers in (row & 15, row >> 4, column))
    half = int((columns & 15).nonzero()[0])
    low, high = low[:half], high[:half]
    rows = torch.cat([(low & 15) | (high & 15) << 4, (low >> 4) | (high & 0xF0)]).long()
    assert sorted(rows.tolist()) == list(range(2 * half)), rows
    return 2 * half, None if torch.equal(rows, torch.arange(2 * half)) else rows.argsort()


def _fake(x: Tensor, words: Tensor, scale_and_zero: Tensor, left: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight, _ = inputs
    ctx.in_features = x.shape[1]
    ctx.save_for_backward(*(tensor for tensor in weight if tensor is not None))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    words, scale_and_zero, *left = ctx.saved_tensors
    weight = (words, scale_and_zero, left[0] if left else None)
    return torch.ops.llmshrink.int4_cpu_matmul_transposed(grad, *weight, ctx.in_features), None, None, None, None


_LIBRARY = torch.library.Library("llmshrink", "FRAGMENT")
_WEIGHT = "Tensor words, Tensor scale_and_zero, Tensor? left"
for _name, _schema, _run in (
    ("int4_cpu_matmul", f"(Tensor x, {_WEIGHT}, int out_features) -> Tensor", _matmul),
    ("int4_cpu_matmul_transposed", f"(Tensor x, {_WEIGHT}, int in_features) -> Tensor", _matmul_transposed),
):
    _LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"llmshrink::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("llmshrink::int4_cpu_matmul", _backward, setup_context=_keep, lib=_LIBRARY)
