"""What a compressed checkpoint is made of, read from its headers: bits, groups, bytes and errors by site."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmshrink.checkpoint.files import read_config
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.formats import kv_cache, stored
from llmshrink.run.report import SiteRow, cache_of, rows_of, size, summary_of
from llmshrink.run.verify import read_record


@dataclass(frozen=True)
class InspectReport:
    """bits_per_weight are stored bits over original weights: of the quantized and unquantized linears, and of all.

    structure: how its shape differs from the original's, in words; None where it doesn't. The weights are those it has.
    kv_cache: what keys and values are cached in, in words; None where nothing says.
    """

    folder: Path
    model: str
    recipe: str
    structure: str | None
    kv_cache: str | None
    sites: tuple[SiteRow, ...]
    weights: int
    bytes: int
    linear_bits_per_weight: float
    bits_per_weight: float
    quality: dict[str, Any]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    def lines(self) -> list[str]:
        width = max((len(row.name) for row in self.sites), default=4)
        pruned = any(row.pruned is not None for row in self.sites)
        head = f"{'site':{width}}  {'shape':>13}  bits  group      bytes     error"
        found = [f"{head}   zeros  pruned" if pruned else head]
        for row in self.sites:
            shape = f"{row.shape[0]}x{row.shape[1]}"
            bits, group = (str(row.bits), _group(row)) if row.bits is not None else (_stored_bits(row), "-")
            error = f"{row.error:.6f}" if row.error is not None else "-"
            line = f"{row.name:{width}}  {shape:>13}  {bits:>4}  {group:>5}  {row.bytes:>9}  {error:>8}"
            zeros = f"{row.zeros:.1%}" if row.zeros is not None else "-"
            found.append(f"{line}  {zeros:>6}  {row.pruned or '-'}" if pruned else line)
        found += [
            "",
            f"{self.model}, {self.recipe}: {size(self.bytes)} of weights",
            *([f"structure    {self.structure}"] if self.structure else []),
            *(f"activations  {said}" for said in _rounded(self.sites)),
            *([f"kv cache     {self.kv_cache}"] if self.kv_cache else []),
            f"bits/weight  {self.linear_bits_per_weight:.3f} in the blocks' linears, "
            f"{self.bits_per_weight:.3f} over all {self.weights} weights",
        ]
        return found + [f"note         {note}" for note in self.notes]


def _rounded(rows: Sequence[SiteRow]) -> list[str]:
    counts = Counter(row.activations for row in rows if row.activations is not None)
    found = [f"inputs of {count} sites are rounded to {kind}, token by token" for kind, count in counts.items()]
    smooth = Counter(row.smooth for row in rows if row.smooth is not None)
    return found + [f"inputs of {count} sites are smoothed, with alpha {alpha:g}" for alpha, count in smooth.items()]


def _group(row: SiteRow) -> str:
    """Products of 8 bits have one scale a row whatever was asked for."""
    return str(row.group_size) if row.activations is None else "row"


def _stored_bits(row: SiteRow) -> str:
    return f"{8 * row.bytes / max(math.prod(row.shape), 1):.0f}"


def inspect(folder: Path) -> InspectReport:
    """Describe an output of llmshrink. Raises SourceError when it isn't one, CheckpointError when it's damaged."""
    record = read_record(folder)
    rows = tuple(rows_of(record["sites"]))
    with CheckpointIndex.open(folder) as index:
        config = read_config(folder)
        schemes = stored.schemes(config.get("quantization_config"), index)
        packed = {key for name, scheme in schemes.items() for key in stored.names(name, scheme)}
        packed |= {key for name in record.get("kv_cache") or () for key in kv_cache.keys_of(name)}
        others = sum(math.prod(index.entry(key).shape) for key in index if key not in packed)
        total = index.nbytes()
    linear = sum(math.prod(row.shape) for row in rows)
    weights = others + sum(math.prod(row.shape) for row in rows if row.name in schemes)
    return InspectReport(
        folder=folder,
        model=record["model"],
        recipe=record["recipe"],
        structure=summary_of(record),
        kv_cache=cache_of(record),
        sites=rows,
        weights=weights,
        bytes=total,
        linear_bits_per_weight=8 * sum(row.bytes for row in rows) / max(linear, 1),
        bits_per_weight=8 * total / max(weights, 1),
        quality=record["quality"],
        notes=tuple(record["notes"]),
    )
