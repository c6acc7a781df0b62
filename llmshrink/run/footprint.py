"""What a run holds in memory at its fullest, from the facts that it decides by.

A run never holds the model: it holds a block, the streams of activations, and what a method works with. So its peak is
what the process has before it starts, its libraries above all, and the largest of a few moments. The streams live on
the device; where they don't fit they live in files.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmshrink.model.sites import sites_of
from llmshrink.run.job import Job


@dataclass(frozen=True)
class Footprint:
    """Bytes beside what the process has anyway: ram, and on a CUDA device vram. streams: of the activations."""

    ram: int
    vram: int
    streams: int


def footprint(job: Job, *, keep_paused: bool, in_files: bool) -> Footprint:
    """The most that a run of `job` adds to its process."""
    chain = job.chain
    itemsize = chain.skeleton.dtype.itemsize
    width = chain.skeleton.model.config.get_text_config().hidden_size
    tokens = sum(batch.input_ids.numel() for batch in job.batches)
    two = any("cross" in reads for reads in job.reads.values())
    held = sum(batch.input_ids.numel() for batch in job.batches if batch.held_out)
    carried = ((tokens - held) * (1 + two) if any(job.reads.values()) else 0) + 2 * held
    streams = carried * width * itemsize
    widest = max((site.in_features for site in job.sites), default=width)
    paused = carried * (width + widest) * itemsize if keep_paused else 0
    largest = 0
    for stages in job.stages:
        weights = sum(site.out_features * site.in_features for site in sites_of(stages))
        stage = 0
        for each in stages:
            rows, inputs = sum(site.out_features for site in each.sites), each.sites[0].in_features
            stage = max(stage, 4 * (2 + 2) * inputs * inputs + 4 * 6 * rows * inputs)
        largest = max(largest, 3 * weights * itemsize + stage)
    return Footprint((0 if in_files else streams) + paused + largest, 0, streams)
