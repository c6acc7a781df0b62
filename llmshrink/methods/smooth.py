"""SmoothQuant: what is loud in a linear's inputs moves into its weights, where a scale for each row has room for it.

A product of 8 bits has one scale for all inputs of a token, so that one loud channel leaves the others few codes. With

    s_j = max |X_j|^a / max |W_j|^(1 - a),        X'_j = X_j / s_j,        W'_j = W_j s_j

the product stays what it was, and both have 8 bits' room for every channel j (Xiao et al. 2022, arXiv 2211.10438,
eq. 4). X' costs nothing where X comes from a norm, whose own weights are divided by s.

Here every s is a power of two, by which floating-point numbers are multiplied without rounding: the smoothed model
computes the numbers of the original, to the bit, until it is quantized. Multiplying all s of an input by one number
changes neither side, so the smallest is 1, and inputs only become smaller. Not here: smoothing what another linear
feeds (down_proj by up_proj's rows). It is as exact, and was measured to lose more than it brings on the Llama of the
README's figures (KL .00226 against .00195).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 12
"""The largest factor's power of two: more than this between the channels of one input is cut off."""


def smoothing_factors(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s of every channel: float32 [in_features], powers of two from 1 to 2^MOST.

    inputs, weights: float32 [in_features], the largest magnitude of a channel of the inputs and of the weights that it
    is multiplied by. A channel in which either is 0 has s = 1.
    """
    live = (inputs > 0) & (weights > 0)
    if not bool(live.any()):
        return torch.ones_like(inputs)
    wanted = alpha * inputs.double().log2() - (1 - alpha) * weights.double().log2()
    powers = torch.where(live, wanted, wanted[live].min()).round().long()
    powers = powers - max(int(powers.min()), int(powers.max()) - MOST)
    return (torch.ones_like(powers) << powers.clamp_(min=0)).where(live, 1).to(inputs.dtype)


def kept_exact(factors: Tensor, divided: Sequence[Tensor], multiplied: Sequence[Tensor]) -> Tensor:
    """The factors, halved where they must be for every number to stay the same but for its exponent.

    divided: [in_features] each, the norm's; multiplied: [out_features, in_features] each. In float32 and bfloat16 no
    factor is ever too large for numbers of a model; in float16 small ones are.
    """
    while True:
        failing = torch.zeros_like(factors, dtype=torch.bool)
        for tensor in divided:
            failing |= shrunk(tensor, factors) * factors.to(tensor) != tensor
        for tensor in multiplied:
            # Growing by a power of two can only overflow, and the largest of a channel is the first to.
            failing |= ~torch.isfinite(tensor.abs().amax(0) * factors.to(tensor))
        failing &= factors > 1
        if not bool(failing.any()):
            return factors
        factors = torch.where(failing, factors / 2, factors)


def shrunk(tensor: Tensor, factors: Tensor) -> Tensor:
    """A norm's weight or bias, [in_features], that gives inputs divided by the factors."""
    return tensor / factors.to(tensor)


def grown(weight: Tensor, factors: Tensor) -> Tensor:
    """A weight, [out_features, in_features], that gives the same product with inputs divided by the factors."""
    return weight * factors.to(weight)
