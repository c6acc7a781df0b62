"""What a run will write, to the byte, known before it does: every file of weights with its safetensors header.

A weight's layout follows from its scheme and a block's from the model, so that nothing of them is estimated. Which
blocks go isn't known yet where some do (`depth`): the last ones stand for them, which is exact where blocks are alike.
What lies beside the weights is counted too, but for the records, whose numbers aren't known: a few kilobytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmshrink.checkpoint.beside import side_files
from llmshrink.formats import stored
from llmshrink.formats.stored import Layout
from llmshrink.model.sites import sites_of
from llmshrink.run import disk
from llmshrink.run.heldout import TOP
from llmshrink.run.job import Job
from llmshrink.run.shards import file_name, split

OUTSIDE = "outside"
RECORDS = 12_000
"""Bytes of llmshrink.json, timing.json, recipe.yaml and README.md beside what they say of each site."""
SITE_RECORD, TUNED_RECORD = 420, 400
"""Bytes that these and config.json say of a site; and how many more of one that is tuned."""
FILE_RECORD = 240
"""Bytes that these and the seal say of a file of weights."""
POSITION = 4 + 8 * TOP
"""Bytes that are kept of a held-out position; a token's id and mask are 9 more."""


@dataclass(frozen=True)
class Sizes:
    """files: bytes of each file of weights. tensors: bytes of all tensors, without the files' headers.

    linears, linear_weights: bytes and number of weights of the blocks' linears; weights: of everything.
    beside: bytes of what isn't weights: index, held-out reference, side files, records.
    """

    files: Mapping[str, int]
    tensors: int
    linears: int
    linear_weights: int
    weights: int
    beside: int

    @property
    def output(self) -> int:
        """Bytes of all files of weights."""
        return sum(self.files.values())

    @property
    def linear_bits_per_weight(self) -> float:
        """Of the blocks' linears, scales and zero-points included."""
        return 8 * self.linears / max(self.linear_weights, 1)

    @property
    def bits_per_weight(self) -> float:
        """Over all weights."""
        return 8 * self.tensors / max(self.weights, 1)


def sizes_of(job: Job) -> Sizes:
    """The sizes of a job's output."""
    linear, shapes = _linears(job)
    parts = _parts(job, linear)
    files: dict[str, int] = {}
    where: dict[str, str] = {}
    for stem, layout in parts.items():
        for number, names in enumerate(split(layout, job.options.max_shard_size)):
            name = file_name(stem, number)
            files[name] = disk.shard_size({each: layout[each] for each in names})
            where |= dict.fromkeys(names, name)
    inside = {name for layout in linear.values() for name in layout}
    inside |= {key for cache in job.caches for key in cache.scales}  # which weigh nothing in the model
    kept = [site.key for block in job.stages[: _blocks(job)] for site in sites_of(block)]
    linear_weights = sum(math.prod(shapes[key]) for key in kept)
    everything = {name: shape for layout in parts.values() for name, (_, shape) in layout.items()}
    return Sizes(
        files=files,
        tensors=sum(stored.nbytes(layout) for layout in parts.values()),
        linears=sum(stored.nbytes(linear[key]) for key in kept),
        linear_weights=linear_weights,
        weights=linear_weights + sum(math.prod(shape) for name, shape in everything.items() if name not in inside),
        beside=_beside(job, where, len(kept)),
    )


def outside_keys(job: Job, inside: Iterable[str] = ()) -> list[str]:
    """Keys of everything that is in no block, in the checkpoint's order. inside: further keys that go with a block."""
    chain = job.chain
    apart = {key for name, key in chain.skeleton.key_of.items() if name.startswith(chain.prefix + ".")} | set(inside)
    return [key for key in job.index if key not in apart]


def _blocks(job: Job) -> int:
    return len(job.stages) if job.structure is None else job.structure.blocks.after


def _linears(job: Job) -> tuple[dict[str, Layout], dict[str, tuple[int, int]]]:
    """By the key of each block's linear: its tensors, and its shape."""
    shapes = {site.key: (site.out_features, site.in_features) for site in job.sites}
    for fewer in job.structure.fewer if job.structure is not None else ():
        before, after = fewer.count.before, fewer.count.after
        for cut in fewer.cuts:
            rows, inputs = shapes[cut.consumer.key]
            shapes[cut.consumer.key] = (rows, inputs * after // before)
            for site, _ in cut.producers:
                rows, inputs = shapes[site.key]
                shapes[site.key] = (rows * after // before, inputs)
    schemes, scale_dtype = job.schemes, job.scale_dtype
    layouts = {}
    for site in job.sites:
        spec = job.assigned[site.name].spec
        dtype = scale_dtype if spec is not None and spec.quantize is not None else job.index.entry(site.key).dtype
        name = site.key.removesuffix(".weight")
        layouts[site.key] = stored.layout(name, schemes[site.name], shapes[site.key], dtype)
    return layouts, shapes


def _parts(job: Job, linear: Mapping[str, Layout]) -> dict[str, Layout]:
    """Each part's tensors, by the part's stem. linear: those of the blocks' linears, by key."""
    index = job.index
    parts: dict[str, Layout] = {
        OUTSIDE: {key: (index.entry(key).dtype, index.entry(key).shape) for key in outside_keys(job)}
    }
    of_block: dict[str, Layout] = {job.chain.name(number): {} for number in range(_blocks(job))}
    for name, key in job.chain.skeleton.key_of.items():
        layout = next((of_block[block] for block in _ancestors(name) if block in of_block), None)
        if layout is not None:
            layout |= linear.get(key) or {key: (index.entry(key).dtype, _vector(job, key, name, linear))}
    for cache, layout in zip(job.caches, of_block.values(), strict=False):
        layout |= dict.fromkeys(cache.scales, (job.scale_dtype, (1,)))
    return parts | {f"block-{number:05}": layout for number, layout in enumerate(of_block.values())}


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _vector(job: Job, key: str, name: str, linear: Mapping[str, Layout]) -> tuple[int, ...]:
    """The shape of a block's tensor that is no linear's weight; a bias is as long as its linear has rows."""
    weight = job.chain.skeleton.key_of.get(f"{name.removesuffix('.bias')}.weight")
    layout = linear.get(weight or "", {})
    if name.endswith(".bias") and list(layout) == [weight]:
        return layout[str(weight)][1][:1]
    return job.index.entry(key).shape


def _beside(job: Job, where: Mapping[str, str], sites: int) -> int:
    source = job.source.folder
    index = {"metadata": {"total_size": 10**10}, "weight_map": dict(sorted(where.items()))}
    trusted, apart = job.options.trust_remote_code, (job.options.output.absolute(),)
    side = sum(path.stat().st_size for path, _ in side_files(source, trust_remote_code=trusted, besides=apart))
    config = (source / "config.json").stat().st_size
    held_out = job.held_out.input_ids.numel() * (POSITION + 9)
    return (
        len(json.dumps(index, indent=2))
        + config
        + side
        + held_out
        + RECORDS
        + (SITE_RECORD + TUNED_RECORD * (job.recipe.tune is not None)) * sites
        + FILE_RECORD * len(set(where.values()))
    )
