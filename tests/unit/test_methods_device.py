"""Methods and statistics work where their inputs are, such as on a GPU: proved without one, on the meta device.

Meta tensors have shapes and a device but no values. A tensor that an operation makes on the CPU beside them is what
CUDA would refuse to compute with, and fails here at once. What Python reads is made up so that the ordinary path is
taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmshrink.calibration.statistics import Statistics, merge
from llmshrink.methods import QuantizeSpec, Solved, solver

AWAY = torch.device("meta")
CPU = torch.device("cpu")
ROWS, WIDTH, TOKENS, SIZE = 12, 144, 20, 16  # Wide enough for three tiles of a Hessian and for a split inverse.


class OnlyAway(TorchDispatchMode):
    """Refuses tensors that land on the CPU (numbers are free to, as beside a GPU), and makes up what Python reads."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == AWAY:
            # Finite is True; no Cholesky fails (info 0); sums are 1.
            return {torch.bool: True, torch.int64: 0, torch.int32: 0}.get(args[0].dtype, 1.0)
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == CPU:
            return torch.zeros(args[0].shape, dtype=args[0].dtype)  # For tolist().
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dim() > 0:
                assert leaf.device == AWAY, f"{func} made {tuple(leaf.shape)} on {leaf.device}"
        return result


@pytest.fixture
def only_away() -> Iterator[None]:
    with OnlyAway():  # type: ignore[no-untyped-call]
        yield


def statistics(dtype: torch.dtype = torch.float32) -> Statistics:
    taken = Statistics(WIDTH, cross=True, device=AWAY)
    for _ in range(2):
        taken.add(*(torch.empty(TOKENS, WIDTH, dtype=dtype, device=AWAY) for _ in range(2)))
    return taken


def check(solve: Callable[[Tensor], Solved], dtype: torch.dtype) -> None:
    solved = solve(torch.empty(ROWS, WIDTH, dtype=dtype, device=AWAY))
    kept = [solved.weight.codes, solved.weight.scale, solved.weight.zero_point, solved.row_error, solved.row_energy]
    assert {tensor.device for tensor in kept if tensor is not None} == {AWAY}


@pytest.mark.usefixtures("only_away")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_stay_on_the_device(dtype: torch.dtype) -> None:
    merged = merge(statistics(dtype), statistics(dtype))
    assert merged.cross is not None
    assert merged.hessian.device == merged.cross.device == AWAY


@pytest.mark.usefixtures("only_away")
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["minmax", "mse", "hessian"])
def test_rtn_stays_on_the_device(search: Any, symmetric: bool, calibrated: bool) -> None:
    spec = QuantizeSpec(method="rtn", group_size=SIZE, scale_search=search, symmetric=symmetric)
    data = statistics() if calibrated else None
    check(lambda weight: solver("rtn").solve(weight, data, spec, torch.bfloat16), torch.bfloat16)


@pytest.mark.usefixtures("only_away")
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["minmax", "mse", "hessian", "trial"])
def test_gptq_stays_on_the_device(search: Any, symmetric: bool, act_order: bool) -> None:
    spec = QuantizeSpec(group_size=SIZE, scale_search=search, symmetric=symmetric, act_order=act_order, block_size=64)
    check(lambda weight: solver("gptq").solve(weight, statistics(), spec, torch.bfloat16), torch.float32)
