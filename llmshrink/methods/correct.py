"""The corrected target: a layer makes good what the layers before it broke.

With the prefix compressed, a layer sees X~ where the original saw X. The weight that comes nearest to the original
output on the inputs it will really get minimises `||W X - V X~||^2`, and is `V = W + W (X - X~) X~^T (X~ X~^T)^-1`, in
the terms of `Statistics`

    W* = W + a * W D H^-1

(GPTAQ, arXiv 2504.02692, solves for the same target inside the sweep; Qronos, arXiv 2505.11695, is a = 1.) Scales are
fitted on W*, and GPTQ runs on W*. `a` below 1 moves less far where few tokens would be overfitted.
"""

from __future__ import annotations

from torch import Tensor

from llmshrink.methods.factor import Factor


def correction(weight: Tensor, cross: Tensor, factor: Factor) -> Tensor:
    """W D H^-1 with its columns in the factor's order: float32 [out, in].

    weight: float32 [out, in] in the natural order. cross: D, float32 [in, in]. The damped H of the factor is used.
    """
    if weight.shape[0] > weight.shape[1]:
        return weight @ _divide(cross, factor)
    return _divide(weight @ cross, factor)


def _divide(rows: Tensor, factor: Factor) -> Tensor:
    """rows @ H^-1, in the factor's order: H^-1 = U^T U, and U's diagonal is apart."""
    ordered = rows.index_select(1, factor.order)
    through = ordered @ factor.unit.T
    through /= factor.importance
    return through @ factor.unit
