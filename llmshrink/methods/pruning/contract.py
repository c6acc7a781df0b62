"""What a pruner is given and what it gives back.

A pruner is a pure function `(target, problem, spec) -> (weight, mask)`. target: float32 [out, in], what the pruned
weight is to come near; its rows don't depend on each other, except where a threshold is taken over all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from llmshrink.methods.factor import Factor


@dataclass(frozen=True)
class Pattern:
    """What may be kept: `keep` of every `block` consecutive inputs of a row; block 0 is any place, by `ratio` alone.

    ratio: the share of weights that go. str() is "2:4", or "50 %".
    """

    keep: int
    block: int
    ratio: float

    def __str__(self) -> str:
        return f"{self.keep}:{self.block}" if self.block else f"{100 * self.ratio:g} %"

    @staticmethod
    def n_of_m(keep: int, block: int) -> Pattern:
        """2:4 is n_of_m(2, 4)."""
        assert 0 < keep < block, (keep, block)
        return Pattern(keep, block, 1 - keep / block)

    @staticmethod
    def unstructured(ratio: float) -> Pattern:
        """A share of the weight, anywhere."""
        assert 0 < ratio < 1, ratio
        return Pattern(0, 0, ratio)


@dataclass(frozen=True)
class PruneSpec:
    """How one site is pruned. The shipped recipes hold the defaults that measurement chose.

    by_error: the pattern's ratio is that of all such sites together; each has one of its own, which is found before
    anything is pruned. repair: least squares on what was kept. corrected: how much of the error of earlier layers this
    one makes good, 0 (one stream) to 1. damp, corrected_damp: damping as a fraction of the Hessian's mean diagonal, of
    the method and of what `corrected` divides by.
    """

    method: str = "alps"
    pattern: Pattern = Pattern(2, 4, 0.5)
    repair: bool = True
    corrected: float = 1.0
    corrected_damp: float = 0.1
    damp: float = 0.01
    by_error: bool = False


@dataclass(frozen=True, eq=False)
class Problem:
    """What a pruner may know of the data.

    hessian: float32 [in, in], damped, in the natural order. factor: of its inverse, in the natural order.
    """

    hessian: Tensor
    factor: Factor

    @cached_property
    def typical(self) -> float:
        """The geometric mean of the Hessian's eigenvalues, once its diagonal is one: 1 where inputs don't depend on
        each other, and less the more they do. The factor has its determinant."""
        variances = self.factor.importance.double().log().mean() - self.hessian.diagonal().double().log().mean()
        return float(variances.exp())


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned weight.

    weight: float32 [out, in], exactly zero outside `mask`. mask: bool [out, in], what was kept. target: float32
    [out, in], what it was to come near. damping, events: as in `methods.Solved`.
    """

    weight: Tensor
    mask: Tensor
    target: Tensor
    damping: float
    events: tuple[str, ...]


Pruner = Callable[[Tensor, Problem, PruneSpec], tuple[Tensor, Tensor]]
