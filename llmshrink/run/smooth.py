"""Smoothing in the run: which taps, settled before the work, and a block that is smoothed before it is solved.

What every calibration batch brings to the block's taps behind the compressed prefix is looked at in a forward of its
own; then norms and columns change places of what is loud (`methods.smooth`), and the compressed block starts as that
equivalent one: its taps, their statistics and the solvers know of nothing else. The original's stream stays the
original's; where the two are compared at a tap, the original's inputs are divided by the same factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmshrink.calibration.activations import Batch
from llmshrink.calibration.statistics import Loudest
from llmshrink.errors import CheckpointError, RecipeError
from llmshrink.methods import SiteSpec, grown, kept_exact, shrunk, smoothing_factors
from llmshrink.model.folds import Fold
from llmshrink.model.sites import Stage


@dataclass(frozen=True)
class Smoothing:
    """One tap's. alpha: of `methods.smooth`. fold: what its factors go into. parameters: every one that they change, as
    its path inside the block -> its checkpoint key, the fold's first."""

    alpha: float
    fold: Fold
    parameters: Mapping[str, str]

    @property
    def of_norm(self) -> dict[str, str]:
        """Those of the norm alone."""
        names = [f"{self.fold.norm}.{name}" for name in self.fold.names]
        return {name: self.parameters[name] for name in names}


@dataclass(frozen=True, eq=False)
class Smoothed:
    """A block's. stored: every tensor of it, by key, the equivalent block's. factors: by tap's path, float32 [in].

    events: by tap's path, what went otherwise than asked.
    """

    stored: dict[str, Tensor]
    factors: dict[str, Tensor]
    events: dict[str, tuple[str, ...]]


def smoothed_taps(
    recipe: str,
    stages: Sequence[Sequence[Stage]],
    specs: Mapping[str, SiteSpec],
    folds: Sequence[Mapping[str, Fold | str]],
    key_of: Mapping[str, str],
) -> tuple[dict[str, Smoothing], list[str]]:
    """By the name of a tap's first site, how it is smoothed; and, in words, which inputs that recipes smooth aren't.

    folds: of each block, as `find_folds` gives them. key_of: parameter -> checkpoint key. Raises RecipeError where
    linears of one tap are asked for different things, and where nothing that is asked for can be smoothed.
    """
    found: dict[str, Smoothing] = {}
    left: dict[str, list[str]] = {}
    for block, known in zip(stages, folds, strict=True):
        for stage in block:
            alpha = _asked(recipe, stage, specs)
            if alpha is None:
                continue
            fold, first = known[stage.tap], stage.sites[0]
            if isinstance(fold, str):
                left.setdefault(fold, []).extend(site.name for site in stage.sites)
                continue
            names = [*(f"{fold.norm}.{name}" for name in fold.names), *(f"{site.local}.weight" for site in stage.sites)]
            prefix = first.name.removesuffix(first.local)
            found[first.name] = Smoothing(alpha, fold, {name: key_of[prefix + name] for name in names})
    said = [f"{_leaves(names)}: {why}" for why, names in left.items()]
    if left and not found:
        raise RecipeError(
            [f"{recipe}: smooth: nothing of this model can be smoothed ({'; '.join(said)}); leave it out"]
        )
    return found, said


def _asked(recipe: str, stage: Stage, specs: Mapping[str, SiteSpec]) -> float | None:
    """The alpha of a tap: what its linears with 8-bit inputs ask for."""
    asked = {
        site.name: specs[site.name].smooth
        for site in stage.sites
        if site.name in specs and specs[site.name].activations is not None
    }
    one, *others = asked or {"": None}
    other = next((name for name in others if asked[name] != asked[one]), None)
    if other is not None:
        said = [f"{asked[name] if asked[name] is not None else 'none'}" for name in (one, other)]
        raise RecipeError(
            [f"{recipe}: {one} and {other} read one input, but ask for smooth {said[0]} and {said[1]}; let one pattern "
             "match both"]
        )  # fmt: skip
    return asked.get(one)


def _leaves(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def loudest_inputs(
    block: nn.Module, stages: Iterable[Stage], batches: Sequence[Batch], run: Callable[[int], object]
) -> dict[str, Loudest]:
    """By a tap's path, what all calibration batches bring there. run: takes the i-th batch through the block."""
    device = next(block.parameters()).device
    found = {stage.tap: Loudest(stage.sites[0].in_features, device=device) for stage in stages}
    current: list[Batch] = []

    def see(tap: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[tap].add(current[-1].real(args[0]))

    handles = [block.get_submodule(tap).register_forward_pre_hook(partial(see, tap)) for tap in found]
    try:
        for i, batch in enumerate(batches):
            if not batch.held_out:
                current[:] = [batch]
                run(i)
    finally:
        for handle in handles:
            handle.remove()
    return found


def smoothed(taps: Mapping[str, Smoothing], loudest: Mapping[str, Loudest], stored: Mapping[str, Tensor]) -> Smoothed:
    """The equivalent block. taps: by path. stored: every tensor of the block by key, none of which is written to.

    Raises CheckpointError where inputs aren't finite.
    """
    changed, factors, events = dict(stored), dict[str, Tensor](), dict[str, tuple[str, ...]]()
    for tap, asked in taps.items():
        inputs = loudest[tap].most.cpu()
        if not bool(torch.isfinite(inputs).all()):
            raise CheckpointError(
                f"{tap}: its input has NaN or Inf; run in float32 with --dtype float32, or check the calibration text"
            )
        norm = list(asked.of_norm.values())
        linears = [key for key in asked.parameters.values() if key not in norm]
        weights = torch.stack([stored[key].abs().amax(0).float() for key in linears]).amax(0)
        wanted = smoothing_factors(inputs, weights, asked.alpha)
        found = kept_exact(wanted, [stored[key] for key in norm], [stored[key] for key in linears])
        changed |= {key: shrunk(stored[key], found) for key in norm}
        changed |= {key: grown(stored[key], found) for key in linears}
        less = int((found != wanted).sum())
        dtype = str(stored[linears[0]].dtype).removeprefix("torch.")
        if less:
            events[tap] = (f"{less} of {len(found)} channels smoothed less than asked: {dtype} can't hold more",)
        factors[tap] = found.to(loudest[tap].most.device)
    return Smoothed(changed, factors, events)
