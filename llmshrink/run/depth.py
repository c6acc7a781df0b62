"""Fewer blocks: which go is found in a pass of its own over the original, then the others are copied and renumbered.

By `angular` distance (Gromov et al. 2024, arXiv 2403.17887; ShortGPT, arXiv 2403.03853, takes the cosine itself): a
block whose output points where its input did changes little, so those with the smallest mean of arccos(cos(x, f(x))) /
pi over the calibration tokens go. By `loss`: those whose absence moves the model least, mean KL(original || without)
over a part of the calibration tokens. On wiki7m the angle chooses better (KL with 4 of 6 blocks .824 against .872).

The choice is kept in the journal, so that a run that goes on needn't make it again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmshrink.calibration.activations import Batch, Stream
from llmshrink.checkpoint.conserve import Ledger
from llmshrink.errors import CheckpointError
from llmshrink.model.chain import Chain
from llmshrink.model.sites import sites_of
from llmshrink.run.heldout import divergences
from llmshrink.run.job import Job
from llmshrink.run.journal import Part
from llmshrink.run.memory import free_memory
from llmshrink.run.report import SiteRow
from llmshrink.run.structure import Structure
from llmshrink.run.walk import Forwards, Walk
from llmshrink.run.work import Finished, bytes_of

LOSS_TOKENS = 8192
"""Tokens that each block is left out on: every block makes another model, which is run to its end."""


class DepthWork:
    """Fewer blocks, as the job's structure says. `settle` must be told which before anything is solved."""

    def __init__(self, job: Job, structure: Structure) -> None:
        self._job, self._structure = job, structure
        self._dropped: list[int] = []
        self._scores: list[float] = []
        first = f"{job.chain.name(0)}."
        name, key = next((name, key) for name, key in job.chain.skeleton.key_of.items() if name.startswith(first))
        start = key.removesuffix(name.removeprefix(first)).removesuffix("0.")  # "model.layers.", or "layers."
        found = {key: re.match(rf"{re.escape(start)}(\d+)\.", key) for key in job.index}
        # Some checkpoints have tensors under a block's number that its class doesn't know: they go with the block; and
        # some under the numbers after the last block's: they keep following it, and are written with it.
        self._place = {key: (int(match[1]), match.start(1), match.end(1)) for key, match in found.items() if match}

    @property
    def inside(self) -> frozenset[str]:
        return frozenset(self._place)

    def analyse(self, spill: Path | None, room: Path) -> dict[str, Any]:
        """Choose the blocks that go.

        spill: the folder of activations where memory can't hold one stream, else None; room: where more of them may go.
        """
        assert self._structure.depth is not None
        batches = [batch for batch in self._job.batches if not batch.held_out]
        if self._structure.depth.by == "angular":
            scores = angles(self._job.chain, batches, spill)
        else:
            scores = losses(self._job.chain, batches, spill, room)
        wrong = next((number for number, score in enumerate(scores) if not math.isfinite(score)), None)
        if wrong is not None:
            raise CheckpointError(
                f"{self._job.chain.name(wrong)}: its output has NaN or Inf in {self._job.chain.skeleton.dtype}; "
                "run in float32 with --dtype float32, or check the calibration text"
            )
        drop = self._structure.blocks.before - self._structure.blocks.after
        order = sorted(range(len(scores)), key=lambda number: (scores[number], number))
        return {"dropped": sorted(order[:drop]), "scores": scores}

    def settle(self, choice: dict[str, Any]) -> None:
        """Go by what `analyse` chose, now or in an earlier process."""
        self._dropped, self._scores = choice["dropped"], choice["scores"]

    @property
    def summary(self) -> str:
        """One line for the user."""
        found: str = self.structure["summary"]
        return found

    @property
    def structure(self) -> dict[str, Any]:
        depth, blocks = self._structure.depth, self._structure.blocks
        assert depth is not None
        gone = ", ".join(self._job.chain.name(number) for number in self._dropped)
        return {
            "kind": "depth",
            "summary": f"blocks {blocks}, without {gone}, chosen by {'angle' if depth.by == 'angular' else 'loss'}",
            "blocks": [blocks.before, blocks.after],
            "dropped": self._dropped,
            "by": depth.by,
            "scores": self._scores,
        }

    def solve(self, walk: Walk, number: int) -> Finished:
        stored, blocks = self._carry(walk, number), self._structure.blocks.before
        dropped = number in self._dropped
        source = {} if dropped else dict(stored)
        for key, (at, _, _) in self._place.items():
            if (at == number and not dropped and key not in stored) or (at >= blocks and number == blocks - 1):
                source[key] = self._job.index.read(key)
        tensors = {self._renamed(key): tensor for key, tensor in source.items()}
        if dropped:
            return Finished(tensors, [], "dropped", {})
        new = number - sum(gone < number for gone in self._dropped)
        rows = [
            SiteRow(
                name=f"{self._job.chain.name(new)}.{site.local}",
                shape=(site.out_features, site.in_features),
                bits=None,
                group_size=None,
                method=None,
                bytes=bytes_of(self._renamed(site.key), tensors),
                error=None,
                damping=None,
                note=None,
                events=(),
            )
            for site in sites_of(self._job.stages[number])
        ]
        return Finished(tensors, rows, "copied", {})

    def replay(self, walk: Walk, number: int, part: Part) -> None:
        self._carry(walk, number)

    def _carry(self, walk: Walk, number: int) -> dict[str, Tensor]:
        """Both streams through a block, or the original's past one that goes; the block's tensors by source key."""
        chain = walk.chain
        stored = chain.load_block(number)
        block = chain.blocks[number]
        forwards = Forwards(walk, number, block, block)
        if number in self._dropped:
            for i, batch in enumerate(walk.batches):
                if walk.carries(batch, original=True):
                    forwards.finish(i, True)
        else:
            forwards.finish_all()
        chain.skeleton.release(chain.name(number))
        return stored

    def ledger(self) -> Ledger:
        ledger = Ledger()
        for key in self._job.index:
            if key not in self._place:
                ledger.copied.add(key)
            elif self._place[key][0] in self._dropped:
                ledger.dropped[key] = "its block is left out"
            else:
                ledger.replaced[key] = [self._renamed(key)]
        return ledger

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        resolved = self._job.chain.skeleton.model.config.get_text_config().to_dict()
        return shallower(config, self._structure.blocks.before, self._dropped, resolved)

    def _renamed(self, key: str) -> str:
        number, start, stop = self._place[key]
        return f"{key[:start]}{number - sum(gone < number for gone in self._dropped)}{key[stop:]}"


def shallower(
    config: dict[str, Any], blocks: int, dropped: Sequence[int], resolved: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json without some blocks. resolved: its fields as transformers has them, with those that follow.

    A list with an entry for each of `blocks` blocks (layer_types, no_rope_layers) loses those of the dropped ones. One
    that isn't there, because it follows from the number of a block, is written out where blocks differ.
    """
    kept = [number for number in range(blocks) if number not in dropped]
    changed = {**config, "num_hidden_layers": len(kept)}
    for name in {**config, **resolved}:
        said = config.get(name)
        value = said if isinstance(said, list) else resolved.get(name)
        if "layer" not in name or not isinstance(value, list) or len(value) != blocks:
            continue
        if value is said or any(entry != value[0] for entry in value):
            changed[name] = [value[number] for number in kept]
    first = config.get("max_window_layers")  # blocks from this one on have a sliding window
    if isinstance(first, int):
        changed["max_window_layers"] = first - sum(number < first for number in dropped)
    return changed


def angles(chain: Chain, batches: Sequence[Batch], spill: Path | None) -> list[float]:
    """Mean angle between each block's input and output, as a share of pi, over the batches' real tokens."""
    stream, found = embedded(chain, batches, spill and spill / "original"), []
    for number, block in enumerate(chain.blocks):
        chain.load_block(number)
        total, tokens = 0.0, 0
        for i, batch in enumerate(batches):
            before = stream.get(i)
            with torch.no_grad():
                after = chain.calls(batch)[number].run(block, before)
            stream.put(i, after)
            one, other = batch.real(before).float(), batch.real(after).float()
            cosine = torch.nn.functional.cosine_similarity(one, other, dim=-1).clamp(-1.0, 1.0)
            total += float(cosine.acos().double().sum()) / math.pi
            tokens += len(one)
        chain.skeleton.release(chain.name(number))
        found.append(total / tokens)
    for i in range(len(batches)):
        stream.drop(i)
    return found


def losses(chain: Chain, batches: Sequence[Batch], spill: Path | None, room: Path) -> list[float]:
    """Mean KL(original || without the block) of each block in nats per token, on the first LOSS_TOKENS tokens.

    All models without one block are walked together, so that a block is read once for all of them; each is the original
    up to the block that it is without.
    """
    few, tokens = [], 0
    for batch in batches:
        if tokens < LOSS_TOKENS:
            rows = max(1, (LOSS_TOKENS - tokens) // batch.input_ids.shape[1])
            mask = None if batch.mask is None else batch.mask[:rows]
            few.append(replace(batch, input_ids=batch.input_ids[:rows], mask=mask))
            tokens += few[-1].input_ids.numel()
    width = chain.skeleton.model.config.get_text_config().hidden_size
    needed = (len(chain.blocks) + 1) * tokens * width * chain.skeleton.dtype.itemsize
    folder = room if spill is None and needed > free_memory(chain.skeleton.device) // 3 else spill
    original = embedded(chain, few, folder and folder / "original")
    without: list[Stream] = []
    for number, block in enumerate(chain.blocks):
        without.append(Stream(folder and folder / f"without-{number}"))
        chain.load_block(number)
        for i, batch in enumerate(few):
            call = chain.calls(batch)[number]
            without[number].put(i, original.get(i))
            with torch.no_grad():
                for stream in (original, *without[:number]):
                    stream.put(i, call.run(block, stream.get(i)))
        chain.skeleton.release(chain.name(number))
    chain.load_tail()
    found = [
        divergences(few, [original.get(i) for i in range(len(few))], [s.get(i) for i in range(len(few))], chain.logits)
        for s in without
    ]
    chain.release_outside()
    for stream in (original, *without):
        for i in range(len(few)):
            stream.drop(i)
    return [float(each.mean()) for each in found]


def embedded(chain: Chain, batches: Sequence[Batch], folder: Path | None) -> Stream:
    """The original's stream at the first block's door. folder: as `Stream`'s."""
    stream = Stream(folder)
    chain.load_outside()
    for i, batch in enumerate(batches):
        stream.put(i, chain.embed(batch))
    chain.release_outside()
    return stream
