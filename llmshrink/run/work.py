"""What is done to each block of a walk, and how a block that an earlier process finished is passed again.

A run (`run.quantize`) knows nothing of what is done: it walks the blocks with a `Work`, writes what comes back as a
part, and is killed and goes on. `SiteWork` prunes and quantizes the weights of sites and keeps the model's shape;
`run.narrow` and `run.depth` are the works of a model that becomes smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from llmshrink.checkpoint.conserve import Ledger
from llmshrink.formats import stored
from llmshrink.formats.stored import Scheme
from llmshrink.methods.learned import offsets
from llmshrink.model.sites import Site, sites_of
from llmshrink.run import disk
from llmshrink.run.job import Job
from llmshrink.run.journal import Part
from llmshrink.run.report import SiteRow
from llmshrink.run.shards import open_shards
from llmshrink.run.transform import replay_block, transform_block
from llmshrink.run.walk import SolvedBlock, SolvedSite, Walk
from llmshrink.weights import CacheScales, Dense, GroupedInt, Solvable

OFFSETS = "offsets"
"""The folder, in a checkpoint that is to be taught, of what its codes were rounded from."""


@dataclass(frozen=True, eq=False)
class Finished:
    """A block as the output stores it.

    tensors: by output key. rows: of its sites, for the report. state: for progress, their mean error, or a word.
    seconds: wall time by site, for timing.json.
    """

    tensors: dict[str, Tensor]
    rows: list[SiteRow]
    state: float | str
    seconds: dict[str, float]


class Work(Protocol):
    """What happens to each block: `solve` carries both streams through it, and so does `replay` for a finished one.

    inside: keys of the source that are written with their blocks though the model's class doesn't know them. ledger:
    what became of each tensor of the source. config: config.json of the result, from the original's. structure: what
    the record says of another shape, with a `summary`; None where the result has the original's.
    """

    @property
    def inside(self) -> frozenset[str]: ...
    @property
    def structure(self) -> dict[str, Any] | None: ...
    def solve(self, walk: Walk, number: int) -> Finished: ...
    def replay(self, walk: Walk, number: int, part: Part) -> None: ...
    def ledger(self) -> Ledger: ...
    def config(self, config: dict[str, Any]) -> dict[str, Any]: ...


class SiteWork:
    """Sites are pruned or quantized as the job says. checkpoint: where finished shards are."""

    def __init__(self, job: Job, checkpoint: Path) -> None:
        self._job, self._checkpoint = job, checkpoint
        self._schemes, self._specs = job.schemes, job.specs
        stages = [stage for block in job.stages for stage in block if stage.sites[0].name in job.smoothing]
        self._alphas = {site.name: job.smoothing[each.sites[0].name].alpha for each in stages for site in each.sites}

    def solve(self, walk: Walk, number: int) -> Finished:
        sites = sites_of(self._job.stages[number])
        block = transform_block(walk, number, self._job.stages[number])
        if self._job.recipe.teaches_codes:
            _keep_offsets(self._checkpoint / OFFSETS, number, block)
        tensors = block_tensors(block, {site.key: self._schemes[site.name] for site in sites}) | dict(block.cache)
        rows = [self._row(site, block.solved.get(site.key), tensors) for site in sites]
        errors = [solved.error for solved in block.solved.values()]
        state: float | str = sum(errors) / len(errors) if errors else 0.0
        if block.tuned is not None:
            before, after = block.tuned
            rows = [replace(row, block_error=block.tuned) if row.changed else row for row in rows]
            state = f"error {state:.5f}  block tuned {before:.5f} -> {after:.5f}"
        seconds = {solved.site.name: solved.seconds for solved in block.solved.values()}
        return Finished(tensors, rows, state, seconds)

    def replay(self, walk: Walk, number: int, part: Part) -> None:
        with open_shards(self._checkpoint, part.shards) as shards:
            weights = {
                site.local: stored.whole(
                    stored.read(site.key.removesuffix(".weight"), shards.read, self._schemes[site.name])
                )
                for site in sites_of(self._job.stages[number])
                if site.name in self._specs
            }
            scales = [shards.read(key) for key in self._job.caches[number].scales] if self._job.caches else []
            others = {name: shards.read(key) for name, key in self._smoothed(number).items()}
        sites = [site for site in sites_of(self._job.stages[number]) if site.name in self._specs]
        rounded = {site.local: self._specs[site.name].activations for site in sites}
        activations = {local: kind for local, kind in rounded.items() if kind is not None}
        replay_block(walk, number, weights, activations, CacheScales(*scales) if scales else None, others)

    def _smoothed(self, number: int) -> dict[str, str]:
        """Path inside a block -> key, of what was smoothed and not quantized: norms, and linears that stay."""
        job = self._job
        taps = [stage.sites[0].name for stage in job.stages[number]]
        solved = {site.key for site in sites_of(job.stages[number]) if site.name in self._specs}
        return {
            name: key
            for tap in taps
            if tap in job.smoothing
            for name, key in job.smoothing[tap].parameters.items()
            if key not in solved
        }

    @property
    def inside(self) -> frozenset[str]:
        return frozenset()

    @property
    def structure(self) -> None:
        return None

    def ledger(self) -> Ledger:
        ledger, by_key = Ledger(), {site.key: site for site in self._job.sites}
        ledger.added.update(key for cache in self._job.caches for key in cache.scales)
        smoothed = {key for number in range(len(self._job.stages)) for key in self._smoothed(number).values()}
        ledger.replaced |= {key: [key] for key in smoothed}
        for key in self._job.index:
            if key in smoothed:
                continue
            site = by_key.get(key)
            if site is None or site.name not in self._specs:
                ledger.copied.add(key)
            else:
                ledger.replaced[key] = stored.names(key.removesuffix(".weight"), self._schemes[site.name])
        return ledger

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """As it is, with a quantization_config: nothing that a class doesn't know gets lost."""
        job = self._job
        described = stored.quantization_config(self._schemes, job.other_linears, job.format, kv_cache=bool(job.caches))
        return config if described is None else {**config, "quantization_config": described}

    def _row(self, site: Site, solved: SolvedSite | None, tensors: Mapping[str, Tensor]) -> SiteRow:
        prune, quantize = (solved.spec.prune, solved.spec.quantize) if solved else (None, None)
        return SiteRow(
            name=site.name,
            shape=(site.out_features, site.in_features),
            bits=quantize.bits if quantize else None,
            group_size=quantize.group_size if quantize else None,
            method=quantize.method if quantize else None,
            bytes=bytes_of(site.key, tensors, self._schemes[site.name]),
            error=solved.error if solved else None,
            damping=solved.damping if solved else None,
            note=self._job.assigned[site.name].note,
            events=solved.events if solved else (),
            pruned=f"{prune.method} {prune.pattern}" if prune else None,
            zeros=zeros_of(solved.weight) if solved and prune else None,
            activations=solved.spec.activations if solved else None,
            smooth=self._alphas.get(site.name),
        )


def _keep_offsets(folder: Path, number: int, block: SolvedBlock) -> None:
    """Beside the checkpoint, how far each weight was from its code: where training them goes on from.

    By site, float16 [out_features, in_features], in units of the code. A block that is solved again writes the same.
    """
    folder.mkdir(exist_ok=True)
    found = {
        each.site.name: offsets(each.residual, each.weight.scale).half()
        for each in block.solved.values()
        if each.residual is not None and isinstance(each.weight, GroupedInt)
    }
    disk.write_tensors(folder / f"block-{number:05}.safetensors", found)


def bytes_of(key: str, tensors: Mapping[str, Tensor], scheme: Scheme | None = None) -> int:
    """Bytes of a site's weight, in however many tensors it is stored. key: of the original weight."""
    return sum(tensors[name].nbytes for name in stored.names(key.removesuffix(".weight"), scheme))


def block_tensors(block: SolvedBlock, schemes: Mapping[str, Scheme | None]) -> dict[str, Tensor]:
    """The block's tensors as the output stores them: solved weights packed, everything else as it was.

    schemes: by the key of the weight that is replaced.
    """
    tensors: dict[str, Tensor] = {}
    for key, tensor in block.stored.items():
        if key not in block.solved:
            tensors[key] = tensor
            continue
        weight = block.solved[key].weight
        if isinstance(weight, Dense):
            # A mask times a negative weight is -0.0, and formats that leave zeros out don't keep its sign.
            weight = Dense(weight.weight.to(tensor.dtype) + 0.0)
        tensors |= stored.tensors(key.removesuffix(".weight"), stored.as_stored(weight, schemes[key]))
    return tensors


def zeros_of(weight: Solvable) -> float:
    """The share of a weight that is exactly zero as it is stored."""
    # No scale is so small that its product with a code could be lost.
    return float((weight.dequantize() == 0).double().mean())
