"""In which format a result is stored, and what that asks of the recipe: settled before any work.

`compressed-tensors` takes whatever a recipe does. `llmshrink` (formats.sparse24) stores 2:4 alone, in what its kernel
multiplies: 16 bits, or symmetric integers of 4 or 8 bits. A site that can't be 2:4 stays as it is there.
`bitsandbytes` is what that library's own methods make, of every site or of none, since its config has one scheme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from llmshrink.errors import RecipeError
from llmshrink.formats.bitsandbytes import DTYPES, BitsAndBytesScheme
from llmshrink.formats.compressed_tensors import GroupedIntScheme
from llmshrink.formats.eight_bit import EightBitScheme
from llmshrink.formats.sparse24 import PATTERN, Sparse24Scheme
from llmshrink.formats.stored import Format, Scheme
from llmshrink.methods import QuantizeSpec, SiteSpec
from llmshrink.methods.bnb import require
from llmshrink.recipe.assign import Assigned, serving_notes
from llmshrink.recipe.fields import BITSANDBYTES
from llmshrink.recipe.schema import Recipe
from llmshrink.recipe.steps import Prune, Quantize
from llmshrink.weights.sparse24 import VALUE_DTYPES

FLAG = "--format llmshrink"
INSTEAD = "or leave --format out"
BITS = (4, 8)
GROUP_STEP = 32
"""Groups of scales are multiples of this, or whole rows: what the kernel takes."""
ZEROS_STORED = "zeros are stored like any other weight: no engine is faster for them, and nothing is smaller"
OWN_FORMAT = (
    "stored as 2:4 without its zeros, which llmshrink.load and vLLM with llmshrink's plugin read, and no other engine; "
    "llmshrink convert makes a standard checkpoint of it"
)


BNB_SERVING = (
    "no vLLM serves this checkpoint by itself: it has had no bitsandbytes of its own since 0.28, only by the package "
    "vllm-bnb-plugin, which wasn't tried; transformers with bitsandbytes loads it"
)
CPU_OUTPUTS = 32
BNB_ACTIVATIONS = (
    "bitsandbytes rounds the activations of 8-bit layers to 8 bits too, save for outliers: what that costs isn't in "
    "the KL above, which is the weights'; llmshrink eval measures both"
)


def scheme_of(spec: SiteSpec | None, in_features: int, format: Format, dtype: torch.dtype) -> Scheme | None:
    """How a site is stored; None: as a plain weight. dtype: of the weights that there were."""
    quantize = None if spec is None else spec.quantize
    if format == "bitsandbytes":
        if quantize is None:
            return None
        if quantize.method == "bnb-int8":
            return BitsAndBytesScheme("int8", dtype=dtype)
        return BitsAndBytesScheme("nf4", quantize.method == "bnb-nf4-double", dtype)
    group_size = None if quantize is None else -1 if quantize.group_size == in_features else quantize.group_size
    if format == "llmshrink":
        return None if spec is None else Sparse24Scheme(16 if quantize is None else quantize.bits, group_size)
    if quantize is None or group_size is None:
        return None
    if quantize.activations != "none":
        return EightBitScheme(quantize.activations)
    return GroupedIntScheme(quantize.bits, group_size, quantize.symmetric)


def format_of(record: Mapping[str, Any]) -> Format:
    """The format that a record (llmshrink.json) says its weights are in; older ones knew of one alone."""
    found: Format = record["identity"].get("format", "compressed-tensors")
    return found


def format_for(recipe: Recipe, asked: Format) -> Format:
    """The format that a recipe's result is stored in: as asked for, but bitsandbytes' own where its methods make it."""
    return "bitsandbytes" if recipe.quantize is not None and recipe.quantize.method in BITSANDBYTES else asked


def require_tools(recipe: Recipe) -> None:
    """Raise LlmshrinkError where the recipe's method needs a package that isn't here."""
    if recipe.quantize is not None and recipe.quantize.method in BITSANDBYTES:
        require(f"method {recipe.quantize.method}", "take --recipe rtn-w4a16, which needs no data either")


def check_bitsandbytes(recipe: Recipe, format: Format) -> None:
    """Raise RecipeError for what bitsandbytes' checkpoints can't hold. format: as asked for."""
    method = None if recipe.quantize is None else recipe.quantize.method
    if method not in BITSANDBYTES:
        return
    faults = []
    if format == "llmshrink":
        faults.append(f"{method} stores bitsandbytes' own tensors, and {FLAG} stores {PATTERN} alone; {INSTEAD[3:]}")
    if recipe.prune is not None:
        faults.append(f"{method} knows nothing of pruned weights: quantize them by gptq or rtn")
    if recipe.distill is not None:
        faults.append(f"{method} leaves nothing that distillation could train: quantize by gptq or rtn before it")
    if faults:
        raise RecipeError([f"{recipe.name}: {fault}" for fault in faults])


def check_methods(recipe: Recipe, assigned: Sequence[Assigned], dtype: torch.dtype) -> None:
    """Raise RecipeError where bitsandbytes' methods can't make the whole checkpoint. dtype: of the weights."""
    used = {one.spec.quantize.method: one for one in assigned if one.spec is not None and one.spec.quantize is not None}
    own = [method for method in used if method in BITSANDBYTES]
    if own and len(used) > 1:
        one, other = (f"{used[name].site.name} by {name}" for name in (own[0], next(n for n in used if n != own[0])))
        raise RecipeError(
            [f"{recipe.name}: {one} and {other}: a checkpoint of bitsandbytes has one method; take it out of overrides"]
        )
    if own and recipe.quantize is not None and recipe.quantize.method not in BITSANDBYTES:
        raise RecipeError([f"{recipe.name}: overrides ask for {own[0]}: say so in the quantize step itself"])
    if own and dtype not in DTYPES.values():
        raise RecipeError(
            [f"{recipe.name}: weights in {dtype}, and bitsandbytes takes {', '.join(DTYPES)}; bring the model to one"]
        )


def check_recipe(recipe: Recipe) -> None:
    """Raise RecipeError, a line for each reason, when the llmshrink format can't hold what a recipe asks for."""
    faults = []
    if recipe.structured:
        faults.append(f"it makes a plain smaller model, which has no zeros that {FLAG} could leave out; {INSTEAD[3:]}")
    elif recipe.prune is None:
        faults.append(f"it prunes nothing, and {FLAG} stores {PATTERN} alone; take a recipe that prunes, {INSTEAD}")
    elif recipe.prune.pattern != PATTERN:
        faults.append(_other_pattern(recipe.prune))
    if recipe.kv_cache != "none":
        faults.append(f"kv_cache {recipe.kv_cache}: {FLAG} has no word for it; leave it out, {INSTEAD}")
    if recipe.quantize is not None:
        faults += _quantize_faults(recipe.quantize)
        if 0 < recipe.quantize.group_size < GROUP_STEP:
            faults.append(
                f"groups of {recipe.quantize.group_size}: {FLAG} takes multiples of {GROUP_STEP} or whole rows; "
                f"--group-size {GROUP_STEP} or -1, {INSTEAD}"
            )
    if faults:
        raise RecipeError([f"{recipe.name}: {fault}" for fault in faults])


def _other_pattern(prune: Prune) -> str:
    asked = prune.pattern or f"{100 * (prune.ratio or 0):g} % anywhere"
    return f'it prunes {asked}, and {FLAG} stores {PATTERN} alone; prune by pattern: "{PATTERN}", {INSTEAD}'


def _quantize_faults(asked: Quantize | QuantizeSpec) -> list[str]:
    faults = []
    if asked.activations != "none":
        faults.append(f"activations {asked.activations}: {FLAG} stores weights alone; leave them out, {INSTEAD}")
    if asked.bits not in BITS:
        faults.append(f"{asked.bits} bits: {FLAG} stores integers of 4 or 8; take one of them, {INSTEAD}")
    if not asked.symmetric:
        faults.append(f"asymmetric: {FLAG} stores symmetric integers, whose zero is no weight; take those, {INSTEAD}")
    return faults


def as_sparse24(
    recipe: str, assigned: Sequence[Assigned], dtypes: Mapping[str, torch.dtype], *, strict: bool
) -> list[Assigned]:
    """What each site gets where only 2:4 is stored: one that isn't pruned so stays as it is, and says so.

    dtypes: of each site's weight, by name. Raises RecipeError for a site that is asked for what the format doesn't
    hold, for a layer of which engines would find only a part sparse, and with `strict` for a site that stays.
    """
    decided, faults = [], []
    for one in assigned:
        fault = _site_fault(one, dtypes[one.site.name])
        if fault is not None:
            faults.append(f"{recipe}: {one.site.name}: {fault}")
        if one.spec is not None and one.spec.prune is None:
            stays = f"stays as it is: it isn't {PATTERN}, and {FLAG} stores nothing else compressed"
            if strict:
                faults.append(f"{recipe}: {one.site.name}: {stays} (refused by --strict)")
            one = replace(one, spec=None, verdict=None, note="; ".join(filter(None, (one.note, stays))))
        decided.append(one)
    faults = faults[:1] or _mixed_layer(recipe, decided)
    if faults:
        raise RecipeError(faults)
    return decided


def _site_fault(one: Assigned, dtype: torch.dtype) -> str | None:
    """Why the format can't hold what an override made of a site; groups are assigned as its kernel takes them."""
    spec = one.spec
    if spec is None or spec.prune is None:
        return None
    if str(spec.prune.pattern) != PATTERN:
        return f"pruned {spec.prune.pattern}, and {FLAG} stores {PATTERN} alone; change the override, {INSTEAD}"
    if spec.quantize is None:
        if dtype in VALUE_DTYPES:
            return None
        return (
            f"stored in {str(dtype).removeprefix('torch.')}, and {FLAG} stores values of 16 bits as bfloat16 or "
            f"float16: quantize too, bring the model to bfloat16 first, {INSTEAD}"
        )
    return next(iter(_quantize_faults(spec.quantize)), None)


def _mixed_layer(recipe: str, decided: Sequence[Assigned]) -> list[str]:
    first: dict[str, Assigned] = {}
    for one in decided:
        other = first.setdefault(one.site.fused or one.site.name, one)
        if (one.spec is None) != (other.spec is None):
            return [
                f"{recipe}: {other.site.name} and {one.site.name} are one layer in every engine, but only one of them "
                f"is {PATTERN}; let one pattern match both, {INSTEAD}"
            ]
    return []


def format_notes(assigned: Sequence[Assigned]) -> dict[Format, list[str]]:
    """What a user should know of a result in each format: who serves it, and what its zeros are worth there."""
    specs = [one.spec for one in assigned if one.spec is not None]
    standard = serving_notes(assigned)
    if any(spec.prune for spec in specs):
        standard.append(ZEROS_STORED)
    bnb = [BNB_SERVING]
    bnb += [BNB_ACTIVATIONS] if any(spec.quantize and spec.quantize.method == "bnb-int8" for spec in specs) else []
    odd = [one.site.name for one in assigned if one.spec is not None and one.site.out_features % CPU_OUTPUTS]
    if odd and any(spec.quantize and spec.quantize.bits == 4 for spec in specs):
        bnb.append(
            f"bitsandbytes' 4-bit kernel for CPUs with bfloat16 instructions takes multiples of {CPU_OUTPUTS} outputs, "
            f"and {len(odd)} sites have others ({odd[0]}): there it doesn't run this checkpoint"
        )
    return {"compressed-tensors": standard, "llmshrink": [OWN_FORMAT], "bitsandbytes": bnb}
