"""Prune a weight: the target that makes good earlier layers, the mask, and the repair."""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.methods.contract import SiteStatistics, SolveError, check_finite
from llmshrink.methods.correct import corrected
from llmshrink.methods.factor import damped, factorise
from llmshrink.methods.pruning.contract import Problem, Pruned, PruneSpec
from llmshrink.methods.pruning.pattern import check_width
from llmshrink.methods.pruning.registry import pruner
from llmshrink.methods.pruning.repair import least_squares


def prune(weight: Tensor, statistics: SiteStatistics | None, spec: PruneSpec) -> Pruned:
    """Remove what the pattern says, so that the output on the calibration inputs changes least.

    weight: [out_features, in_features], any float dtype. statistics: required; `cross` or `drift` is read when
    `spec.corrected` is above 0. Raises SolveError on NaN, on a pattern that doesn't fit in_features, and on a Hessian
    that no damping makes positive definite. An input that is never active keeps the weights that the pattern leaves it,
    as they are.
    """
    if statistics is None:
        raise SolveError(f"method {spec.method} needs calibration data: give some with --calibration")
    check_finite("the weight", weight)
    check_width(weight.shape[1], spec.pattern)
    original = weight.to(torch.float32)
    natural = torch.arange(weight.shape[1], device=weight.device)
    factor = factorise(statistics.hessian, natural, spec.damp)
    hessian = damped(statistics.hessian, factor.damping)
    target, said = corrected(original, statistics, spec.corrected, spec.corrected_damp)
    events = factor.events + said
    problem = Problem(hessian, factor)
    pruned, mask = pruner(spec.method)(target, problem, spec)
    if spec.repair:
        pruned, said = least_squares(target, mask, problem, pruned)
        events += said
    return Pruned(pruned, mask, target, factor.damping, events)
