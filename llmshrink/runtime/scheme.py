"""Which linear of a compressed checkpoint is quantized how, from a `quantization_config` by any tool.

llmshrink writes modules' literal names; llm-compressor and others write classes (`Linear`) and patterns
(`re:.*self_attn.*`), with exceptions in `ignore`. The checkpoint itself says which linears are compressed (they have
`weight_packed`, or a `weight_scale` beside codes of 8 bits); the config says how. A linear whose name is a target takes
that group's scheme before one whose class is, as in compressed-tensors. What can't be computed as the config says is
refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmshrink.errors import CheckpointError
from llmshrink.formats import compressed_tensors, eight_bit, kv_cache
from llmshrink.formats.compressed_tensors import FORMAT, MIXED, StandardScheme
from llmshrink.formats.eight_bit import EightBitScheme
from llmshrink.formats.groups import group_of, matches

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 32, 64, 128, 256)
FORMATS = (FORMAT, *eight_bit.FORMATS)


def schemes(config: Mapping[str, Any], linears: Mapping[str, str]) -> dict[str, StandardScheme]:
    """Module path -> scheme, for the linears that are packed.

    config: the `quantization_config`. linears: path of each packed linear -> its module's class, `Linear`.
    Raises CheckpointError naming what the runtime doesn't compute with.
    """
    groups = _groups(config)
    read = of_groups(config)
    chosen: dict[str, StandardScheme] = {}
    for name, kind in linears.items():
        if matches(name, kind, config.get("ignore") or ()) is not None:
            raise CheckpointError(f"{name} is packed, but quantization_config ignores it; the checkpoint is damaged")
        label = group_of(name, kind, groups)
        if label is None:
            raise CheckpointError(f"{name} is packed, but no config group targets it; the checkpoint is damaged")
        chosen[name] = read[label]
    return chosen


def of_groups(config: Mapping[str, Any]) -> dict[str, StandardScheme]:
    """Label -> scheme of each config group. Raises CheckpointError as `schemes` does."""
    return {label: _scheme(label, group, config.get("format")) for label, group in _groups(config).items()}


def _scheme(label: str, group: Mapping[str, Any], form: object) -> StandardScheme:
    """The scheme of one config group; CheckpointError where it can't be computed with. form: of the whole config."""
    own = group.get("format") or (None if form == MIXED else form)
    if own not in FORMATS:
        raise CheckpointError(f"quantization_config {label} has format {own}; only {_listed(FORMATS)} can be run here")
    if group.get("output_activations"):
        raise CheckpointError(f"quantization_config {label} quantizes output activations; only inputs can be here")
    # The reader of literal names knows how a scheme is written; any name will do.
    target = f"{label}.weights"
    alone = {"quant_method": "compressed-tensors", "format": FORMAT}
    bare = {key: value for key, value in group.items() if key != "format"} | {"targets": [target]}
    scheme = compressed_tensors.schemes({**alone, "config_groups": {label: bare}})[target]
    if scheme.format != own:
        inputs = "no" if scheme.format == FORMAT else "8-bit"
        raise CheckpointError(
            f"quantization_config {label} has format {own} and {inputs} input activations, which can't be run here"
        )
    if not isinstance(scheme, EightBitScheme) and (scheme.bits not in BITS or scheme.group_size not in GROUP_SIZES):
        raise CheckpointError(
            f"quantization_config {label} has {scheme.bits} bits in groups of {scheme.group_size}; only bits"
            f" {_listed(BITS)} in groups of {_listed(GROUP_SIZES)} (-1: a row) can be run here: eval and verify read"
            " it, and vLLM serves what llmshrink serve takes; or compress the original again with --group-size -1"
        )
    return scheme


def _groups(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The config groups by label, of a method and with nothing around them that can't be run."""
    method, form = config.get("quant_method"), config.get("format")
    if method != "compressed-tensors" or form not in (*FORMATS, MIXED):
        raise CheckpointError(
            f"quantized by {method}, format {form}; only compressed-tensors {_listed(FORMATS)} can be run here:"
            " quantize the original with llmshrink, or serve this one with vLLM"
        )
    kv_cache.rounds(config)  # or refuses another kind
    for key in ("sparsity_config", "transform_config"):
        value = config.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise CheckpointError(f"quantization_config has a {key}, which can't be run here; serve it with vLLM")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError("quantization_config has no config_groups; the checkpoint is damaged")
    return groups


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
