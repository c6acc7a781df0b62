"""GPTQ's inner loop in one launch: columns one after another, all rows (and all candidate scales) side by side.

What runs is the recurrence of one group or block of n columns (`unit` is U with each row divided by its diagonal):

    e_i = w_i - Q(w_i),        w_j -= e_i * unit_ij   for all j > i.

Column i+1 can't start before column i is rounded, but rows never meet: with C candidates there are C * rows lanes. A
program takes a tile of LANES of them, cuts the n columns into segments of S, and holds a segment in registers, each
column a variable of its own (a tuple that is unrolled at compile time), so that nothing is ever indexed at run time:

            j (done)              segment of S columns, in registers
    lane | v_0 v_1 ... v_j ... | w_k ... w_k+S-1 |            1. w_k -= e_j * unit_jk      for every j that is done
    lane | v_0 v_1 ... v_j ... | w_k ... w_k+S-1 |            2. inside the segment the same, column after column

What is done is kept in memory as v, the value that was rounded, not as e: one number gives both the code
`nearest(v)` and the error `v - nearest(v)`, so the winner's codes need no second sweep and no byte of their own.

Budget for a lane of n columns: n(n-1)/2 multiply-adds, each with an element of `unit` that all lanes share (a load of
one address, from L1, for the four lanes that a thread holds: unit is 64 KB at n = 128), and n (n/S - 1) / 2 loads of v.
With n = 128 and S = 16 that is 64 multiply-adds, 16 shared loads and 3.5 loads of v for a weight and candidate. All 22
candidates of a 4096 x 4096 matrix, padded to 32, are 34 G multiply-adds: 1.2 milliseconds of an H100's FP32 units if
nothing else stood in the way. (Counted; not yet run on a GPU.)

The trial's candidates are a tile's first axis, padded to a power of two; the padding can't win. In units of the
candidate's scale rounding needs no scale; a zero-point moves the bounds instead of the value:
`clamp(round(v) + z, low, high) - z = round(clamp(v, low - z, high - z))`, since z and the bounds are integers. Clamping
first also makes the magic-number rounding exact (|v| < 2**22), and keeps the compiler from fusing it with the product.

v lives in one slot of `scratch` for each running program: a program walks over tiles, so memory doesn't grow with rows.
"""

from __future__ import annotations

import triton.language as tl

from llmshrink_kernels.device import jit


@jit
def _nearest(value, lower, upper):  # type: ignore[no-untyped-def]
    """round(clamp(value)), ties to even. lower, upper: whole numbers, so that clamping first changes nothing."""
    clamped = tl.minimum(tl.maximum(value, lower), upper)
    return (clamped + 12582912.0) - 12582912.0


@jit
def _and(columns, column):  # type: ignore[no-untyped-def]
    """The tuple with one more. (Triton's Python knows no starred elements.)"""
    more = (column,)
    return columns + more


@jit
def _collect(columns, error, unit, S: tl.constexpr, FROM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Take from columns FROM.. of a segment what one error leaves them to make good. unit: its row of U, from there."""
    left = ()
    for k in tl.static_range(S):
        left = _and(left, columns[k] if k < FROM else columns[k] - error * tl.load(unit + k))
    return left


@jit
def trial_kernel(  # type: ignore[no-untyped-def]
    weight,
    unit,
    importance,
    scale,
    zero,
    scratch,
    codes,
    choice_out,
    errors,
    rows,
    size,
    width,
    candidates,
    BITS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
):
    """A group of `size` columns with every candidate; `ops.trial_block` says what the tensors are.

    scratch: float32 [programs, width, C, R].
    """
    low = -(1 << (BITS - 1)) * 1.0
    high = ((1 << (BITS - 1)) - 1) * 1.0
    lane = tl.arange(0, C)
    slot = scratch + tl.program_id(0).to(tl.int64) * width * (C * R)
    place = lane[:, None] * R + tl.arange(0, R)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        row = (tile * R + tl.arange(0, R)).to(tl.int64)
        inside = row < rows
        here = (lane < candidates)[:, None] & inside[None, :]
        at = lane.to(tl.int64)[:, None] * rows + row[None, :]
        step = tl.load(scale + at, mask=here, other=1.0)
        inverse = tl.div_rn(tl.full([C, R], 1.0, tl.float32), step)
        offset = tl.load(zero + at, mask=here, other=0.0) if zero is not None else tl.zeros([C, R], tl.float32)
        lower = low - offset
        upper = high - offset
        damage = tl.zeros([C, R], tl.float32)
        source = weight
        for first in range(0, size, S):
            columns = ()
            for k in tl.static_range(S):
                left = tl.load(source + row, inside & (first + k < size), other=0.0)
                columns = _and(columns, left[None, :] * inverse)
                source += rows
            line = unit + first
            kept = slot
            for _ in range(first):
                done = tl.load(kept + place)
                columns = _collect(columns, done - _nearest(done, lower, upper), line, S, 0)
                line += width
                kept += C * R
            for k in tl.static_range(S):
                error = columns[k] - _nearest(columns[k], lower, upper)
                damage += error * error * tl.load(importance + first + k)
                tl.store(kept + place, columns[k])
                columns = _collect(columns, error, line, S, k + 1)
                line += width
                kept += C * R
            tl.debug_barrier()
        loss = tl.where((lane < candidates)[:, None], damage * step * step, float("inf"))
        choice = tl.argmin(loss, axis=0)
        tl.store(choice_out + row, choice.to(tl.int64), mask=inside)
        won = lane[:, None] == choice[None, :]
        step = tl.sum(tl.where(won, step, 0.0), axis=0)[None, :]
        offset = tl.sum(tl.where(won, offset, 0.0), axis=0)[None, :]
        for first in range(0, size, S):
            column = first + tl.arange(0, S)
            there = (column < size)[:, None] & inside[None, :]
            value = tl.load(
                slot + column[:, None] * (C * R) + (choice * R + tl.arange(0, R))[None, :], there, other=0.0
            )
            code = _nearest(value, low - offset, high - offset)
            to = column.to(tl.int64)[:, None] * rows + row[None, :]
            tl.store(codes + to, (code + offset).to(tl.int8), mask=there)
            tl.store(errors + to, (value - code) * step, mask=there)
        # The next tile writes over what was just read.
        tl.debug_barrier()


@jit
def sweep_kernel(  # type: ignore[no-untyped-def]
    weight,
    unit,
    scale,
    zero,
    group,
    codes,
    errors,
    rows,
    size,
    width,
    BITS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
):
    """A block of `size` columns whose scales are known; `ops.sweep_block` says what the tensors are.

    Each column may have another scale, so values stay in the weight's units; what is done is kept as its error, in the
    output.
    """
    low = -(1 << (BITS - 1)) * 1.0
    high = ((1 << (BITS - 1)) - 1) * 1.0
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside = row < rows
    source = weight
    aim = errors
    for first in range(0, size, S):
        columns = ()
        for k in tl.static_range(S):
            columns = _and(columns, tl.load(source + row, inside & (first + k < size), other=0.0))
            source += rows
        line = unit + first
        done = errors
        for _ in range(first):
            columns = _collect(columns, tl.load(done + row, mask=inside, other=0.0), line, S, 0)
            line += width
            done += rows
        for k in tl.static_range(S):
            there = inside & (first + k < size)
            at = tl.load(group + first + k, mask=first + k < size, other=0) * rows + row
            step = tl.load(scale + at, mask=there, other=1.0)
            offset = tl.load(zero + at, mask=there, other=0.0) if zero is not None else tl.zeros([R], tl.float32)
            scaled = columns[k] * tl.div_rn(tl.full([R], 1.0, tl.float32), step)
            code = _nearest(scaled, low - offset, high - offset)
            error = columns[k] - code * step
            tl.store(codes + row, (code + offset).to(tl.int8), mask=there)
            tl.store(aim + row, error, mask=there)
            columns = _collect(columns, error, line, S, k + 1)
            codes += rows
            aim += rows
            line += width
        tl.debug_barrier()
