"""Cuts: which sites of a block become narrower together, and how many of their rows and columns a unit is.

A unit of an FFN is one channel: a row of gate_proj and of up_proj, a column of down_proj. A unit of attention is one KV
group: a head of keys, a head of values, and the query heads that read them, whose columns in o_proj go with them. Where
the checkpoint has several linears in one, a unit has rows in each part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmshrink.errors import UnsupportedModelError
from llmshrink.methods.narrow import inputs_of
from llmshrink.model.families import Family, Narrowing
from llmshrink.model.sites import Site, Stage, sites_of

CHANNELS, KV_GROUPS = "FFN channels", "KV groups"


@dataclass(frozen=True)
class Cut:
    """units: how many there are. width: consecutive inputs of the consumer that are one unit.

    producers: each with the number of consecutive outputs that are one unit, for each linear that it is made of.
    """

    consumer: Site
    width: int
    units: int
    producers: tuple[tuple[Site, tuple[int, ...]], ...]

    def rows(self, producer: int, units: Tensor) -> Tensor:
        """The outputs of a producer that belong to some units: int64, ascending. units: int64, ascending."""
        start, found = 0, []
        for width in self.producers[producer][1]:
            found.append(start + inputs_of(units, width))
            start += self.units * width
        return torch.cat(found)


def ffn_cut(stages: Sequence[Stage], family: Family) -> Cut:
    """A block's FFN, by its channels. Raises UnsupportedModelError when it hasn't the family's linears."""
    consumer, producers = _members(sites_of(stages), family.ffn, CHANNELS)
    parts = [family.parts(site.name, site.out_features, 1, 1) for site in producers]
    return _cut(consumer, producers, parts, consumer.in_features, CHANNELS)


def attention_cut(stages: Sequence[Stage], family: Family, heads: int, kv_heads: int) -> Cut:
    """A block's attention, by its KV groups. heads, kv_heads: of queries, and of keys and values.

    Raises UnsupportedModelError when it hasn't the family's linears, its heads are no equal groups, or the family can
    have no other number of them.
    """
    sites = sites_of(stages)
    if isinstance(family.attention, str):
        raise UnsupportedModelError(
            f"{_block(sites)}: {family.attention}; width pruning takes only {CHANNELS} from this architecture"
        )
    consumer, producers = _members(sites, family.attention, KV_GROUPS)
    if heads % kv_heads:
        raise _unequal(consumer, kv_heads, KV_GROUPS)
    parts = [family.parts(site.name, site.out_features, heads, kv_heads) for site in producers]
    return _cut(consumer, producers, parts, kv_heads, KV_GROUPS)


def _cut(consumer: Site, producers: Sequence[Site], parts: Sequence[tuple[int, ...]], count: int, what: str) -> Cut:
    if consumer.in_features % count or any(rows % count for each in parts for rows in each):
        raise _unequal(consumer, count, what)
    widths = [tuple(rows // count for rows in each) for each in parts]
    return Cut(consumer, consumer.in_features // count, count, tuple(zip(producers, widths, strict=True)))


def _unequal(consumer: Site, count: int, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{consumer.name}: its {consumer.in_features} inputs aren't {count} equal {what}; width pruning doesn't cover "
        "this model yet: depth-prune drops whole blocks of it"
    )


def _block(sites: Sequence[Site]) -> str:
    return sites[0].name.removesuffix("." + sites[0].local)


def _members(sites: Sequence[Site], narrowing: Narrowing, what: str) -> tuple[Site, list[Site]]:
    by_leaf = {site.local.rpartition(".")[2]: site for site in sites}
    missing = [leaf for leaf in (*narrowing.producers, narrowing.consumer) if leaf not in by_leaf]
    if missing:
        raise UnsupportedModelError(
            f"{_block(sites)}: has no {', '.join(missing)} to take {what} from (its linears are {', '.join(by_leaf)}); "
            "width pruning doesn't cut other layers yet: depth-prune drops whole blocks of it"
        )
    return by_leaf[narrowing.consumer], [by_leaf[leaf] for leaf in narrowing.producers]
