"""Masks from scores: the largest n of every m, or the largest share of a row or of a whole matrix.

Ties go to the earlier input, on every device: the order of scores is made strict by a stable sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmshrink.methods.contract import SolveError
from llmshrink.methods.pruning.contract import Pattern

COMPARED = 8
"""Blocks of at most so many are ranked by comparing each with each."""


def check_width(in_features: int, pattern: Pattern) -> None:
    """Raise SolveError when the pattern's blocks don't fill a row."""
    if pattern.block and in_features % pattern.block:
        raise SolveError(
            f"{pattern.keep}:{pattern.block} needs a multiple of {pattern.block} inputs, and there are {in_features}"
        )


def largest_of_blocks(scores: Tensor, keep: int, block: int) -> Tensor:
    """bool [rows, in]: the `keep` largest scores of every `block` consecutive inputs."""
    blocks = scores.view(scores.shape[0], -1, block)
    if block <= COMPARED:
        return _by_comparing(blocks, keep).view_as(scores)
    best = blocks.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, best, True).view_as(scores)


def _by_comparing(blocks: Tensor, keep: int) -> Tensor:
    """The same without a sort, two to four times as fast: a score is kept if fewer than `keep` come before it.

    blocks: [rows, blocks, block].
    """
    places = blocks.permute(2, 0, 1).contiguous()
    before = torch.zeros(places.shape, dtype=torch.uint8, device=blocks.device)
    for later in range(1, len(places)):
        ahead = places[:later] >= places[later]
        before[later] += ahead.sum(0, dtype=torch.uint8)
        before[:later] += ~ahead
    return (before < keep).permute(1, 2, 0).contiguous()


def largest_share(scores: Tensor, ratio: float) -> Tensor:
    """bool, the shape of `scores`: the largest scores of each row but round(ratio * in) of them."""
    gone = round(ratio * scores.shape[-1])
    worst = scores.argsort(dim=-1, stable=True)[..., :gone]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, worst, False)


def choose(scores: Tensor, pattern: Pattern, *, by_row: bool) -> Tensor:
    """What the pattern keeps of `scores`, [rows, in]; an unstructured share is taken of each row, or of the whole."""
    if pattern.block:
        return largest_of_blocks(scores, pattern.keep, pattern.block)
    if by_row:
        return largest_share(scores, pattern.ratio)
    return largest_share(scores.reshape(1, -1), pattern.ratio).view_as(scores)
