"""Which linear of a compressed checkpoint is quantized how, from a `quantization_config` by any tool.

llmshrink writes modules' literal names; llm-compressor and others write classes (`Linear`) and patterns
(`re:.*self_attn.*`), with exceptions in `ignore`. The checkpoint itself says which linears are packed (they have
`weight_packed`); the config says how. A linear whose name is a target takes that group's scheme before one whose class
is, as in compressed-tensors. What can't be computed as the config says is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmshrink.errors import CheckpointError
from llmshrink.formats import compressed_tensors, eight_bit
from llmshrink.formats.compressed_tensors import FORMAT, GroupedIntScheme

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 32, 64, 128, 256)
_MIXED = "mixed-precision"
_ORDERS = (None, False, "weight", "static")
"""Activation orders that leave the columns where they were. `group` (or true) stores a permutation, `g_idx`."""


def schemes(config: Mapping[str, Any], linears: Mapping[str, str]) -> dict[str, GroupedIntScheme]:
    """Module path -> scheme, for the linears that are packed.

    config: the `quantization_config`. linears: path of each packed linear -> its module's class, `Linear`.
    Raises CheckpointError naming what isn't weight-only integers that the runtime computes with.
    """
    groups = _groups(config)
    read = {label: _scheme(label, group) for label, group in groups.items()}
    chosen: dict[str, GroupedIntScheme] = {}
    for name, kind in linears.items():
        if _matches(name, kind, config.get("ignore") or ()) is not None:
            raise CheckpointError(f"{name} is packed, but quantization_config ignores it; the checkpoint is damaged")
        found = [
            (by_class, label)
            for label, group in groups.items()
            if (by_class := _matches(name, kind, group.get("targets") or ())) is not None
        ]
        if not found:
            raise CheckpointError(f"{name} is packed, but no config group targets it; the checkpoint is damaged")
        chosen[name] = read[min(found, key=lambda match: match[0])[1]]
    return chosen


def _scheme(label: str, group: Mapping[str, Any]) -> GroupedIntScheme:
    """The scheme of one config group; CheckpointError where the kernels have no such bits or groups."""
    # The reader of literal names knows how a scheme is written; any name will do.
    target = f"{label}.weights"
    alone = {"quant_method": "compressed-tensors", "format": FORMAT}
    scheme = compressed_tensors.schemes({**alone, "config_groups": {label: {**group, "targets": [target]}}})[target]
    assert isinstance(scheme, GroupedIntScheme), "groups that round activations were refused"
    if scheme.bits not in BITS or scheme.group_size not in GROUP_SIZES:
        raise CheckpointError(
            f"quantization_config {label} has {scheme.bits} bits in groups of {scheme.group_size}; only bits"
            f" {_listed(BITS)} in groups of {_listed(GROUP_SIZES)} (-1: a row) can be run here"
        )
    return scheme


def _groups(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The config groups by label, each one of packed integers whose columns are in order."""
    method, form = config.get("quant_method"), config.get("format")
    if method == "compressed-tensors" and form in eight_bit.FORMATS:
        raise CheckpointError(
            f"quantized by {method}, format {form}, which rounds inputs to 8 bits too: it has no kernel here; serve it "
            "with vLLM, or load it with transformers, which computes with it as it is"
        )
    if method != "compressed-tensors" or form not in (FORMAT, _MIXED):
        raise CheckpointError(
            f"quantized by {method}, format {form}; only compressed-tensors {FORMAT} can be run here: quantize the"
            " original with llmshrink, or serve this one with vLLM"
        )
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        value = config.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise CheckpointError(f"quantization_config has a {key}, which can't be run here; serve it with vLLM")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError("quantization_config has no config_groups; the checkpoint is damaged")
    for label, group in groups.items():
        _check(label, group, form)
    return groups


def _check(label: str, group: Mapping[str, Any], form: object) -> None:
    own = group.get("format") or (FORMAT if form == FORMAT else None)
    if own != FORMAT:
        raise CheckpointError(f"quantization_config {label} has format {own}; only {FORMAT} can be run here")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise CheckpointError(
                f"quantization_config {label} quantizes {key.replace('_', ' ')}; only weights can be here"
            )
    weights = group.get("weights")
    order = weights.get("actorder") if isinstance(weights, dict) else None
    if order not in _ORDERS:
        raise CheckpointError(
            f"quantization_config {label} has activation order {order!r}, whose columns are permuted (g_idx); only"
            " null, weight and static can be run here"
        )


def _matches(name: str, kind: str, targets: object) -> int | None:
    """0 where a target is the module's name or a pattern of it, 1 where it's its class, None where none is."""
    if isinstance(targets, str) or not isinstance(targets, Iterable):
        raise CheckpointError(f"quantization_config lists its linears as {targets!r}, not as a list; it is damaged")
    best = None
    for target in targets:
        if not isinstance(target, str):
            continue
        try:
            found = target == name or (target.startswith("re:") and re.match(target[3:], name))
        except re.error as error:
            raise CheckpointError(f"quantization_config: {target!r} is no pattern ({error}); it is damaged") from error
        if found:
            return 0
        if target == kind:
            best = 1
    return best


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))
