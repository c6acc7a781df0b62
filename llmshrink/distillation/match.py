"""Hidden states beside probabilities: a student's blocks are to say what the teacher's say.

At every position that counts, and at every block of the student with the teacher's block that it is matched with,

    E = |P h_s - h_t|^2 / |h_t|^2

the squared error relative to the teacher's own state there: states grow from block to block, and a few positions (the
first of a text) are hundreds of times larger than the others, which a plain mean would be about. The mean of E over
blocks and positions is added to the loss, times the weight that the user gives.

P is one linear map for all blocks [teacher's width, student's width], as what they write into has one basis (Jiao et
al. 2020, TinyBERT, eq. 8). It starts as the identity, or as an orthogonal one where the widths differ, is trained with
the student at the weights' learning rate, and isn't part of what is written in the end; the Trainer's checkpoints have
it. A block of a student with fewer blocks is matched with the one it was, where its record says so, else evenly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmshrink.model.blocks import find_blocks


class HiddenMatch(nn.Module):
    """weight: of the error in the loss. pairs: the teacher's block of each of the student's.

    student, teacher: transformers models; neither becomes part of this module.
    """

    def __init__(self, student: Any, teacher: Any, pairs: Sequence[int], weight: float, *, seed: int) -> None:
        super().__init__()
        self.weight = weight
        blocks, others = find_blocks(student)[1], find_blocks(teacher)[1]
        self._blocks = (blocks, [others[number] for number in pairs])
        widths = [model.config.get_text_config().hidden_size for model in (teacher, student)]
        start = torch.eye(widths[1])
        if widths[0] != widths[1]:
            start = nn.init.orthogonal_(torch.empty(*widths), generator=torch.Generator().manual_seed(seed))
        self.projection = nn.Parameter(start)

    def watch_student(self) -> Any:
        """While open, what the student's blocks put out is kept: a context of `Tensor`s by block."""
        return _watching(self._blocks[0])

    def watch_teacher(self) -> Any:
        """Likewise the matched blocks of the teacher."""
        return _watching(self._blocks[1])

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], where: Tensor) -> Tensor:
        """The error's mean over blocks, summed over the positions `where`.

        student, teacher: [batch, length, width] of each block; where: bool [batch, length].
        """
        total = self.projection.new_zeros(())
        for ours, theirs in zip(student, teacher, strict=True):
            made = nn.functional.linear(ours[where].to(self.projection.dtype), self.projection)
            target = theirs[where].to(self.projection.dtype)
            size = target.square().sum(-1).clamp_min(torch.finfo(target.dtype).tiny)
            total = total + ((made - target).square().sum(-1) / size).sum()
        return total / len(student)


@contextmanager
def _watching(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Hooks, and only for one forward: gradient checkpointing runs the blocks again in the backward."""
    found: list[Tensor] = []

    def keep(block: nn.Module, arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def matched_blocks(student: int, teacher: int, structure: Mapping[str, Any] | None) -> list[int]:
    """The teacher's block of each of the student's. student, teacher: how many they have.

    structure: of the student's record, where it has one: which blocks were dropped. Else evenly, last with last.
    """
    if structure is not None and structure.get("kind") == "depth" and structure["blocks"] == [teacher, student]:
        return [number for number in range(teacher) if number not in structure["dropped"]]
    return [-(-(number + 1) * teacher // student) - 1 for number in range(student)]
