"""Sites: where compressible weights live, and the taps that feed them.

A site is a view: the module's name, the checkpoint key of its weight, its shape, the engine layer it is fused into.
Sites that read the very same tensor share a tap, hence one Hessian and one factorisation. Taps run one after the
other inside a block (qkv, o, gate/up, down in a Llama), and each is solved only when everything before it in the
compressed model stands: a tap is a stage. The order is not assumed: one forward of the block shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmshrink.errors import UnsupportedModelError
from llmshrink.model.blocks import Call


@dataclass(frozen=True)
class Site:
    """name: module path in the model; local: path inside its block; key: of the weight in the checkpoint."""

    name: str
    local: str
    key: str
    block: int
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Stage:
    """The sites fed by one tap, in the order in which the block runs them; the first one's input is the tap."""

    sites: tuple[Site, ...]

    @property
    def tap(self) -> str:
        return self.sites[0].local


def find_stages(
    block: nn.Module, prefix: str, index: int, call: Call, hidden: Tensor, key_of: dict[str, str]
) -> tuple[list[Stage], Tensor]:
    """Run a real block once and see which linears read which tensor.

    Returns the stages in running order and the block's output [batch, tokens, dim]. Raises UnsupportedModelError
    when a linear runs more than once or not at all.
    """
    linears = {name: module for name, module in block.named_modules() if type(module) is nn.Linear}
    ran: list[tuple[str, Tensor]] = []  # the inputs are kept alive, so that no address is used twice
    handles = [
        module.register_forward_pre_hook(lambda _m, args, name=name: ran.append((name, args[0])))
        for name, module in linears.items()
    ]
    try:
        with torch.no_grad():
            out = call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    counts = {name: sum(name == n for n, _ in ran) for name in linears}
    odd = [f"{prefix}.{name} ({count} times)" for name, count in counts.items() if count != 1]
    if odd:
        raise UnsupportedModelError(f"{odd[0]} doesn't run exactly once in its block's forward: it isn't covered yet")

    taps: dict[tuple[int, ...], list[Site]] = {}
    for name, x in ran:
        weight = linears[name].weight
        site = Site(
            name=f"{prefix}.{name}",
            local=name,
            key=key_of[f"{prefix}.{name}.weight"],
            block=index,
            out_features=weight.shape[0],
            in_features=weight.shape[1],
        )
        taps.setdefault((x.data_ptr(), *x.shape, *x.stride()), []).append(site)
    return [Stage(tuple(sites)) for sites in taps.values()], out


def sites_of(stages: Sequence[Stage]) -> list[Site]:
    """All sites of some stages, in running order."""
    return [site for stage in stages for site in stage.sites]


def linears_outside(model: Any, block_prefix: str) -> list[str]:
    """Names of the nn.Linear modules that are not inside the blocks (the head, as a rule)."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(block_prefix + ".")]
