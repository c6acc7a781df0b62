"""How the result's shape differs from the original's: decided before any work, and said in its config.json.

Fewer blocks (`depth`), or fewer FFN channels and KV groups, the same in each block (`width`), because a config.json has
one number for all of them. What is left is a plain model of the same architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmshrink.errors import RecipeError, UnsupportedModelError
from llmshrink.methods import NarrowSpec
from llmshrink.model.chain import Chain
from llmshrink.model.cuts import CHANNELS, KV_GROUPS, Cut, attention_cut, ffn_cut
from llmshrink.model.sites import Site, Stage, sites_of
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.steps import Depth, Width

ROUND_TO, LEAST = 64, 12
"""A share of the channels is rounded so that the count keeps the factor of two, up to ROUND_TO, that the original's
has: engines' kernels, tensor parallelism and groups of scales all want it. At least LEAST such multiples make up the
original, so that rounding moves the count by no more than 4 % of it."""
RANKS = 8
"""Tensor parallelism beyond so many devices isn't spoken of."""


@dataclass(frozen=True)
class Count:
    """A number of things in the original, and of those that stay."""

    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.before} -> {self.after}"


@dataclass(frozen=True)
class Fewer:
    """One kind of unit that every block has fewer of. cuts: by block; what: its name, as a person says it."""

    what: str
    count: Count
    cuts: tuple[Cut, ...]
    spec: NarrowSpec


@dataclass(frozen=True)
class Structure:
    """What the result has fewer of: blocks, or what `fewer` lists. heads: of queries; head_dim: their width.

    sites: of all blocks of the original. other_heads_in_vllm: whether vLLM would take the heads to be wider.
    channels_field: what config.json calls the FFN's channels.
    """

    sites: tuple[Site, ...]
    blocks: Count
    heads: Count
    head_dim: int
    depth: Depth | None
    fewer: tuple[Fewer, ...]
    other_heads_in_vllm: bool
    channels_field: str

    @property
    def fields(self) -> dict[str, int]:
        """Field of config.json -> how many of a kind of unit the narrower model has."""
        return {self._field(what): count.after for what, count in self._counts()}

    @property
    def narrow(self) -> dict[str, NarrowSpec]:
        """Name of every site that loses inputs -> how."""
        return {cut.consumer.name: each.spec for each in self.fewer for cut in each.cuts}

    def notes(self, tp: int) -> list[str]:
        """Which engines won't serve the result, and over how many devices it can't be split any more."""
        reasons, said = [], []
        if self.other_heads_in_vllm:
            reasons.append("its code for this architecture takes hidden_size / heads for the width of a head")
        for what, count in self._counts():
            # Fewer heads of keys than ranks are copied to them; query heads are asked about with every model.
            copied = what == KV_GROUPS and count.after < tp and tp % count.after == 0
            if count.after % tp and what != HEADS and not copied:
                reasons.append(f"{count.after} {what} can't be split over {tp} ranks")
            ranks = 2 * (count.after & -count.after)
            if what != KV_GROUPS and ranks <= RANKS and count.before % ranks == 0:
                said.append(
                    f"{count.after} {what} can't be split over {ranks} devices when served (tensor parallel), as the "
                    f"original's {count.before} can"
                )
        return [f"{e} won't serve this checkpoint: {why}" for why in reasons for e in ("vllm-cpu", "vllm-cuda")] + said

    def _counts(self) -> list[tuple[str, Count]]:
        counts = [(each.what, each.count) for each in self.fewer]
        return [*counts, *([(HEADS, self.heads)] if self.heads.before != self.heads.after else [])]

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the narrower model, from the original's."""
        changed = {**config, **self.fields}
        if self.heads.before != self.heads.after:
            changed["head_dim"] = self.head_dim
        return changed

    def record(self) -> dict[str, Any]:
        """What llmshrink.json says of it."""
        counts = {self._field(what): [count.before, count.after] for what, count in self._counts()}
        said = ", ".join(f"{what} {count}" for what, count in self._counts())
        return {"kind": "width", "summary": f"{said} in each of {self.blocks.before} blocks", **counts}

    def _field(self, what: str) -> str:
        """What config.json calls the number of some units."""
        return {CHANNELS: self.channels_field, KV_GROUPS: "num_key_value_heads", HEADS: "num_attention_heads"}[what]


HEADS = "attention heads"


def structure_of(recipe: Recipe, chain: Chain, stages: Sequence[Sequence[Stage]]) -> Structure | None:
    """The structure that a recipe asks for; None where it keeps the model's.

    Raises RecipeError for an amount that leaves all or nothing, UnsupportedModelError for a model that can't be cut.
    """
    if not recipe.structured:
        return None
    config = chain.skeleton.model.config.get_text_config()
    (heads, kv_heads), blocks = chain.heads, len(stages)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    fewer: tuple[Fewer, ...] = ()
    drop = 0
    if recipe.depth is not None:
        drop = _dropped(recipe, recipe.depth, blocks)
    else:
        assert recipe.width is not None
        cuts: dict[str, Callable[[Sequence[Stage]], Cut]] = {
            CHANNELS: lambda block: ffn_cut(block, chain.family),
            KV_GROUPS: lambda block: attention_cut(block, chain.family, heads, kv_heads),
        }
        fewer = _fewer(recipe, recipe.width, stages, cuts)
    groups = next((each.count for each in fewer if each.what == KV_GROUPS), None)
    left = heads if groups is None else heads // groups.before * groups.after
    structure = Structure(
        sites=tuple(site for each in stages for site in sites_of(each)),
        blocks=Count(blocks, blocks - drop),
        heads=Count(heads, left),
        head_dim=head_dim,
        depth=recipe.depth,
        fewer=fewer,
        other_heads_in_vllm=left < heads
        and not chain.family.head_dim_in_vllm
        and config.hidden_size != left * head_dim,
        channels_field=chain.family.channels_field,
    )
    if fewer:
        _check_config(chain.skeleton.model.config, structure)
    return structure


def _check_config(config: Any, structure: Structure) -> None:
    """Raise UnsupportedModelError where the architecture's class has no config for the narrower shape."""
    try:
        type(config).from_dict(structure.config(config.to_dict()))
    except Exception as error:  # whatever a class checks its fields with
        said = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"{structure.record()['summary']}: transformers takes no such {config.model_type} ({said}); nothing was "
            "touched; depth-prune drops whole blocks of it"
        ) from error


def _dropped(recipe: Recipe, depth: Depth, blocks: int) -> int:
    share = isinstance(depth.drop, float)
    drop = math.floor(depth.drop * blocks + 0.5) if share else int(depth.drop)
    if not 0 < drop < blocks:
        asked = f"{depth.drop:g} of {blocks} blocks" + (f" is {drop}" if share else "")
        raise RecipeError(
            [
                f"{recipe.name}: depth.drop: {asked}; drop 1 to {blocks - 1} of them"
                if blocks > 1
                else f"{recipe.name}: depth.drop: the model has one block, and one must stay"
            ]
        )
    return drop


def _fewer(
    recipe: Recipe,
    width: Width,
    stages: Sequence[Sequence[Stage]],
    cuts: Mapping[str, Callable[[Sequence[Stage]], Cut]],
) -> tuple[Fewer, ...]:
    found = []
    for field, what in (("channels", CHANNELS), ("kv_groups", KV_GROUPS)):
        asked = getattr(width, field)
        if asked is None:
            continue
        these = tuple(cuts[what](block) for block in stages)
        before = these[0].units
        odd = next((cut for cut in these if cut.units != before), None)
        if odd is not None:
            raise UnsupportedModelError(
                f"{odd.consumer.name}: has {odd.units} {what}, and {these[0].consumer.name} {before}; one number for "
                "all blocks, as config.json has it, can't say both"
            )
        after = _staying(asked, before, multiple_of(before) if what == CHANNELS else 1)
        if not 0 < after < before:
            limit = f"keep 1 to {before - 1} of them" if before > 1 else f"leave {field} out"
            raise RecipeError(
                [
                    f"{recipe.name}: width.{field}: {asked:g} of {before} {what} "
                    f"{'leaves' if after >= before else 'is'} {'all' if after >= before else 'none'}; {limit}"
                ]
            )
        spec = NarrowSpec(after, these[0].width, width.importance, width.repair, width.corrected, width.damp)
        found.append(Fewer(what, Count(before, after), these, spec))
    return tuple(found)


def multiple_of(count: int) -> int:
    """What a share of `count` is rounded to a multiple of."""
    multiple = math.gcd(count, ROUND_TO)
    while multiple > 1 and multiple * LEAST > count:
        multiple //= 2
    return multiple


def _staying(asked: float, before: int, multiple: int) -> int:
    if isinstance(asked, int):
        return asked
    return math.floor(asked * before / multiple + 0.5) * multiple
