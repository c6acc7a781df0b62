"""Block fine-tuning: a quantized block's scales and codes are trained until its output comes near the original's.

A sweep solves one matrix after another and never looks at what the block as a whole puts out. Here the whole block is
trained on ||f(X) - f_q(X~)||^2, where X flows in the original and X~ behind the compressed prefix, over what its codes
are rounded from and over their scales (AutoRound, Cheng et al. 2023, arXiv 2309.05516; with scales: EfficientQAT, Chen
et al. 2024, arXiv 2407.11062). The start is the sweep's own result: the latents are its compensated weights, which
round to its codes. What comes out are plain grouped integers again, as any engine serves them.

The held-out windows travel through both streams too; a block whose output on them isn't nearer after the training than
before keeps the sweep's result, and says so.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmshrink.calibration.activations import Batch, Stream
from llmshrink.errors import CheckpointError
from llmshrink.methods import SiteSpec, solve
from llmshrink.methods.learned import ScaledLinear
from llmshrink.model.outline import fill_with_noise
from llmshrink.model.sites import Site
from llmshrink.run.arithmetic import automatic_training
from llmshrink.run.memory import give_back
from llmshrink.run.walk import SolvedSite, Walk, install, shared_twin
from llmshrink.weights import CacheScales, GroupedInt, round_cache

BETAS = (0.9, 0.95)
WARMUP = 10
"""Steps until the learning rates are whole; from there they follow a cosine down to LAST of them."""
LAST = 0.02


@dataclass(frozen=True)
class BlockTuning:
    """Trains each block once its sites are solved. entry: what enters it behind the compressed prefix, by batch.

    steps: of Adam; windows: in a step. lr: of latents, in units of a code; scale_lr: of scales, relative to each. seed:
    of the order of the windows.
    """

    steps: int
    windows: int
    lr: float
    scale_lr: float
    seed: int
    entry: Stream

    def remember(self, walk: Walk) -> None:
        """Keep what enters the next block, before it is run."""
        for i, batch in enumerate(walk.batches):
            if walk.carries(batch, original=False):
                self.entry.put(i, walk.compressed.get(i))

    def block(
        self,
        walk: Walk,
        number: int,
        solved: dict[str, SolvedSite],
        stored: Mapping[str, Tensor],
        cache: CacheScales | None = None,
    ) -> tuple[dict[str, SolvedSite], tuple[float, float] | None]:
        """Train a block whose sites are solved; its own parameters must be loaded, and stay as they are.

        stored: every tensor of the block as the source has it. cache: the scales that its keys and values are rounded
        by, which stay as they are: their room is more than training moves. Raises CheckpointError when the loss isn't
        a number.
        """
        trained = _Block(walk, number, walk.chain.blocks[number], solved, self.entry, cache)
        if not trained.learned:
            return solved, None
        before = trained.error()
        trained.train(self)
        after = trained.error()
        if not after < before:
            line = f"tuning its block made it no better on held-out windows ({before:.3g}, then {after:.3g}): not used"
            found = {key: replace(site, events=(*site.events, line)) for key, site in solved.items()}
        else:
            found = {
                key: replace(site, weight=module.stored(), residual=module.residual()) if module else site
                for key, site, module in ((key, site, trained.learned.get(key)) for key, site in solved.items())
            }
        del trained
        give_back()
        return self._pass_again(walk, number, found, stored, cache), (before, after)

    def step_seconds(self, walk: Walk, number: int, sites: Sequence[Site]) -> tuple[float, float]:
        """What a step on a block's shapes takes here, measured before the work: a block of noise is trained for two.

        Returns seconds of wall and of this process.

        The compressed stream must hold its first batch. Nothing of the checkpoint is read.
        """
        chain, entry = walk.chain, Stream(None)
        hidden = walk.compressed.get(0)
        entry.put(0, hidden)
        trial = replace(walk, batches=walk.batches[:1], original=entry)
        block = copy.deepcopy(chain.blocks[number]).to_empty(device=chain.skeleton.device)
        fill_with_noise(block, torch.Generator().manual_seed(0))
        solved = {
            site.key: _rounded(site, walk.specs[site.name], block, walk.scale_dtype)
            for site in sites
            if site.name in walk.specs and walk.specs[site.name].quantize is not None
        }
        trained = _Block(trial, number, block, solved, entry)
        trained.train(replace(self, steps=1))
        started, cpu = time.perf_counter(), time.process_time()
        trained.train(replace(self, steps=1))
        return time.perf_counter() - started, time.process_time() - cpu

    def _pass_again(
        self,
        walk: Walk,
        number: int,
        solved: dict[str, SolvedSite],
        stored: Mapping[str, Tensor],
        cache: CacheScales | None,
    ) -> dict[str, SolvedSite]:
        """Put the finished block's outputs into the compressed stream; the sites' errors are those of held-out inputs.

        A solver's own error is of the codes that it chose, which may be others now.
        """
        block = shared_twin(walk.chain.blocks[number])
        for site in solved.values():
            install(block, site.site.local, site.weight)
        if cache is not None:
            round_cache(block.get_submodule(walk.caches[number].local), cache)
        last = number == len(walk.chain.blocks) - 1
        with ExitStack() as stack, torch.no_grad():
            losses = {
                key: stack.enter_context(_measuring(block.get_submodule(site.site.local), stored[key]))
                for key, site in solved.items()
            }
            for i, batch in sorted(enumerate(walk.batches), key=lambda item: not item[1].held_out):
                if not batch.held_out:
                    stack.close()
                if not walk.carries(batch, original=False):
                    continue
                hidden = self.entry.take(i)
                if last and not batch.held_out:
                    walk.compressed.drop(i)
                else:
                    walk.compressed.put(i, walk.chain.calls(batch)[number].run(block, hidden))
        return {key: replace(site, error=losses[key].relative) for key, site in solved.items()}


def _rounded(site: Site, spec: SiteSpec, block: nn.Module, dtype: torch.dtype) -> SolvedSite:
    """A site of a block, rounded to nearest in the grid that it will have."""
    assert spec.quantize is not None, site.name
    nearest = replace(
        spec.quantize, method="rtn", scale_search="minmax", act_order=False, corrected=0.0, descent=0, residual=False
    )
    weight = block.get_submodule(site.local).get_parameter("weight").detach()
    solved = solve(weight, None, SiteSpec(None, nearest), dtype)
    return SolvedSite(site, spec, solved.weight, 0.0, 0.0, (), 0.0)


@dataclass
class _Lost:
    """What a linear lost of its output: squares, summed."""

    lost: float = 0.0
    energy: float = 0.0

    @property
    def relative(self) -> float:
        return self.lost / self.energy if self.energy > 0 else self.lost


@contextmanager
def _measuring(linear: nn.Module, original: Tensor) -> Iterator[_Lost]:
    """While open, sums what `linear` loses of the output that the original weight would give for the same input."""
    found = _Lost()
    weight = linear.get_parameter("weight")
    difference = original.to(device=weight.device, dtype=torch.float32) - weight.float()

    def measure(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].float()
        lost = x @ difference.T
        found.lost += float(lost.double().square().sum())
        found.energy += float((x @ weight.float().T + lost).double().square().sum())

    handle = linear.register_forward_pre_hook(measure)
    try:
        yield found
    finally:
        handle.remove()


class _Block:
    """A trainable copy of a block, and the windows that it is trained on.

    learned: checkpoint key -> the layer that learns.
    """

    def __init__(
        self,
        walk: Walk,
        number: int,
        block: nn.Module,
        solved: Mapping[str, SolvedSite],
        entry: Stream,
        cache: CacheScales | None = None,
    ) -> None:
        self._walk, self._number, self._entry = walk, number, entry
        self._device = walk.chain.skeleton.device
        self._block = copy.deepcopy(block).float()
        for parameter in self._block.parameters():
            parameter.requires_grad_(False)
        if cache is not None:
            round_cache(self._block.get_submodule(walk.caches[number].local), cache)
        self.learned: dict[str, ScaledLinear] = {}
        for key, site in solved.items():
            linear = self._block.get_submodule(site.site.local)
            assert isinstance(linear, nn.Linear), site.site.name
            if not isinstance(site.weight, GroupedInt):
                linear.weight = nn.Parameter(site.weight.dequantize(torch.float32), requires_grad=False)
                continue
            module = ScaledLinear(site.weight, linear.bias, latent=True, sparse=site.spec.prune is not None)
            if site.residual is not None:
                module.start_from(site.residual)
            self._block.set_submodule(site.site.local, module)
            self.learned[key] = module

    def error(self) -> float:
        """The squared error of the block's output on the held-out windows, relative to the original's energy."""
        lost = energy = 0.0
        with torch.no_grad():
            for i, batch in enumerate(self._walk.batches):
                if batch.held_out:
                    wanted = batch.real(self._walk.original.get(i)).double()
                    lost += float((batch.real(self._run(batch, self._entry.get(i))).double() - wanted).square().sum())
                    energy += float(wanted.square().sum())
        return lost / energy if energy > 0 else lost

    def train(self, spec: BlockTuning) -> None:
        """Adam over latents and scales; what is trained is in place afterwards."""
        latents = [module.latent for module in self.learned.values() if module.latent is not None]
        gains = [module.gain for module in self.learned.values()]
        groups: list[dict[str, object]] = [{"params": latents, "lr": spec.lr}, {"params": gains, "lr": spec.scale_lr}]
        optimizer = torch.optim.Adam(groups, betas=BETAS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, spec.steps))
        energy = self._mean_energy()
        for step, (batch, hidden, wanted) in enumerate(self._steps(spec)):
            optimizer.zero_grad(set_to_none=True)
            with self._fast():
                out = self._run(batch, hidden)
            loss = (batch.real(out).float() - batch.real(wanted).float()).square().mean() / energy
            if not bool(torch.isfinite(loss)):
                raise CheckpointError(
                    f"{self._walk.chain.name(self._number)}: tuning step {step + 1}: the loss is {loss.item()}; lower "
                    f"the step's lr ({spec.lr}) and scale_lr ({spec.scale_lr}), or leave `tune` out"
                )
            loss.backward()
            optimizer.step()
            schedule.step()
        # Not after each step: the next one would fault in again all that was given back, a sixth of the run's time.
        give_back()

    def _run(self, batch: Batch, hidden: Tensor) -> Tensor:
        call = self._walk.chain.calls(batch)[self._number]
        return call.run(self._block, hidden.float())

    def _fast(self) -> AbstractContextManager[object]:
        """bfloat16 products where the machine has them."""
        if automatic_training(self._device.type).dtype == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def _mean_energy(self) -> float:
        """Of an element of the original's output: the loss is relative, so that rates mean the same in every block."""
        energy = count = 0.0
        for i, batch in enumerate(self._walk.batches):
            if not batch.held_out:
                real = batch.real(self._walk.original.get(i))
                energy, count = energy + float(real.double().square().sum()), count + real.numel()
        return max(energy / count, 1e-12)

    def _steps(self, spec: BlockTuning) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """(tokens, what enters, what the original puts out) of each step's windows, in an order drawn from the seed."""
        places = [
            (i, row)
            for i, batch in enumerate(self._walk.batches)
            if not batch.held_out
            for row in range(batch.input_ids.shape[0])
        ]
        generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + self._number)
        order: list[int] = []
        for _ in range(spec.steps):
            while len(order) < spec.windows:
                order += torch.randperm(len(places), generator=generator).tolist()
            chosen, order = sorted(places[at] for at in order[: spec.windows]), order[spec.windows :]
            yield self._windows(chosen)

    def _windows(self, places: Sequence[tuple[int, int]]) -> tuple[Batch, Tensor, Tensor]:
        ids, masks, entering, wanted = [], [], [], []
        for i, row in places:
            batch = self._walk.batches[i]
            ids.append(batch.input_ids[row])
            masks.append(torch.ones_like(ids[-1], dtype=torch.bool) if batch.mask is None else batch.mask[row])
            entering.append(self._entry.get(i)[row])
            wanted.append(self._walk.original.get(i)[row])
        mask = torch.stack(masks)
        batch = Batch(torch.stack(ids), None if bool(mask.all()) else mask, held_out=False)
        return batch, torch.stack(entering), torch.stack(wanted)


def share_of_rate(step: int, steps: int) -> float:
    """What is used of a learning rate at a step (from 0): a linear start, then a cosine down to LAST."""
    warmup = min(WARMUP, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    return LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
