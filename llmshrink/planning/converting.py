"""The plan of a conversion: its weights are read once, as the conversion does to see that the format can hold them.

One block of it is run on the held-out windows, to tell what the verification will take.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from llmshrink_eval.listing import below, named

from llmshrink.calibration.activations import Batch
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.formats import stored
from llmshrink.formats.stored import Format
from llmshrink.model.chain import Chain
from llmshrink.planning.engines import engines
from llmshrink.planning.found import fitting
from llmshrink.planning.probe import writing
from llmshrink.planning.report import Plan
from llmshrink.planning.spent import Measured, Spent, once
from llmshrink.run import disk
from llmshrink.run.convert import Conversion, check
from llmshrink.run.footprint import LIBRARIES
from llmshrink.run.memory import resident
from llmshrink.run.output import check_output, partial_folder
from llmshrink.run.verify import arithmetic_of, chain_of, device_of, held_out_batches, read_reference

PASSES = 1.5
"""What storing the linears anew takes, in times of reading and decoding them."""
DECODED = 10
"""Bytes that a weight takes while it is brought from one format to the other."""


def plan(source: Path, output: Path, format: Format, *, overwrite: bool) -> Plan:
    """What `convert` needs and yields. Raises as it would; writes nothing."""
    if not partial_folder(Path(os.path.abspath(output))).exists():
        check_output(Path(os.path.abspath(output)), overwrite=overwrite)
    record, config = check(source, output, format)
    with CheckpointIndex.open(source) as index:
        reading, conversion = once(lambda: Conversion.of(record, config, index, format))
        files = {name: disk.shard_size(layout) for name, layout in conversion.files().items()}
        tensors = list(conversion.files().values())
        linear = sum(stored.nbytes(conversion.layout(name)) for name in conversion.after)
        weights = sum(math.prod(shape) for shape in conversion.shapes.values())
        before = index.nbytes()
    everything = sum(map(stored.nbytes, tensors))
    others = [index.entry(key) for key in index if key not in conversion.old_keys()]
    all_weights = weights + sum(math.prod(entry.shape) for entry in others)
    beside = sum(path.stat().st_size for path in below(source) if path.is_file() and path.parent != source)
    beside += sum(path.stat().st_size for path in named(source, "*") if path.is_file() and path.name not in files)
    # Building the model brings the libraries that the verification will hold.
    largest = max((math.prod(shape) for shape in conversion.shapes.values()), default=0)
    flush, byte = writing(output)
    times = Measured(took=reading)
    times.add("reading", reading)
    times.add("storing", reading * PASSES)
    times.add("verification", _verifying(source, record))
    times.add("writing", flush * len(files) + byte * everything)
    made = Plan(
        model=str(source),
        recipe=f"to {format}",
        download_bytes=0,
        peak_ram_bytes=resident() + LIBRARIES + max(files.values()) + DECODED * largest,
        peak_vram_bytes=0,
        disk_bytes=sum(files.values()) + beside,
        output_bytes=sum(files.values()),
        source_bytes=before,
        bits_per_weight=8 * everything / max(1, all_weights),
        linear_bits_per_weight=8 * linear / max(1, weights),
        seconds=None,
        cpu_seconds=None,
        parts={},
        activations="a file of weights at a time",
        arithmetic={"verification": arithmetic_of(record, device_of(record))},
        engines=engines([*record["format_notes"][format], *record.get("cpu_notes", [])], format),
        notes=tuple(record["format_notes"][format]),
        faults=(),
        probe_seconds=0.0,
    )
    return fitting(made.timed(times), output)


def _verifying(source: Path, record: dict[str, Any]) -> Spent:
    """What the reload of the result will take: one block of the source, which is as large decoded, times all."""
    device = device_of(record)
    batches = held_out_batches(read_reference(source), record["identity"]["batch_size"])
    with ExitStack() as stack:
        opening, chain = once(lambda: stack.enter_context(chain_of(source, record, device)))
        return _once_and_all(chain, batches, opening)


def _once_and_all(chain: Chain, batches: Sequence[Batch], opening: Spent) -> Spent:
    """What opening took, with the embedding, and one block's loading and running for every block."""
    embedding, hidden = once(lambda: [chain.embed(batch) for batch in batches])
    chain.release_outside()
    loading, _ = once(lambda: chain.skeleton.load(chain.name(0)))

    def forward() -> None:
        with torch.no_grad():
            for batch, each in zip(batches, hidden, strict=True):
                chain.calls(batch)[0].run(chain.blocks[0], each)

    running, _ = once(forward)
    chain.skeleton.release(chain.name(0))
    return opening + embedding + (loading + running) * len(chain.blocks)
