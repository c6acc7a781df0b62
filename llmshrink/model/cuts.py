"""Cuts: which sites of a block become narrower together, and how many of their rows and columns a unit is.

A unit of an FFN is one channel: a row of gate_proj and of up_proj, a column of down_proj. A unit of attention is one KV
group: a head of keys, a head of values, and the query heads that read them, whose columns in o_proj go with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmshrink.errors import UnsupportedModelError
from llmshrink.model.families import Family, Narrowing
from llmshrink.model.sites import Site, Stage, sites_of

CHANNELS, KV_GROUPS = "FFN channels", "KV groups"


@dataclass(frozen=True)
class Cut:
    """units: how many there are. width: consecutive inputs of the consumer that are one unit.

    producers: each with the number of its consecutive outputs that are one unit.
    """

    consumer: Site
    width: int
    units: int
    producers: tuple[tuple[Site, int], ...]


def ffn_cut(stages: Sequence[Stage], family: Family) -> Cut:
    """A block's FFN, by its channels. Raises UnsupportedModelError when it hasn't the family's linears, one by one."""
    consumer, producers = _members(sites_of(stages), family.ffn, CHANNELS)
    return _cut(consumer, producers, consumer.in_features, CHANNELS)


def attention_cut(stages: Sequence[Stage], family: Family, heads: int, kv_heads: int) -> Cut:
    """A block's attention, by its KV groups. heads, kv_heads: of queries, and of keys and values.

    Raises UnsupportedModelError when it hasn't the family's linears, one by one, or its heads are no equal groups.
    """
    consumer, producers = _members(sites_of(stages), family.attention, KV_GROUPS)
    if heads % kv_heads:
        raise _unequal(consumer, kv_heads, KV_GROUPS)
    return _cut(consumer, producers, kv_heads, KV_GROUPS)


def _cut(consumer: Site, producers: Sequence[Site], count: int, what: str) -> Cut:
    if consumer.in_features % count or any(site.out_features % count for site in producers):
        raise _unequal(consumer, count, what)
    return Cut(consumer, consumer.in_features // count, count, tuple((s, s.out_features // count) for s in producers))


def _unequal(consumer: Site, count: int, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{consumer.name}: its {consumer.in_features} inputs aren't {count} equal {what}; width pruning doesn't cover "
        "this model yet: depth-prune drops whole blocks of it"
    )


def _members(sites: Sequence[Site], narrowing: Narrowing, what: str) -> tuple[Site, list[Site]]:
    by_leaf = {site.local.rpartition(".")[2]: site for site in sites}
    missing = [leaf for leaf in (*narrowing.producers, narrowing.consumer) if leaf not in by_leaf]
    if missing:
        raise UnsupportedModelError(
            f"{sites[0].name.removesuffix('.' + sites[0].local)}: has no {', '.join(missing)} to take {what} from "
            f"(its linears are {', '.join(by_leaf)}); width pruning doesn't cut fused or other layers yet: "
            "depth-prune drops whole blocks of it"
        )
    return by_leaf[narrowing.consumer], [by_leaf[leaf] for leaf in narrowing.producers]
