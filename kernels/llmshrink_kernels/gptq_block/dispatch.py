"""How the two kernels are cut into tiles, and their launches.

A thread of `trial_kernel` holds 16 columns of four lanes (128 registers, no spills, so four programs of 128 threads
fill a multiprocessor); one of `sweep_kernel`, which has no candidates to fill the machine with, 16 columns of one row.
32 columns were compiled too: 253 registers and more, spills, and a minute and a half in the assembler. Nothing here has
been timed yet: these tiles are right everywhere, not known to be the fastest anywhere.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

LANES = 512
TRIAL_WARPS = 4
SWEEP_ROWS = 32
SCRATCH = 1 << 29
PROGRAMS_PER_PROCESSOR = 4


@dataclass(frozen=True)
class Tiles:
    """candidates, rows: of a tile, powers of two. segment: columns held at a time. programs: of the launch."""

    candidates: int
    rows: int
    segment: int
    programs: int


def segment(size: int) -> int:
    """Columns that are held in registers at a time."""
    return 16 if size > 8 else 8


def trial_tiles(rows: int, size: int, candidates: int, device: torch.device) -> Tiles:
    """The tiles of `trial_kernel`. Its scratch stays below 512 MB, or at one program's need where that is more."""
    padded = 1 << (candidates - 1).bit_length()
    tile_rows = max(1, LANES // padded)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    fitting = max(1, SCRATCH // (4 * size * padded * tile_rows))
    programs = min(-(-rows // tile_rows), PROGRAMS_PER_PROCESSOR * processors, fitting)
    return Tiles(padded, tile_rows, segment(size), programs)


def launch_sweep(
    weight: Tensor, unit: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """`ops.sweep_block` by its kernel."""
    from llmshrink_kernels.gptq_block.kernel import sweep_kernel

    size, rows = weight.shape
    codes, errors = outputs(weight)
    columns = segment(size)
    unit = _padded(unit, columns)
    with _current(weight.device):
        sweep_kernel[(-(-rows // SWEEP_ROWS),)](
            weight.contiguous(),
            unit,
            scale.contiguous(),
            None if zero is None else zero.contiguous(),
            group.contiguous(),
            codes,
            errors,
            rows,
            size,
            unit.shape[1],
            BITS=bits,
            R=SWEEP_ROWS,
            S=columns,
            num_warps=1,
            num_stages=1,
        )
    return codes, errors


def launch_trial(
    weight: Tensor, unit: Tensor, importance: Tensor, scale: Tensor, zero: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.trial_block` by its kernel, with the number of the winner instead of its scale and zero."""
    from llmshrink_kernels.gptq_block.kernel import trial_kernel

    size, rows = weight.shape
    codes, errors = outputs(weight)
    choice = torch.empty(rows, dtype=torch.int64, device=weight.device)
    tiles = trial_tiles(rows, size, scale.shape[0], weight.device)
    unit = _padded(unit, tiles.segment)
    width = unit.shape[1]
    with _current(weight.device):
        trial_kernel[(tiles.programs,)](
            weight.contiguous(),
            unit,
            pad(importance, (0, width - size)),
            scale.contiguous(),
            None if zero is None else zero.contiguous(),
            weight.new_empty(tiles.programs, width, tiles.candidates, tiles.rows),
            codes,
            choice,
            errors,
            rows,
            size,
            width,
            scale.shape[0],
            BITS=bits,
            C=tiles.candidates,
            R=tiles.rows,
            S=tiles.segment,
            num_warps=TRIAL_WARPS,
            num_stages=1,
        )
    return codes, choice, errors


def outputs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Room for codes and errors of `weight`."""
    return torch.empty(weight.shape, dtype=torch.int8, device=weight.device), weight.new_empty(weight.shape)


def _padded(unit: Tensor, columns: int) -> Tensor:
    """U's block, contiguous, with zeros up to a whole segment both ways: the kernels read it without a mask."""
    more = -unit.shape[1] % columns
    return pad(unit, (0, more, 0, more)).contiguous()


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, wherever its arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
