"""What the inputs of a linear can be divided by a factor for each channel in: the norm that makes them.

Found by running a block, as its taps are: a norm feeds a tap if its output is the very tensor that the tap's linears
read. Whether its parameters can be divided is tried, not looked up. They are divided by powers of two, the linears'
columns multiplied by the same, and the block must put out the same bits. It doesn't where the norm's output goes
elsewhere too (as a residual), or its weights aren't what it multiplies by (Gemma's are one less). The block is filled
with noise in float32, so that a plan and its run find the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmshrink.calibration.activations import Batch
from llmshrink.model.blocks import Call
from llmshrink.model.chain import Chain
from llmshrink.model.outline import fill_with_noise, kind_of
from llmshrink.model.sites import Stage
from llmshrink.model.skeleton import TensorReader

POWERS = 6
"""Factors of 1 to 2^(POWERS - 1) are tried."""


@dataclass(frozen=True)
class Fold:
    """norm: path inside the block. names: its parameters, each [channels of the tap]."""

    norm: str
    names: tuple[str, ...]


def find_folds(
    chain: Chain, stages: Sequence[Sequence[Stage]], blank: TensorReader, tokens: int
) -> list[Mapping[str, Fold | str]]:
    """Of each block, by the path of a tap inside it: what can take its factors, or why nothing can.

    blank: any tensors in the place of the parameters. tokens: in the forward of one block of each kind.
    """
    skeleton = chain.skeleton
    calls = chain.calls(Batch(torch.zeros(1, tokens, dtype=torch.int64), None, held_out=False))
    width = skeleton.model.config.get_text_config().hidden_size
    noise = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, width, generator=noise).to(skeleton.device)
    known: dict[Hashable, Mapping[str, Fold | str]] = {}
    reader, skeleton.reader = skeleton.reader, blank
    try:
        for number, block in enumerate(chain.blocks):
            if kind_of(block) in known:
                continue
            skeleton.load(chain.name(number), dtype=torch.float32)
            try:
                fill_with_noise(block, noise)
                tried = partial(_fold, block, calls[number], hidden)
                known[kind_of(block)] = {stage.tap: tried(stage) for stage in stages[number]}
            finally:
                skeleton.release(chain.name(number))
    finally:
        skeleton.reader = reader
    return [known[kind_of(block)] for block in chain.blocks]


def _fold(block: nn.Module, call: Call, hidden: Tensor, stage: Stage) -> Fold | str:
    width = stage.sites[0].in_features
    norms = {name: module for name, module in block.named_modules() if _scales(module, width)}
    made: dict[str, Tensor] = {}
    read: list[Tensor] = []

    def note(name: str, _module: nn.Module, _args: object, out: Tensor) -> None:
        made[name] = out

    handles = [module.register_forward_hook(partial(note, name)) for name, module in norms.items()]
    handles.append(block.get_submodule(stage.tap).register_forward_pre_hook(lambda _, args: read.append(args[0])))
    try:
        with torch.no_grad():
            before = call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    own = next((name for name, out in made.items() if out.data_ptr() == read[0].data_ptr()), None)
    if own is None:
        return "no norm of their block feeds them"
    norm = norms[own]
    powers = torch.arange(width, device=hidden.device) % POWERS
    factors = (torch.ones_like(powers) << powers).float()
    with torch.no_grad():
        _multiply(norm, stage, block, 1 / factors)
        after = call.run(block, hidden)
        _multiply(norm, stage, block, factors)
    if not torch.equal(before, after):
        return f"{own} can't take the factors: the block would compute something else"
    return Fold(own, tuple(name for name, _ in norm.named_parameters(recurse=False)))


def _multiply(norm: nn.Module, stage: Stage, block: nn.Module, factors: Tensor) -> None:
    """The norm's parameters by powers of two, and the columns of its linears by their inverse."""
    for parameter in norm.parameters(recurse=False):
        parameter.mul_(factors)
    for site in stage.sites:
        block.get_submodule(site.local).get_parameter("weight").mul_(1 / factors)


def _scales(module: nn.Module, width: int) -> bool:
    """Whether a module's own parameters are a weight for each of `width` channels, or that and a bias."""
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and all(tuple(parameter.shape) == (width,) for parameter in own.values())
