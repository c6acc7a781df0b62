"""bitsandbytes' own quantizers: NF4 and 8-bit integers by row, without data.

The codes are found by the library's functions on the weight in the dtype in which the checkpoint has it, which is what
transformers' `from_pretrained(quantization_config=BitsAndBytesConfig(...))` does: they are the same to the bit.
`bnb-nf4-double` quantizes the blocks' absmax too (0.37 bits a weight less). The 8-bit codes are found in float16, as
there. What the weights become is said in `weights.bitsandbytes`.

Left out on purpose: FP4, which NF4 beats everywhere, and other block sizes, which transformers' config can't say.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch
from torch import Tensor

from llmshrink.errors import LlmshrinkError
from llmshrink.methods.contract import (
    QuantizeSpec,
    SiteStatistics,
    Solved,
    SolveError,
    check_finite,
    measure,
    relative,
)
from llmshrink.methods.registry import site_solver
from llmshrink.weights import Dense, NormalFloat4, RowInt8
from llmshrink.weights.bitsandbytes import BLOCK, NESTED_BLOCK, Nested

EXTRA = "pip install 'llmshrink[bnb]'"


def require(who: str, instead: str) -> None:
    """Raise LlmshrinkError where bitsandbytes isn't installed or doesn't run. instead: what else the user can do."""
    if find_spec("bitsandbytes") is None:
        raise LlmshrinkError(f"{who}: needs bitsandbytes, which isn't installed: {EXTRA}, or {instead}")
    # On import it warns of a faster kernel that it would download from the Hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a build for another machine fails in its own ways
        said = " ".join(str(error).split())[:200]
        raise LlmshrinkError(f"{who}: bitsandbytes doesn't run here ({said}); {instead}") from error


@site_solver("bnb-nf4", reads=frozenset(), rows_together=True)
def nf4(weight: Tensor, statistics: SiteStatistics | None, spec: QuantizeSpec, scale_dtype: torch.dtype) -> Solved:
    """NF4 in blocks of 64. weight: [out_features, in_features]. scale_dtype: in which the checkpoint has it."""
    return _nf4(weight, statistics, scale_dtype, double=False)


@site_solver("bnb-nf4-double", reads=frozenset(), rows_together=True)
def nf4_double(
    weight: Tensor, statistics: SiteStatistics | None, spec: QuantizeSpec, scale_dtype: torch.dtype
) -> Solved:
    """NF4 with each block's absmax in 8 bits, by 256 blocks."""
    return _nf4(weight, statistics, scale_dtype, double=True)


@site_solver("bnb-int8", reads=frozenset())
def int8(weight: Tensor, statistics: SiteStatistics | None, spec: QuantizeSpec, scale_dtype: torch.dtype) -> Solved:
    """8-bit integers, one absmax a row. Raises SolveError for a weight that float16 can't hold."""
    from bitsandbytes.functional import int8_vectorwise_quant

    check_finite("the weight", weight)
    half = weight.to(scale_dtype).to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise SolveError(
            f"bnb-int8 quantizes in float16, which ends at 65504, and a weight is {float(weight.abs().max()):.3g}: "
            "quantize by another method"
        )
    codes, absmax, _ = int8_vectorwise_quant(half.contiguous())
    return _solved(weight, RowInt8(codes, absmax), statistics)


def _nf4(weight: Tensor, statistics: SiteStatistics | None, dtype: torch.dtype, *, double: bool) -> Solved:
    from bitsandbytes.functional import quantize_4bit

    check_finite("the weight", weight)
    packed, state = quantize_4bit(
        weight.to(dtype).contiguous(), blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
    )
    nested = None
    if double:
        assert state.state2.blocksize == NESTED_BLOCK, state.state2.blocksize
        nested = Nested(state.state2.absmax, state.state2.code, float(state.offset))
    found = NormalFloat4(packed, state.absmax, nested, (weight.shape[0], weight.shape[1]), dtype)
    return _solved(weight, found, statistics)


def _solved(weight: Tensor, found: NormalFloat4 | RowInt8, statistics: SiteStatistics | None) -> Solved:
    hessian = None if statistics is None else statistics.hessian
    error, energy = measure(weight.to(torch.float32), Dense(found.dequantize()), hessian)
    return Solved(found, relative(error, energy), error, energy, 0.0, ())
