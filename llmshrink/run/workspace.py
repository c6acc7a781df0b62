"""Bytes that each method works with at its fullest, beside the statistics that it is given.

Counted from the methods' own code, in float32 matrices of a weight's size (`rows` x `inputs`) and of the Hessian's
(`inputs` x `inputs`); who changes what a method keeps alive changes it here. `benchmarks.plan` holds them to what runs
take.
"""

from __future__ import annotations

from llmshrink.methods import NarrowSpec, QuantizeSpec, SiteSpec, solver
from llmshrink.methods.pruning import PruneSpec
from llmshrink.methods.pruning.repair import PIECE as REPAIR_PIECE
from llmshrink.methods.trial import BUFFER, MULTIPLES, OPPOSITE

FLOAT = 4
PIECE = 1 << 24
"""Elements that `methods.contract.measure` looks at at a time."""


def solving(spec: SiteSpec, rows: int, inputs: int, cross: bool) -> int:
    """Of one solution of `rows` stacked rows. cross: whether the target is corrected."""
    weight, square = FLOAT * rows * inputs, FLOAT * inputs * inputs
    measuring = 3 * FLOAT * min(rows * inputs, PIECE)
    if spec.prune is not None:
        found = weight + _pruning(spec.prune, rows, inputs, cross)
        if spec.quantize is not None:
            # Pruned weight, mask and target stay; the quantizer has columns, what is kept of them, and codes.
            found = max(found, weight * 5 + rows * inputs * 4 + 3 * square + _trying(spec.quantize, rows, inputs))
        return max(found, 4 * weight + measuring)
    assert spec.quantize is not None, "a site that nothing happens to isn't solved"
    if not solver(spec.quantize.method).reads:
        return 2 * weight + rows * inputs + max(measuring, 5 * FLOAT * min(rows * inputs, 1 << 22))
    factorising = weight + 3 * square
    moved = 0 if not cross else 3 * weight + 5 * square if rows > inputs else 5 * weight + 3 * square
    swept = 3 * weight + square + 3 * rows * inputs + _trying(spec.quantize, rows, inputs)
    return max(factorising, moved, swept, 3 * weight + square + rows * inputs + measuring)


def _trying(spec: QuantizeSpec, rows: int, inputs: int) -> int:
    """Of a group with every candidate scale: their errors, and what they are chosen by."""
    group = inputs if spec.group_size == -1 else spec.group_size
    candidates = len(MULTIPLES) + len(OPPOSITE)
    return 2 * FLOAT * min(BUFFER, group * candidates * rows)


def _pruning(spec: PruneSpec, rows: int, inputs: int, cross: bool) -> int:
    weight, square = FLOAT * rows * inputs, FLOAT * inputs * inputs
    factorising = 3 * square
    moved = weight if not cross else 3 * weight + 6 * square if rows > inputs else 5 * weight + 4 * square
    # The damped Hessian and the factor stay, and the target where it's another than the weight.
    kept = 2 * square + (weight if cross else 0)
    chosen = {
        "alps": 7 * weight + rows * inputs * 2 + 3 * square,
        "sparsegpt": 4 * weight + rows * inputs * 2,
    }.get(spec.method, 3 * weight)
    if not spec.pattern.block:
        # Its scores, sorted, with their places.
        chosen += weight + 3 * weight
    # Where rows start and what they become, the mask, and the pieces of those that are solved together.
    repairing = 2 * weight + rows * inputs + 9 * FLOAT * min(rows * inputs, REPAIR_PIECE) if spec.repair else 0
    return max(factorising, moved, kept + chosen, kept + repairing)


def narrowing(spec: NarrowSpec, rows: int, inputs: int) -> int:
    """Of one matrix that gets fewer inputs."""
    weight, square = FLOAT * rows * inputs, FLOAT * inputs * inputs
    if not spec.repair:
        return 4 * weight
    share = spec.keep * spec.unit / inputs
    return int(4 * weight + square * (2 * share + 2 * share * share))
