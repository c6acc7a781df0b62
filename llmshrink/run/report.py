"""What a run says of itself: to the screen, to `--json`, and to the record that stays beside the weights.

The record (`llmshrink.json`) holds only what two runs of the same command must agree on, to the byte; seconds and
memory, which never agree, are in `timing.json`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmshrink.checkpoint.beside import NOTHING, LeftBehind
from llmshrink.run.heldout import Quality
from llmshrink.run.progress import duration
from llmshrink.run.progress import size as size


@dataclass(frozen=True)
class SiteRow:
    """One compressible weight. bits: None where it isn't quantized. bytes: as stored. error: relative to the output.

    pruned: how, as "alps 2:4"; None where it isn't. zeros: share of its weights that are zero, where it is.
    block_error: of its whole block's output on held-out windows, before and after the block was tuned, where it was;
        `error` is then of the site's own output on those windows.
    activations: what its inputs are rounded to where it is computed; None where they aren't.
    smooth: how much of what is loud in its inputs moved into its weights; None where nothing did.
    """

    name: str
    shape: tuple[int, int]
    bits: int | None
    group_size: int | None
    method: str | None
    bytes: int
    error: float | None
    damping: float | None
    note: str | None
    events: tuple[str, ...]
    pruned: str | None = None
    zeros: float | None = None
    block_error: tuple[float, float] | None = None
    activations: str | None = None
    smooth: float | None = None

    @property
    def changed(self) -> bool:
        """Whether anything happened to it."""
        return self.bits is not None or self.pruned is not None


@dataclass(frozen=True)
class VerifyReport:
    """What a reload of the checkpoint showed.

    against: what `engine` was held to. ok: value <= tolerance, where `measure` says what the value is, in nats.
    mean_difference, max_difference: of next-token log-probabilities, in nats. worst: the prompt that differs most.
    sealed: whether there was a seal, with the checksums of all that isn't weights; None: checksums weren't compared.
    damaged: weights, records and seals that aren't what the run wrote; with any, ok is False. changed: other files of
    which that is so. added: files that engines read and no run wrote; with weights among them, ok is False.
    """

    ok: bool
    engine: str
    against: str
    measure: str
    value: float
    tolerance: float
    positions: int
    mean_difference: float
    max_difference: float
    worst: str
    sealed: bool | None = None
    damaged: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for a person."""
        near = self.value <= self.tolerance
        found = [
            f"{'verified' if self.ok else 'NOT VERIFIED'}: {self.engine} against {self.against}: {self.measure} "
            f"{self.value:.2g} (tolerance {self.tolerance:g}); {self.positions} next-token log-probabilities differ by "
            f"{self.mean_difference:.2g} on average, {self.max_difference:.2g} at most"
        ]
        if not near:
            found.append(f"worst prompt: {self.worst}")
        if self.damaged:
            found.append(f"damaged: {', '.join(self.damaged)}: not what the run wrote; copy the folder again")
        if self.changed:
            found.append(f"changed since it was made: {', '.join(self.changed)}")
        if self.added:
            found.append(
                f"added since it was made: {', '.join(self.added)}: engines may read such files; take away what isn't "
                "yours"
            )
        if self.sealed is False and "verify/verified.json" not in self.damaged:
            found.append("no seal: verify/verified.json isn't there, so that only the weights' checksums were compared")
        return found


@dataclass(frozen=True)
class Pushed:
    """What became of publishing a result: url, or why not."""

    name: str
    url: str | None
    error: str | None

    def lines(self, output: Path) -> list[str]:
        """For a person; a result that wasn't published is whole all the same."""
        if self.error is None:
            return [f"pushed      {self.url}"]
        again = shlex.join(["llmshrink", "push", str(output), self.name])
        return [f"not pushed  {self.error}", f"            {output} is complete: {again}"]


@dataclass(frozen=True)
class QuantizeReport:
    """The closing summary. Sizes in bytes, seconds of wall time without imports, peak memory in bytes.

    structure: how the result's shape differs from the original's, in words; None where it doesn't. kv_cache: what keys
    and values are cached in, in words; None where nothing says. left_behind: what of the source's folder isn't carried
    over.
    """

    output: Path
    model: str
    recipe: str
    bytes_before: int
    bytes_after: int
    quality: Quality
    held_out: str
    structure: str | None
    kv_cache: str | None
    sites: tuple[SiteRow, ...]
    notes: tuple[str, ...]
    blocks: int
    blocks_kept: int
    seconds: float
    peak_memory: int
    serve: str
    verification: VerifyReport | None
    left_behind: LeftBehind = NOTHING
    pushed: Pushed | None = None

    @property
    def ok(self) -> bool:
        """Whether the checkpoint read back as it was computed (or wasn't asked to be verified), and got to the Hub."""
        verified = self.verification is None or self.verification.ok
        return verified and (self.pushed is None or self.pushed.error is None)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {**asdict(self), "output": str(self.output), "ok": self.ok}

    def lines(self) -> list[str]:
        """The closing summary for a person."""
        q = self.quality
        ratio = self.bytes_before / self.bytes_after
        change = f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger"
        found = [
            f"{self.model} -> {self.output}  ({self.recipe})",
            f"size        {size(self.bytes_before)} -> {size(self.bytes_after)}  ({change})",
            *([f"structure   {self.structure}"] if self.structure else []),
            f"sites       {changes(self.sites)}, {sum(not row.changed for row in self.sites)} left as they were",
            *([f"kv cache    {self.kv_cache}"] if self.kv_cache else []),
            f"perplexity  {q.ppl_before:.3f} -> {q.ppl_after:.3f}  on {q.tokens} held-out tokens of {self.held_out}",
            f"KL          {q.kl_mean:.5f} +- {q.kl_stderr:.5f} nats/token, same first choice {q.top1_agreement:.1%}",
            f"time        {duration(self.seconds)} ({self.seconds:.1f} s), peak memory {self.peak_memory / 1e9:.2f} GB"
            + (f", {self.blocks_kept} of {self.blocks} blocks kept from an earlier run" if self.blocks_kept else ""),
        ]
        if self.verification is not None:
            found += self.verification.lines()
        found += [f"note        {note}" for note in [*self.notes, *self.left_behind.lines()]]
        found.append(f"serve       {self.serve}")
        return found + (self.pushed.lines(self.output) if self.pushed else [])


def changes(rows: Sequence[SiteRow]) -> str:
    """How many sites were pruned and how many quantized: "28 quantized", "42 pruned (alps 2:4), 42 quantized"."""
    found = []
    pruned = [row.pruned for row in rows if row.pruned is not None]
    if pruned:
        found.append(f"{len(pruned)} pruned ({', '.join(sorted(set(pruned)))})")
    quantized = sum(row.bits is not None for row in rows)
    if quantized:
        found.append(f"{quantized} quantized")
    return ", ".join(found) or "none changed"


def fallen_notes(rows: Sequence[SiteRow]) -> list[str]:
    """One line for each way in which sites didn't get what the recipe asks, counted; and for each event."""
    counts: dict[str, list[str]] = {}
    for row in rows:
        for line in ([row.note] if row.note else []) + list(row.events):
            counts.setdefault(line, []).append(row.name)
    return [
        f"{len(names)} sites: {line} ({names[0]}{', ...' if len(names) > 1 else ''})" for line, names in counts.items()
    ]


def summary_of(record: Mapping[str, Any]) -> str | None:
    """What a record (llmshrink.json) says of another shape than the original's, in words; older ones knew of none."""
    structure = record.get("structure")
    return None if structure is None else str(structure["summary"])


def cache_of(record: Mapping[str, Any]) -> str | None:
    """What a record (llmshrink.json) says keys and values are cached in, in words; older ones knew of none."""
    found = record.get("kv_cache")
    if not found:
        return None
    keys, values = ([scales[i] for scales in found.values()] for i in (0, 1))
    return (
        f"FP8 (E4M3) in {len(found)} layers, scales {min(keys):.3g} to {max(keys):.3g} for keys and "
        f"{min(values):.3g} to {max(values):.3g} for values"
    )


def rows_of(stored: Sequence[dict[str, Any]]) -> list[SiteRow]:
    """Site rows from JSON. Raises ValueError, TypeError or KeyError for what isn't one, field by field."""
    from pydantic import TypeAdapter

    rows = [SiteRow(**{**row, "shape": tuple(row["shape"]), "events": tuple(row["events"])}) for row in stored]
    found = TypeAdapter(list[SiteRow]).validate_python([asdict(row) for row in rows])
    for row in found:
        if row.activations not in (None, "int8", "fp8") or min(*row.shape, row.bytes, row.bits or 1) < 0:
            raise ValueError(f"{row.name}: not what a run writes")
    return found
