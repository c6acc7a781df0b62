"""What formats of a checkpoint have in common: tensors held to their scheme, and config groups by the names in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from llmshrink.errors import CheckpointError

S = TypeVar("S", bound=Hashable)
LINEAR = "Linear"
"""The class that compressed-tensors' own tools name instead of modules."""


def checked(
    get: Callable[[str], Tensor], key: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], scheme: object
) -> Tensor:
    """The tensor `key`. Raises CheckpointError, naming it, when its dtype or shape isn't what `scheme` makes it."""
    tensor = get(key)
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{key} is {tensor.dtype} {list(tensor.shape)}, expected {' or '.join(map(str, dtypes))} {list(shape)}"
            f" for {scheme}; the checkpoint is damaged or not of this format"
        )
    return tensor


def by_scheme(sites: Mapping[str, S | None], ignore: Iterable[str]) -> tuple[dict[S, list[str]], list[str]]:
    """(the linears of each distinct scheme, in the order met; those that stay as they are, `ignore` first)."""
    targets: dict[S, list[str]] = {}
    ignored = dict.fromkeys(ignore)
    for name, scheme in sites.items():
        if scheme is None:
            ignored[name] = None
        else:
            targets.setdefault(scheme, []).append(name)
    return targets, list(ignored)


def literal(config: Mapping[str, object], scheme_of: Callable[[str, object], S]) -> dict[str, S]:
    """Module path -> scheme, from a `quantization_config` whose groups name modules literally.

    scheme_of: (label, group) -> its scheme. Raises CheckpointError where groups are missing, or a target is a pattern
    or a class.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError("quantization_config has no config_groups; the checkpoint is damaged")
    found: dict[str, S] = {}
    for label, group in groups.items():
        scheme = scheme_of(label, group)
        for target in group.get("targets", ()):
            if not isinstance(target, str) or target.startswith("re:") or ("." not in target and target[:1].isupper()):
                raise CheckpointError(
                    f"quantization_config {label} targets {target!r}; only literal module paths can be read here"
                )
            found[target] = scheme
    return found


def spelled_out(config: Mapping[str, object], quantized: Iterable[str]) -> Mapping[str, object]:
    """The `quantization_config` with literal names where its groups say `re:PATTERN` or the class `Linear`.

    quantized: module paths whose weights the checkpoint stores quantized. A group takes those that no literal name,
    then no pattern, of any group has taken before, in the order of the groups; as compressed-tensors does, a pattern
    fits from the beginning of a name, and what `ignore` names is left out. Other targets stay, for `literal` to refuse.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not any(map(_loose, _targets(groups))):
        return config
    ignore = [each for each in _listed(config.get("ignore")) if isinstance(each, str)]
    literals = {target for target in _targets(groups) if not _loose(target)}
    free = [name for name in quantized if name not in literals and not any(_fits(name, each) for each in ignore)]
    found: dict[str, list[object]] = {
        label: [target for target in _targets({label: group}) if not _loose(target)] for label, group in groups.items()
    }
    for of_class in (False, True):
        for label, group in groups.items():
            wanted = [each for each in _targets({label: group}) if _loose(each) and (each == LINEAR) is of_class]
            taken = [name for name in free if any(each == LINEAR or _fits(name, str(each)) for each in wanted)]
            found[label] += taken
            free = [name for name in free if name not in set(taken)]
    spelled = {
        label: {**group, "targets": found[label]} if isinstance(group, dict) else group
        for label, group in groups.items()
    }
    return {**config, "config_groups": spelled}


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _targets(groups: Mapping[str, object]) -> list[object]:
    return [target for group in groups.values() if isinstance(group, dict) for target in _listed(group.get("targets"))]


def _loose(target: object) -> bool:
    return target == LINEAR or (isinstance(target, str) and target.startswith("re:"))


def _fits(name: str, target: str) -> bool:
    if not target.startswith("re:"):
        return name == target
    try:
        return re.match(target.removeprefix("re:"), name) is not None
    except re.error as error:
        raise CheckpointError(f"quantization_config names modules by {target!r}: {error}") from None
