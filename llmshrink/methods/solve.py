"""One site, whatever is asked for it: pruned, quantized, or both in one visit.

Both together are not one after the other: the mask is chosen and its best weights are found on the full target, and the
quantizer then comes near those, keeping what was pruned exactly zero in the codes. A quantizer that knows nothing of
the mask would make good its errors in pruned weights too, and bring some of them back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmshrink.methods.contract import QuantizeSpec, SiteStatistics, Solved, SolveError, measure, relative
from llmshrink.methods.gptq import gptq_on
from llmshrink.methods.pruning import Pruned, PruneSpec, prune
from llmshrink.methods.registry import solver
from llmshrink.weights import Activations, Dense, EightBit, GroupedInt


@dataclass(frozen=True)
class SiteSpec:
    """What happens to one site: pruned, quantized, or both; at least one of them."""

    prune: PruneSpec | None = None
    quantize: QuantizeSpec | None = None

    @property
    def rows_together(self) -> bool:
        """Whether a row's result depends on the other rows: a share of the whole matrix is taken, not of each row, or
        the method's blocks don't end where rows do."""
        if self.prune is not None and not self.prune.pattern.block:
            return True
        return self.quantize is not None and solver(self.quantize.method).rows_together

    def to_tune(self) -> SiteSpec:
        """The same, with what rounding left kept for training."""
        return self if self.quantize is None else replace(self, quantize=replace(self.quantize, residual=True))

    @property
    def activations(self) -> Activations | None:
        """What the site's inputs are rounded to where it is computed; None where they aren't."""
        kind = "none" if self.quantize is None else self.quantize.activations
        return None if kind == "none" else kind

    @property
    def smooth(self) -> float | None:
        """How much of what is loud in its inputs moves into the weight before it is solved; None where nothing does."""
        strength = "none" if self.quantize is None else self.quantize.smooth
        return None if isinstance(strength, str) else strength

    @property
    def reads(self) -> frozenset[str]:
        """Which statistics are read: a subset of {"hessian", "cross"}."""
        if self.prune is not None:
            # What is quantized on a mask comes near the pruner's target, which is corrected already.
            return frozenset({"hessian", "cross"} if self.prune.corrected > 0 else {"hessian"})
        assert self.quantize is not None, "a site that nothing happens to isn't solved"
        reads = solver(self.quantize.method).reads
        return reads if self.quantize.corrected > 0 else reads - {"cross"}


def solve(weight: Tensor, statistics: SiteStatistics | None, spec: SiteSpec, dtype: torch.dtype) -> Solved:
    """Solve one weight, or several stacked along out_features.

    weight: [out_features, in_features], any float dtype. dtype: how a pruned weight, or a quantized one's scales, are
    stored. Raises SolveError as the methods do.
    """
    if spec.prune is None:
        assert spec.quantize is not None, "a site that nothing happens to isn't solved"
        return solver(spec.quantize.method).solve(weight, statistics, spec.quantize, dtype)
    pruned = prune(weight, statistics, spec.prune)
    if spec.quantize is None:
        stored = Dense(pruned.weight.to(dtype))
        error, energy = measure(weight.to(torch.float32), Dense(stored.dequantize()), _hessian(statistics))
        return Solved(stored, relative(error, energy), error, energy, pruned.damping, pruned.events)
    assert statistics is not None, "pruning asked for it"
    quantized, residual = _on_mask(pruned, statistics, spec.quantize, dtype)
    error, energy = measure(weight.to(torch.float32), quantized, statistics.hessian)
    return Solved(quantized, relative(error, energy), error, energy, pruned.damping, pruned.events, residual)


def _on_mask(
    pruned: Pruned, statistics: SiteStatistics, spec: QuantizeSpec, dtype: torch.dtype
) -> tuple[GroupedInt | EightBit, Tensor | None]:
    if spec.method == "gptq":
        return gptq_on(pruned.weight, pruned.mask, statistics, spec, dtype)
    if spec.method == "rtn":
        # Zero is a code of every grid, the nearest one to itself.
        found = solver("rtn").solve(pruned.weight, statistics, spec, dtype)
        assert isinstance(found.weight, GroupedInt | EightBit)
        return found.weight, found.residual
    raise SolveError(f"method {spec.method} knows nothing of a mask: quantize pruned weights by gptq or rtn")


def _hessian(statistics: SiteStatistics | None) -> Tensor | None:
    return None if statistics is None else statistics.hessian
