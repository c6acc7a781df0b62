"""Sequences that begin alike, laid out so that what they share is computed once: a forest of tokens in rows.

Each choice of an item repeats the item's question, and each item of a task its examples. So sequences become the paths
of a forest: a node is a token in its place, and two sequences share the nodes of their common beginning. Trees are
written one after the other into rows of about the same length, which leaves next to no padding. A token attends to its
ancestors and itself, and its position is its depth: what a model computes for a node is what it computes for that token
in the sequence alone. That holds for attention by a mask and positions by number; `continuations.forest_holds` finds
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROOT = -1


@dataclass(frozen=True)
class Packed:
    """One row. tokens: of its nodes, in an order in which parents come first. parents: the place of each node's parent
    in the row, ROOT where it begins a sequence. depths: how many ancestors each has. paths: (sequence, places of its
    tokens in the row) of each sequence that lies here."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    paths: tuple[tuple[int, tuple[int, ...]], ...]


def pack(sequences: Sequence[Sequence[int]], capacity: int) -> list[Packed]:
    """Every sequence as a path of a row of at most `capacity` nodes, those that begin alike beside each other.

    sequences: token ids, none empty and none longer than `capacity`.
    """
    rows: list[Packed] = []
    row = _Row()
    for index in sorted(range(len(sequences)), key=lambda one: (tuple(sequences[one]), one)):
        sequence = sequences[index]
        assert 0 < len(sequence) <= capacity, (len(sequence), capacity)
        if row.nodes + row.more(sequence) > capacity:
            rows.append(row.packed())
            row = _Row()
        row.add(index, sequence)
    return [*rows, row.packed()] if row.nodes else rows


def row_of(sequences: Sequence[Sequence[int]]) -> Packed:
    """One row, the sequences in this order: each shares what it has in common with the one before it."""
    row = _Row()
    for index, sequence in enumerate(sequences):
        row.add(index, sequence)
    return row.packed()


class _Row:
    """A row that is being filled. A sequence shares nodes with the one before: with any, where they come sorted."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._depths: list[int] = []
        self._paths: list[tuple[int, tuple[int, ...]]] = []
        self._last: Sequence[int] = ()

    @property
    def nodes(self) -> int:
        return len(self._tokens)

    def more(self, sequence: Sequence[int]) -> int:
        """Nodes that the sequence would add."""
        return len(sequence) - self._shared(sequence)

    def add(self, index: int, sequence: Sequence[int]) -> None:
        shared = self._shared(sequence)
        path = list(self._paths[-1][1][:shared]) if shared else []
        for depth in range(shared, len(sequence)):
            self._tokens.append(sequence[depth])
            self._parents.append(path[-1] if path else ROOT)
            self._depths.append(depth)
            path.append(len(self._tokens) - 1)
        self._paths.append((index, tuple(path)))
        self._last = sequence

    def _shared(self, sequence: Sequence[int]) -> int:
        shared = 0
        for one, other in zip(self._last, sequence, strict=False):
            if one != other:
                break
            shared += 1
        return shared

    def packed(self) -> Packed:
        return Packed(tuple(self._tokens), tuple(self._parents), tuple(self._depths), tuple(self._paths))


@dataclass(frozen=True)
class Batch:
    """Rows as a model reads them. input_ids, position_ids: int64 [rows, length]. mask: [rows, 1, length, length] of the
    model's dtype, 0 where a token attends and the dtype's least number where it doesn't. A row's end is filled up with
    token 0, which attends to itself alone."""

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor


def batch_of(rows: Sequence[Packed], dtype: torch.dtype) -> Batch:
    """rows: some of them, of any lengths."""
    length = max(len(row.tokens) for row in rows)
    ids, positions = (torch.zeros(len(rows), length, dtype=torch.int64) for _ in range(2))
    seen = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    for number, row in enumerate(rows):
        ids[number, : len(row.tokens)] = torch.tensor(row.tokens)
        positions[number, : len(row.tokens)] = torch.tensor(row.depths)
        for node, parent in enumerate(row.parents):
            if parent != ROOT:
                seen[number, node] |= seen[number, parent]
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return Batch(ids, positions, mask.unsqueeze(1))
