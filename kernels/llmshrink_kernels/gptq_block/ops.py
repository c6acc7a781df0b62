"""GPTQ's inner loop as two operators: a block whose scales are known, and a group that tries candidates.

Both work on the solver's transposed layout, [columns, rows], in the order in which columns are quantized, and leave
their arguments as they are. Where there is no CUDA or no Triton the same is done in torch, column by column.

Left out on purpose: what earlier blocks left to make good is a plain matrix product and is taken before; scales are
chosen by the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink_kernels.device import runs_triton
from llmshrink_kernels.gptq_block import dispatch, naive

BITS = range(2, 9)
MOST_CANDIDATES = 512


def sweep_block(
    weight: Tensor, unit: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor, *, bits: int
) -> tuple[Tensor, Tensor]:
    """Quantize columns in order, each with the scale of its group; later columns absorb what earlier ones got wrong.

    weight: float32 [n, rows]. unit: float32 [n, n], U with each row divided by its diagonal; only what is right of the
    diagonal is read. scale, zero: float32 [groups, rows]; zeros are whole numbers, or None. group: int64 [n], the row
    of `scale` for each column (its values are not checked: that would wait for the device). Returns codes, int8
    [n, rows], and errors, float32 [n, rows]: what is left of each column once it is quantized. Raises ValueError,
    naming the argument, on other dtypes, shapes or devices.
    """
    _check_common(weight, unit, scale, zero, bits)
    n = weight.shape[0]
    _check(group.dtype == torch.int64 and group.shape == (n,), f"group must be int64 [{n}], not {_say(group)}")
    _check(group.device == weight.device, f"group is on {group.device}, weight on {weight.device}")
    codes, errors = torch.ops.llmshrink.gptq_sweep_block(weight, unit, scale, zero, group, bits)
    return codes, errors


def trial_block(
    weight: Tensor, unit: Tensor, importance: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Sweep one group with every candidate scale, and keep for each row the one with the least damage.

    weight, unit: as in `sweep_block`, of one group. importance: float32 [n], what a squared error of each column costs.
    scale, zero: float32 [candidates, rows], at most 512 candidates; no scale is 0. The damage is
    `sum_i importance_i e_i**2`; of equals the first wins. Returns codes, int8 [n, rows]; the winners' scale and zero,
    [rows]; and errors, float32 [n, rows], in the weight's units. Raises ValueError, naming the argument, on other
    dtypes, shapes or devices.
    """
    _check_common(weight, unit, scale, zero, bits)
    n = weight.shape[0]
    _check(
        importance.dtype == torch.float32 and importance.shape == (n,),
        f"importance must be float32 [{n}], not {_say(importance)}",
    )
    _check(importance.device == weight.device, f"importance is on {importance.device}, weight on {weight.device}")
    _check(scale.shape[0] <= MOST_CANDIDATES, f"scale holds {scale.shape[0]} candidates, at most {MOST_CANDIDATES}")
    codes, choice, errors = torch.ops.llmshrink.gptq_trial_block(weight, unit, importance, scale, zero, bits)
    choice = choice.unsqueeze(0)
    best_zero = None if zero is None else zero.gather(0, choice)[0]
    return codes, scale.gather(0, choice)[0], best_zero, errors


@torch.library.custom_op("llmshrink::gptq_sweep_block", mutates_args=())
def _sweep_block(
    weight: Tensor, unit: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    if weight.shape[1] == 0:
        return dispatch.outputs(weight)
    run = dispatch.launch_sweep if runs_triton(weight.device) else naive.sweep_block
    return run(weight, unit, scale, zero, group, bits)


@torch.library.custom_op("llmshrink::gptq_trial_block", mutates_args=())
def _trial_block(
    weight: Tensor, unit: Tensor, importance: Tensor, scale: Tensor, zero: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    if weight.shape[1] == 0:
        codes, errors = dispatch.outputs(weight)
        return codes, torch.empty(0, dtype=torch.int64, device=weight.device), errors
    run = dispatch.launch_trial if runs_triton(weight.device) else naive.trial_block
    return run(weight, unit, importance, scale, zero, bits)


@_sweep_block.register_fake
def _(
    weight: Tensor, unit: Tensor, scale: Tensor, zero: Tensor | None, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    return dispatch.outputs(weight)


@_trial_block.register_fake
def _(
    weight: Tensor, unit: Tensor, importance: Tensor, scale: Tensor, zero: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    codes, errors = dispatch.outputs(weight)
    return codes, weight.new_empty(weight.shape[1], dtype=torch.int64), errors


def _check_common(weight: Tensor, unit: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> None:
    _check(isinstance(bits, int) and bits in BITS, f"bits must be 2 to 8, not {bits}")
    _check(weight.dtype == torch.float32 and weight.dim() == 2, f"weight must be float32 [n, rows], not {_say(weight)}")
    n, rows = weight.shape
    _check(n > 0, "weight holds no column")
    _check(unit.dtype == torch.float32 and unit.shape == (n, n), f"unit must be float32 [{n}, {n}], not {_say(unit)}")
    _check(
        scale.dtype == torch.float32 and scale.dim() == 2 and scale.shape[0] > 0 and scale.shape[1] == rows,
        f"scale must be float32 [at least 1, {rows}], not {_say(scale)}",
    )
    _check(
        zero is None or (zero.dtype == torch.float32 and zero.shape == scale.shape),
        f"zero must be float32, the shape of scale, not {'' if zero is None else _say(zero)}",
    )
    for name, tensor in (("unit", unit), ("scale", scale), ("zero", zero)):
        _check(
            tensor is None or tensor.device == weight.device,
            f"{name} is on {'' if tensor is None else tensor.device}, weight on {weight.device}",
        )


def _say(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
